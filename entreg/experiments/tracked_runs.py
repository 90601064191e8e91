"""What the experiments of all families tell a tracker: who a run is, and pictures of what a sparse path keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from hydra.core.hydra_config import HydraConfig

from entreg.records.record import config_hash
from entreg.runs.multirun import is_multirun
from entreg.tracking import Tracker, TrackerSettings, tracked


class TrackedRun(Protocol):
    """A planned run as far as a tracker wants to know it; see :class:`entreg.experiments.studies.Run`."""

    config: Mapping[str, Any]
    tracker: TrackerSettings

    @property
    def experiment(self) -> str: ...

    @property
    def label(self) -> str: ...


def tracked_run(
    run: TrackedRun, *, config: Mapping[str, Any] | None = None, name: str | None = None
) -> contextlib.AbstractContextManager[Tracker]:
    """The tracker of a run for the length of a block.

    Its identifier is the configuration's hash, so that a resumed run goes on in its own curve. In a multirun it is
    grouped under the sweep's name, otherwise under the experiment's.

    Args:
        run: what is run.
        config: of a part of the run that has a curve of its own; None: the run's.
        name: of that part; None: the run's label.
    """
    config = run.config if config is None else config
    method = run.config.get("method")
    return tracked(
        run.tracker,
        config=config,
        experiment=run.experiment,
        name=name or run.label,
        group=Path(HydraConfig.get().sweep.dir).name if is_multirun() else run.experiment,
        run_id=config_hash(config),
        tags=[run.config["scale"], *([method] if method and name is None else [])],
    )
