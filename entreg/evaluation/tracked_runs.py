"""What the experiments of all families tell a tracker: who a run is, and pictures of what a sparse path keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from hydra.core.hydra_config import HydraConfig
from torch import nn

from entreg.errors import first_line
from entreg.evaluation.vision_evaluation import expand_plans
from entreg.evaluation.vision_overlays import overlays
from entreg.records.record import config_hash
from entreg.records.vision_overlay_figures import scenes_figure
from entreg.runs.multirun import is_multirun
from entreg.tracking import Tracker, TrackerSettings, say, tracked

_MOST_COLUMNS = 6


class TrackedRun(Protocol):
    """A planned run as far as a tracker wants to know it; see :class:`entreg.evaluation.studies.Run`."""

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


def track_overlays(
    tracker: Tracker,
    model: nn.Module,
    dataset: Any,
    evaluation: Mapping[str, Any],
    *,
    count: int,
    gate: nn.ModuleDict | None,
    step: int,
) -> None:
    """A picture of the first images and of what becomes of their patches under token plans.

    Like a tracker, it never raises into a run.

    Args:
        tracker: of the run.
        model: stock timm model, on its device.
        dataset: a split, see :func:`entreg.evaluation.vision_overlays.overlays`.
        evaluation: the resolved ``evaluation`` part; the first score of each plan and reduction is shown.
        count: images; cut to those that there are.
        gate: of a model trained with one.
        step: finished steps.
    """
    if not tracker.active or count == 0:
        return
    try:
        picture = _picture(model, dataset, evaluation, count, gate)
    except Exception as error:
        say(f"What sparse paths keep is not tracked ({first_line(error)}); the run goes on.")
    else:
        if picture is not None:
            tracker.image("overlays", picture, step)


def _picture(
    model: nn.Module, dataset: Any, evaluation: Mapping[str, Any], count: int, gate: nn.ModuleDict | None
) -> np.ndarray | None:
    """(h, w, 3) uint8; None where no plan chooses tokens."""
    chosen: dict[tuple[Any, Any], tuple[Any, Any]] = {}
    for names, mapping in expand_plans(evaluation["plans"]):
        if mapping["kind"] == "tokens" and "entropy_budget" not in mapping and names["score"] != "gate":
            chosen.setdefault((names["plan"], names["reduction"]), (names, mapping))
    if not chosen:
        return None
    plans = list(chosen.values())[:_MOST_COLUMNS]
    found = overlays(model, dataset, min(count, len(dataset)), plans, precision=evaluation["precision"], gate=gate)
    columns = [(words.replace(" ", "\n", 1), found, plan) for words, plan in found["plans"].items()]
    canvas = scenes_figure(found, columns).canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
