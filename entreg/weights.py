"""Weights of a model from a safetensors file, with one sentence for whatever can be wrong with them."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from entreg.errors import AssetError


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Put the weights of a safetensors file into a model.

    Args:
        model: changed in place; names and shapes must be those of the weights.
        path: of the file. A ``SHA256SUMS`` beside it, as ``sha256sum`` writes one, that lists it is compared.

    Raises:
        AssetError: it is missing, damaged, or holds another model's weights; the model is unchanged.
    """
    path = Path(path)
    try:
        _require_listed_sum(path)
        weights = load_file(path)
    except FileNotFoundError as error:
        raise AssetError(f"There are no weights at {path}; name a safetensors file.") from error
    except (OSError, SafetensorError) as error:
        raise AssetError(f"The weights at {path} cannot be read: {error}; make them anew.") from error
    put_weights(model, weights, path)


def _require_listed_sum(path: Path) -> None:
    """The format itself has no checksum: a changed weight would not be noticed."""
    sums = path.parent / "SHA256SUMS"
    if not sums.is_file():
        return
    listed = {
        name: digest
        for digest, name in re.findall(r"^(\w+) [ *](.+)$", sums.read_text("utf-8", "replace"), re.MULTILINE)
    }
    if path.name in listed:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != listed[path.name]:
                raise AssetError(
                    f"The weights at {path} are damaged: their SHA-256 is not the one in {sums.name}; fetch or make "
                    "them anew."
                )


def put_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Put weights into a model.

    Args:
        model: changed in place; names and shapes must be those of the weights.
        weights: by name.
        source: where they come from, for the sentence of the error.

    Raises:
        AssetError: they are another model's; the model is unchanged.
    """
    difference = weights_difference(model, weights)
    if difference:
        raise AssetError(f"The weights at {source} are not of this model: {difference}.")
    model.load_state_dict(weights)


def weights_difference(model: nn.Module, weights: Mapping[str, Tensor]) -> str | None:
    """The first difference in names or shapes between a model and weights, in words; None when they fit."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    for name in [*wanted, *found]:
        if name not in found:
            return f"'{name}' is missing"
        if name not in wanted:
            return f"the model has no '{name}'"
        if wanted[name] != found[name]:
            return f"'{name}' has shape {found[name]}, the model's has {wanted[name]}"
    return None


def frozen_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are not trained, under every name that they have in the model's state dictionary."""
    weights = model.state_dict(keep_vars=True)
    return {
        name: value.detach()
        for name, value in weights.items()
        if isinstance(value, nn.Parameter) and not value.requires_grad
    }


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes, dtypes and up to 1,024 evenly spaced values of each tensor.

    Tells models and revisions apart in a fraction of a second, whatever their size; not a proof that all values agree.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().flatten()
        sample = value[:: max(1, len(value) // 1024)][:1024].cpu().contiguous()
        digest.update(f"{name} {tuple(weights[name].shape)} {value.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes, dtypes and every byte of each tensor: equal for equal weights only.

    A gigabyte takes about a second.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().reshape(-1).cpu().contiguous()
        digest.update(f"{name} {tuple(weights[name].shape)} {value.dtype}".encode())
        digest.update(value.view(torch.uint8).numpy())
    return digest.hexdigest()


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode without gradients: the teacher of a distillation."""
    return copy.deepcopy(model).eval().requires_grad_(False)
