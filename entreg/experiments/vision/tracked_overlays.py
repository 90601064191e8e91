"""Pictures of what sparse plans keep of an image, for a run's tracker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from entreg.errors import first_line
from entreg.experiments.vision.evaluation import expand_plans
from entreg.experiments.vision.overlay_figures import scenes_figure
from entreg.experiments.vision.overlays import overlays
from entreg.tracking import Tracker, say

_MOST_COLUMNS = 6


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
        dataset: a split, see :func:`entreg.experiments.vision.overlays.overlays`.
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
