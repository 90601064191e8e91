"""Weights of a model from a safetensors file, with one sentence for whatever can be wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from entreg.errors import AssetError


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Put the weights of a safetensors file into a model.

    Args:
        model: changed in place; names and shapes must be those of the weights.
        path: of the file.

    Raises:
        AssetError: it is missing, damaged, or holds another model's weights; the model is unchanged.
    """
    path = Path(path)
    try:
        weights = load_file(path)
    except FileNotFoundError as error:
        raise AssetError(f"There are no weights at {path}; name a safetensors file.") from error
    except (OSError, SafetensorError) as error:
        raise AssetError(f"The weights at {path} cannot be read: {error}; make them anew.") from error
    put_weights(model, weights, path)


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
