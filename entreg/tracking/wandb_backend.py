"""Runs in wandb: into files without an account, or to a server.

A run has one identifier for its whole life. Each time that it is started, wandb writes a part of it into a folder of
its own, ``<directory>/wandb/offline-run-<time>-<id>``; the parts are one run on the server. What a killed process had
not yet written is written again from the run's own rows, and a step that is there is not written twice.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import wandb

from entreg.atomic import require_writable
from entreg.errors import first_line
from entreg.records.environment import git_state
from entreg.tracking.offline_runs import is_empty, log_records, run_parts
from entreg.tracking.settings import TrackerSettings
from entreg.tracking.tracker import Row, say

_BINS = 32
_TRIES = 3
_REQUEST_SECONDS = 10.0
_START_SECONDS = 30.0
_FINISH_SECONDS = 60.0


class WandbTracker:
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
        folder = Path(settings.directory).resolve()
        require_writable(folder / "wandb")
        # Copies of artifacts wait here for their upload, not in a home directory, which may be small.
        os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb" / "staging"))
        os.environ.setdefault("WANDB_CACHE_DIR", str(folder / "wandb" / "cache"))
        starts_afresh = rows is not None and not rows
        for part in run_parts(folder, run_id):
            # What an earlier attempt left goes, as its checkpoints and rows do.
            if starts_afresh or is_empty(part):
                shutil.rmtree(part)
        last = last_tracked_step(folder, run_id)
        options = {
            "id": run_id,
            "name": name,
            "project": settings.project,
            "entity": settings.entity,
            "group": group,
            "tags": list(dict.fromkeys(tags)),
            "dir": str(folder),
            "config": {**config, "experiment": experiment, "code": git_state()},
            # None replaces a run of this name that the server may have.
            "resume": None if starts_afresh else "allow",
        }
        self._run = _started(settings.mode, folder, options)
        # Bounds and counts of histograms are no numbers of the whole run.
        self._run.define_metric("row_entropy/*", summary="none")
        if self._run.resumed:
            last = max(last, self._run.step - 1)
        # What was tracked before this process began, and the newest step of all.
        self._last = self._newest = last
        for row in rows or ():
            self.log({key: value for key, value in row.items() if key != "step" and value is not None}, row["step"])

    def log(self, row: Mapping[str, float], step: int) -> None:
        if step > self._last:
            self._newest = step
            self._run.log(dict(row), step=step)

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        if step > self._last:
            self._run.log({name: wandb.Histogram(np_histogram=np.histogram(values, bins=_BINS))}, step=step)

    def image(self, name: str, array: np.ndarray, step: int) -> None:
        self._run.log({name: wandb.Image(array)}, step=max(step, self._end))

    def table(self, name: str, rows: Sequence[Row]) -> None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        data = [[_cell(row.get(column)) for column in columns] for row in rows]
        self._run.log({name: wandb.Table(columns=columns, data=data, allow_mixed_types=True)}, step=self._end)

    def summary(self, values: Mapping[str, float]) -> None:
        self._run.summary.update(dict(values))

    def artifact(self, path: Path, name: str) -> None:
        artifact = wandb.Artifact(name, type="checkpoint")
        if path.is_dir():
            artifact.add_dir(str(path))
        else:
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    @property
    def _end(self) -> int:
        """The step of what belongs to the end of a run, which a resumed one may reach without a step of its own."""
        return max(self._newest, self._last + 1)

    def finish(self, failed: bool) -> None:
        try:
            self._run.finish(exit_code=1 if failed else 0)
        except Exception:
            # Otherwise wandb would wait for its server once more when the process ends.
            wandb.teardown(exit_code=1)
            raise


def _started(mode: str, folder: Path, options: Mapping[str, Any]) -> wandb.Run:
    """The run; where a server does not take it, in files."""
    settings = wandb.Settings(
        # What the run prints is its own; and wandb must never ask for a key in the middle of a sweep.
        silent=True,
        console="off",
        init_timeout=_START_SECONDS,
        finish_timeout=_FINISH_SECONDS,
        finish_timeout_raises=True,
        x_graphql_retry_max=_TRIES,
        x_graphql_timeout_seconds=_REQUEST_SECONDS,
    )
    if mode == "online":
        before = run_parts(folder, options["id"])
        try:
            run = wandb.init(mode="online", settings=settings, **options)
        except Exception as error:
            # The service remembers a run that it could not start.
            wandb.teardown(exit_code=1)
            for part in set(run_parts(folder, options["id"])) - set(before):
                shutil.rmtree(part, ignore_errors=True)
            say(
                f"wandb's server does not take the run ({first_line(error).rstrip('.')}); it is kept in {folder} "
                "instead: upload it later with make wandb-sync."
            )
        else:
            say(f"wandb: {run.url}")
            return run
    return wandb.init(mode="offline", settings=settings, **options)


def last_tracked_step(folder: Path, run_id: str) -> int:
    """The last step of a run that stands in wandb's files, as wandb reads them; -1 if there is none.

    wandb writes every few seconds; what a killed process had not yet written is missing.
    """
    for part in reversed(run_parts(folder, run_id)):
        steps = [one["history"]["step"]["num"] for one in log_records(part) if one["type"] == "history"]
        if steps:
            return max(steps)
    return -1


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)
