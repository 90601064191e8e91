"""The one interface of all trackers, and the care that none of them can stop a run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from entreg.distributed import is_first
from entreg.errors import first_line
from entreg.tracking.settings import TrackerSettings

Row = Mapping[str, Any]


class Tracker(Protocol):
    """Takes in what a run says about itself.

    Attributes:
        active: whether anything becomes of it; what is costly to make need not be made otherwise.
    """

    active: bool

    def begin(self, rows: Sequence[Row]) -> None:
        """Told once, before the first step, the rows of the run so far.

        Args:
            rows: of the steps before the one from which a resumed run goes on; none of a run that starts afresh, whose
                earlier attempts are to be forgotten.
        """
        ...

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Numbers of one step.

        Args:
            row: name to value; ``step`` and missing values (None) are left out.
            step: finished steps, not below that of any call before.
        """
        ...

    def histogram(self, name: str, values: Any, step: int) -> None:
        """Any number of finite values of one step, an array or tensor."""
        ...

    def image(self, name: str, array: np.ndarray, step: int) -> None:
        """A picture of one step, (h, w, 3) uint8."""
        ...

    def table(self, name: str, rows: Sequence[Row]) -> None:
        """A table of the whole run; rows may lack columns, cells are scalars, text or None."""
        ...

    def summary(self, values: Mapping[str, float]) -> None:
        """Numbers of the whole run."""
        ...

    def artifact(self, path: str | Path, name: str) -> None:
        """A file or folder of the run, copied."""
        ...

    def finish(self, failed: bool) -> None:
        """The run is over; the last call."""
        ...


class NoTracker:
    """Takes everything in and keeps nothing."""

    active = False

    def begin(self, rows: Sequence[Row]) -> None:
        pass

    def log(self, row: Mapping[str, float], step: int) -> None:
        pass

    def histogram(self, name: str, values: Any, step: int) -> None:
        pass

    def image(self, name: str, array: np.ndarray, step: int) -> None:
        pass

    def table(self, name: str, rows: Sequence[Row]) -> None:
        pass

    def summary(self, values: Mapping[str, float]) -> None:
        pass

    def artifact(self, path: str | Path, name: str) -> None:
        pass

    def finish(self, failed: bool) -> None:
        pass


class CarefulTracker:
    """Opens another tracker at the first thing that there is to keep, and gives it up at its first failure.

    Whatever a tracker does, the run goes on: a call that failed may have waited for a server, and the next one would
    wait again. What stopped it is said once.

    Args:
        open_backend: given the rows of :meth:`Tracker.begin`, or None when it was not called, makes the tracker.
        name: of the tracker, for the sentence.
    """

    def __init__(self, open_backend: Callable[[Sequence[Row] | None], Tracker], name: str) -> None:
        self.active = True
        self._open, self._name = open_backend, name
        self._rows: Sequence[Row] | None = None
        self._backend: Tracker | None = None

    def begin(self, rows: Sequence[Row]) -> None:
        self._rows = list(rows)

    def log(self, row: Mapping[str, float], step: int) -> None:
        numbers = {key: value for key, value in row.items() if key != "step" and value is not None}
        self._call("log", numbers, step)

    def histogram(self, name: str, values: Any, step: int) -> None:
        self._call("histogram", name, np.asarray(values, dtype=np.float64).ravel(), step)

    def image(self, name: str, array: np.ndarray, step: int) -> None:
        self._call("image", name, array, step)

    def table(self, name: str, rows: Sequence[Row]) -> None:
        if rows:
            self._call("table", name, rows)

    def summary(self, values: Mapping[str, float]) -> None:
        self._call("summary", values)

    def artifact(self, path: str | Path, name: str) -> None:
        self._call("artifact", Path(path), name)

    def finish(self, failed: bool) -> None:
        backend, self._backend = self._backend, None
        try:
            if backend is not None:
                backend.finish(failed)
        except Exception as error:
            # After a failure that was told, the end may well fail too.
            if self.active:
                say(f"The tracker {self._name} did not finish ({first_line(error)}); nothing of the run is lost.")
        self.active = False

    def _call(self, method: str, *arguments: Any) -> None:
        if not self.active:
            return
        try:
            if self._backend is None:
                self._backend = self._open(self._rows)
            getattr(self._backend, method)(*arguments)
        except Exception as error:
            self.active = False
            say(
                f"The tracker {self._name} stopped ({first_line(error)}); the run goes on, its numbers are in its "
                "metrics.jsonl."
            )


def say(sentence: str) -> None:
    """One line on standard error, beside the results and the progress bar."""
    print(sentence, file=sys.stderr, flush=True)


def open_tracker(
    settings: TrackerSettings,
    *,
    config: Mapping[str, Any],
    experiment: str,
    group: str,
    name: str,
    run_id: str,
    tags: Sequence[str] = (),
) -> Tracker:
    """The tracker of one run. Nothing is imported, written or asked before there is something to keep.

    Args:
        settings: see :class:`TrackerSettings`.
        config: everything that decides the run's result, plain values.
        experiment: of the run.
        group: under which it is shown unless the settings name one.
        name: by which people know the run.
        run_id: the same for a resumed run, which goes on in its own curve, and for no other; letters, digits, hyphens.
        tags: besides the experiment and those of the settings.

    Returns:
        A tracker that never raises; of all processes of a run only the first one's keeps anything.
    """
    if not settings.active or not is_first():
        return NoTracker()
    identity = {
        "config": config,
        "experiment": experiment,
        "group": settings.group or group,
        "name": name,
        "run_id": run_id,
        "tags": [experiment, *tags, *settings.tags],
    }

    def open_backend(rows: Sequence[Row] | None) -> Tracker:
        # Only now, so that importing entreg imports neither.
        if settings.kind == "wandb":
            from entreg.tracking.wandb_backend import WandbTracker

            return WandbTracker(settings, rows=rows, **identity)
        from entreg.tracking.tensorboard_backend import TensorBoardTracker

        return TensorBoardTracker(settings, rows=rows, **identity)

    return CarefulTracker(open_backend, settings.kind)


@contextlib.contextmanager
def tracked(settings: TrackerSettings, **identity: Any) -> Iterator[Tracker]:
    """:func:`open_tracker` for the length of a block, finished as failed when the block ends with an exception."""
    tracker = open_tracker(settings, **identity)
    try:
        yield tracker
    except BaseException:
        tracker.finish(failed=True)
        raise
    tracker.finish(failed=False)
