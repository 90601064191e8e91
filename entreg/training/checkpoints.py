"""Checkpoints of training: a folder of safetensors files and one JSON file with their checksums, never pickle.

``<run>/checkpoints/step-00000200/`` holds ``model.safetensors`` (the weights, under the model's own names),
``averaged.safetensors`` (their moving average, where there is one), ``training.safetensors`` (all other tensors) and
``state.json`` (everything else, and the SHA-256 of every file and of itself). A folder appears under its name only
when it is complete. Parameters that were frozen in training are not in it, only their names and a fingerprint that
says which they were: such a checkpoint is loaded onto the model that the training began with.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from entreg.atomic import folder_atomic, remove_abandoned, remove_folder
from entreg.errors import AssetError, ConfigError, InputError
from entreg.weights import load_weights, weights_difference, weights_fingerprint

MODEL, AVERAGED, TRAINING, STATE = "model.safetensors", "averaged.safetensors", "training.safetensors", "state.json"
_FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, checked and in memory.

    Attributes:
        path: its folder.
        step: number of finished steps.
        model: weights by name, without those that were frozen.
        averaged: their moving average, or None.
        state: everything else, as it was given to :func:`save_checkpoint`; ``frozen``, where it is there and not None,
            comes from :func:`frozen_record`.
    """

    path: Path
    step: int
    model: dict[str, Tensor]
    averaged: dict[str, Tensor] | None
    state: dict[str, Any]

    def difference(self, model: nn.Module) -> str | None:
        """What keeps it from being loaded into a model, in words; None if it fits."""
        own, frozen = model.state_dict(), self.state.get("frozen")
        held = {} if frozen is None else {name: own.get(name) for name in frozen["names"]}
        missing = next((name for name, value in held.items() if value is None), None)
        if missing is not None:
            return f"the model has no '{missing}'"
        if frozen is not None and weights_fingerprint(held) != frozen["fingerprint"]:
            return "they were trained on top of frozen weights that are not the model's"
        return weights_difference(model, {**held, **self.model})


def frozen_record(weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """What a checkpoint says of the weights that were frozen in training; None if none were."""
    return {"names": sorted(weights), "fingerprint": weights_fingerprint(weights)} if weights else None


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a number of finished steps is."""
    return root / f"step-{step:08d}"


def save_checkpoint(
    root: Path,
    step: int,
    model: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    averaged: Mapping[str, Tensor] | None = None,
    keep: int | None = None,
) -> Path:
    """Write one checkpoint, then remove all but the newest.

    Args:
        root: folder of the run's checkpoints.
        step: number of finished steps, at least 0.
        model: weights by name, on any device.
        state: dictionaries (keys strings or whole numbers), lists, tuples, tensors, numbers, strings, booleans, None.
        averaged: moving average of the weights.
        keep: how many checkpoints stay, at least 1; None for all.

    Returns:
        Its folder.

    Raises:
        InputError: ``state`` holds something else.
        OutputError: it cannot be written; older checkpoints are untouched.
    """
    tensors: dict[str, Tensor] = {}
    plain = _pack(state, tensors, "state")
    files = {MODEL: model, TRAINING: tensors}
    if averaged is not None:
        files[AVERAGED] = averaged
    target = checkpoint_folder(root, step)
    with folder_atomic(target) as folder:
        for name, content in files.items():
            try:
                save_file(_owned(content), folder / name)
            except SafetensorError as error:
                # The library says what the system said in words only.
                number = re.search(r"\(os error (\d+)\)", str(error))
                raise OSError(int(number[1]) if number else 0, str(error)) from error
        content = {
            "format": _FORMAT,
            "step": step,
            "files": {name: _checksum(folder / name) for name in files},
            "state": plain,
        }
        (folder / STATE).write_text(json.dumps({**content, "checksum": _own_checksum(content)}), encoding="utf-8")
    if keep is not None:
        for path in _folders(root)[keep:]:
            remove_folder(path)
        # What a killed run was writing is of no use to anybody.
        remove_abandoned(root, "step-*")
    return target


def latest_checkpoint(root: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint, or None; each damaged one that is passed over is named on standard error."""
    damaged = []
    for folder in _folders(root):
        try:
            found = read_checkpoint(folder)
        except AssetError as error:
            damaged.append(str(error))
            continue
        for sentence in damaged:
            print(f"{sentence} Training goes on from the older {found.path.name}.", file=sys.stderr)
        return found
    for sentence in damaged:
        print(f"{sentence} There is no older one, so training starts again.", file=sys.stderr)
    return None


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint and check it.

    Raises:
        AssetError: a file is missing or damaged.
        ConfigError: another version of this code wrote it.
    """
    try:
        content = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.pop("checksum", None) != _own_checksum(content):
            raise ValueError(f"{STATE} was changed")
        if content["format"] != _FORMAT:
            raise ConfigError(
                f"Checkpoint {folder} has format {content['format']}, this version reads {_FORMAT}; choose another "
                "folder, or start again with resume=null."
            )
        named = _NAME.fullmatch(folder.name)
        if named and int(named[1]) != content["step"]:
            raise ValueError(f"it is that of step {content['step']}")
        for name, checksum in content["files"].items():
            if _checksum(folder / name) != checksum:
                raise ValueError(f"{name} was changed")
        tensors = {name: _load(folder / name) for name in content["files"]}
        state = _unpack(content["state"], tensors[TRAINING])
    except FileNotFoundError as error:
        raise AssetError(f"Checkpoint {folder} is damaged: {Path(error.filename).name} is missing.") from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise AssetError(f"Checkpoint {folder} is damaged: {error}.") from error
    return Checkpoint(folder, content["step"], tensors[MODEL], tensors.get(AVERAGED), state)


def remove_checkpoints(root: Path, after: int) -> None:
    """Remove the checkpoints of a run after a step; -1 for all."""
    for folder in _folders(root):
        if _step(folder) > after:
            remove_folder(folder)


def load_model_weights(model: nn.Module, source: str | Path) -> None:
    """Put trained weights into a model.

    Args:
        model: changed in place; names and shapes must be those of the weights. For a checkpoint of a training with
            frozen parameters, it has these already.
        source: a safetensors file, a checkpoint's folder, or a run's folder, whose newest checkpoint is taken. Of a
            checkpoint, the averaged weights are taken where there are any.

    Raises:
        AssetError: nothing is there, it is damaged, or it holds another model's weights; the model is unchanged.
    """
    path = Path(source)
    if path.is_dir():
        checkpoint = read_checkpoint(path) if (path / STATE).exists() else latest_checkpoint(path / "checkpoints")
        if checkpoint is None:
            raise AssetError(f"There is no checkpoint in {path}; name a safetensors file or the folder of a run.")
        difference = checkpoint.difference(model)
        if difference:
            raise AssetError(f"The weights at {path} are not of this model: {difference}.")
        model.load_state_dict(checkpoint.averaged or checkpoint.model, strict=False)
    else:
        load_weights(model, path)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (FileNotFoundError, RuntimeError) as error:
        # It was there when its checksum was taken; neither safetensors nor PyTorch says which file it finds gone.
        raise OSError(f"{path.name} cannot be read") from error


def _folders(root: Path) -> list[Path]:
    """Folders of checkpoints, newest first."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if _NAME.fullmatch(path.name)), key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(_NAME.fullmatch(folder.name)[1])


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and without shared memory, which the format has not (tied weights are written twice)."""
    result: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        address = value.untyped_storage().data_ptr()
        result[name] = value.clone() if address in seen else value
        seen.add(address)
    return result


def _pack(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """The value as JSON, its tensors moved to ``tensors`` under their paths."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        items = [_pack(item, tensors, f"{path}.{index}") for index, item in enumerate(value)]
        return {type(value).__name__: items}
    if isinstance(value, Mapping) and all(isinstance(key, str) or type(key) is int for key in value):
        return {"items": [[key, _pack(item, tensors, f"{path}.{key}")] for key, item in value.items()]}
    raise InputError(f"a checkpoint cannot hold {path}, of type {type(value).__name__}; use tensors and plain values")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        # A copy: what is read from the file may be a view of it.
        return tensors[content].clone()
    if kind == "items":
        return {key: _unpack(item, tensors) for key, item in content}
    items = [_unpack(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
