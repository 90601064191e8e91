"""The same for TensorBoard: an adapter, no more. Curves of a resumed run go on, rows of lost steps are purged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from entreg.atomic import require_writable
from entreg.records.environment import git_state
from entreg.tracking.settings import TrackerSettings
from entreg.tracking.tracker import Row


class TensorBoardTracker:
    """See :class:`entreg.tracking.tracker.Tracker`; arguments as :func:`entreg.tracking.open_tracker`.

    Args:
        rows: of the run so far; empty: it starts afresh; None: it has no steps of its own.
    """

    active = True

    def __init__(
        self,
        settings: TrackerSettings,
        *,
        rows: Sequence[Row] | None,
        config: Mapping[str, Any],
        experiment: str,
        group: str,
        name: str,
        run_id: str,
        tags: Sequence[str],
    ) -> None:
        folder = Path(settings.directory) / "tensorboard" / group / f"{name.replace(' ', '-')}-{run_id}"
        require_writable(folder)
        purge = None if rows is None else (rows[-1]["step"] + 1 if rows else 0)
        self._writer = SummaryWriter(str(folder), purge_step=purge)
        self._step = 0 if not rows else rows[-1]["step"]
        described = {**config, "experiment": experiment, "code": git_state(), "tags": list(tags)}
        self._text("config", f"```json\n{json.dumps(described, indent=1, default=str)}\n```")

    def log(self, row: Mapping[str, float], step: int) -> None:
        self._step = step
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)
        # A killed run must leave what it said.
        self._writer.flush()

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        self._writer.add_histogram(name, values, step)

    def image(self, name: str, array: np.ndarray, step: int) -> None:
        self._writer.add_image(name, array, step, dataformats="HWC")

    def table(self, name: str, rows: Sequence[Row]) -> None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines = [columns, ["---"] * len(columns)]
        lines += [["" if row.get(column) is None else str(row[column]) for column in columns] for row in rows]
        self._text(name, "\n".join(f"| {' | '.join(cells)} |" for cells in lines))

    def summary(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, self._step)

    def artifact(self, path: Path, name: str) -> None:
        # TensorBoard keeps no files.
        self._text(name, str(path))

    def finish(self, failed: bool) -> None:
        self._writer.close()

    def _text(self, name: str, text: str) -> None:
        self._writer.add_text(name, text, self._step)
        self._writer.flush()
