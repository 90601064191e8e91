"""What a training run says about itself: losses checked and averaged, one JSON line per logged step, a bar."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from entreg.atomic import write_text_atomic
from entreg.errors import OutputError, TrainingError

_LOSS, _GRADIENT = "loss", "gradient_norm"


class LossMeter:
    """Means of the loss and its parts since the last row of the log, and the check that they are finite.

    Reading a number waits for an accelerator, and comparing processes waits for all of them; so values stay where
    they are until ``window`` steps are there or :meth:`read` is called. On one CPU process the window is one step,
    which stops a bad step before it reaches the weights.

    Args:
        accelerator: whose processes' values are averaged.
        window: steps that are read together, at least 1.
    """

    def __init__(self, accelerator: Accelerator, window: int) -> None:
        self.accelerator = accelerator
        self.window = window
        self._waiting: list[tuple[int, list[str], Tensor, list[str], list[float]]] = []
        self._sums: dict[str, list[float]] = {}

    def add(self, step: int, losses: Sequence[Tensor], parts: Sequence[Mapping[str, Any]], norm: Tensor) -> None:
        """Take in one step.

        Args:
            step: its number, from 0.
            losses: scalars, one per accumulated part of the batch.
            parts: the objective's named numbers (floats or scalar tensors), likewise.
            norm: of the whole gradient, a scalar.

        Raises:
            TrainingError: the loss or the gradient of this or an earlier unread step is not finite.
        """
        names = [name for name, value in parts[0].items() if isinstance(value, Tensor)]
        values = [torch.stack([part[name].detach().float() for part in parts]).mean() for name in names]
        tensors = torch.stack([torch.stack([loss.detach().float() for loss in losses]).mean(), norm.float(), *values])
        others = [name for name in parts[0] if name not in names]
        numbers = [sum(float(part[name]) for part in parts) / len(parts) for name in others]
        self._waiting.append((step, [_LOSS, _GRADIENT, *names], tensors, others, numbers))
        if len(self._waiting) >= self.window:
            self.read()

    def read(self) -> None:
        """Read what is waiting.

        Raises:
            TrainingError: see :meth:`add`.
        """
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        flat = torch.cat([tensors for _, _, tensors, _, _ in waiting]).double()
        if self.accelerator.num_processes > 1:
            numbers = torch.tensor([number for *_, numbers in waiting for number in numbers], dtype=torch.float64)
            count = len(flat)
            flat = self.accelerator.reduce(torch.cat([flat, numbers.to(flat.device)]), reduction="mean")
            flat, numbers = flat[:count], flat[count:].tolist()
        else:
            numbers = [number for *_, numbers in waiting for number in numbers]
        read, first, second = flat.tolist(), 0, 0
        for step, names, tensors, others, _ in waiting:
            values = dict(zip(names, read[first : first + len(tensors)], strict=True))
            values.update(zip(others, numbers[second : second + len(others)], strict=True))
            first, second = first + len(tensors), second + len(others)
            _require_finite(step, values)
            for name, value in values.items():
                entry = self._sums.setdefault(name, [0.0, 0])
                entry[0] += value
                entry[1] += 1

    def means(self) -> dict[str, float]:
        """Means since the last call, each over the steps that had the number."""
        self.read()
        result = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return result

    def state_dict(self) -> dict[str, Any]:
        """The sums since the last row; :meth:`read` first."""
        return {name: list(entry) for name, entry in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._sums = {name: list(entry) for name, entry in state.items()}


def _require_finite(step: int, values: Mapping[str, float]) -> None:
    """Only what the weights depend on must be finite; other numbers are looked at to name the term at fault."""
    if not math.isfinite(values[_LOSS]):
        parts = (name for name, value in values.items() if name not in (_LOSS, _GRADIENT) and not math.isfinite(value))
        name = next(parts, None)
        what, value = ("the loss", values[_LOSS]) if name is None else (f"the term '{name}'", values[name])
    elif not math.isfinite(values[_GRADIENT]):
        what, value = "the norm of the gradient", values[_GRADIENT]
    else:
        return
    raise TrainingError(f"{what} is {value} in step {step} (the first is 0)")


class MetricsLog:
    """Rows of numbers in a file of JSON lines, appended as they come.

    Args:
        path: of the file; made when missing.
        last_step: rows of later steps, which a resumed run will write again, are removed.

    Attributes:
        rows: all of them, oldest first.

    Raises:
        OutputError: it cannot be written.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        self.path = path
        self.rows = [row for row in _read_rows(path) if row["step"] <= last_step]
        write_text_atomic(path, "".join(f"{_line(row)}\n" for row in self.rows))

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row, which has a ``step``."""
        self.rows.append(dict(row))
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{_line(row)}\n")
        except OSError as error:
            raise OutputError(f"Cannot write {self.path}: {error.strerror}; free some space and resume.") from error


def _line(row: Mapping[str, Any]) -> str:
    # JSON has no NaN and no infinity.
    plain = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
    }
    return json.dumps(plain)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                # The end of a line that a killed run was writing, or damage; nothing after it is of this run.
                break
            rows.append(row)
    return rows
