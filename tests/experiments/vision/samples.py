"""Records of vision runs made by hand, for the tests of their study, tables and claims."""

from typing import Any

from entreg.records.record import new_record

PLANS = {
    "setting_a": {"kind": "tokens", "keep": 14, "before_layer": 1, "scores": ["mixed", "received"]},
    "tokens": {"kind": "tokens", "before_layer": 0, "levels": [0.5, 0.9]},
}


def accuracies(plan: str, split: str, top1: float, **more: Any) -> dict[str, Any]:
    """One row of accuracy; ``mixed`` dropping of 80 % unless told otherwise."""
    choice = {"level": None, "reduction": "drop", "score": "mixed"}
    if plan == "dense":
        choice = {"level": None, "reduction": None, "score": None}
    sparsity = 0.0 if plan == "dense" else 0.8
    return {"plan": plan, "split": split, **choice, "sparsity": sparsity, "top1": top1, **more}


def overlaps(split: str, score: str, layer: int | str, iou: float, random: float = 0.125) -> dict[str, Any]:
    """One row of overlap with the masks."""
    return {
        "plan": "localisation",
        "split": split,
        "level": None,
        "reduction": None,
        "score": score,
        "layer": layer,
        "iou_matched": iou,
        "iou_random": random,
    }


def corrupted(corruption: str, severity: int, error: float, setting: str = "dense") -> dict[str, Any]:
    """One row of error on corrupted images."""
    return {
        "plan": "robustness",
        "split": "test",
        "level": None,
        "reduction": None,
        "score": None,
        "setting": setting,
        "corruption": corruption,
        "severity": severity,
        "error": error,
    }


def vision_record(
    method: str,
    seed: int,
    rows: list[dict[str, Any]],
    *,
    experiment: str = "vit/digit_scenes",
    scale: str = "offline",
    utc: str = "2026-01-01T00:00:00Z",
    plans: dict[str, Any] = PLANS,
    **metrics: Any,
) -> dict[str, Any]:
    """A valid record of one method and seed."""
    record = new_record(
        experiment=experiment,
        scale=scale,
        config={"method": method, "seed": seed, "evaluation": {"plans": plans}},
        command="python scripts/vision.py",
        dataset={"name": "digit_scenes"},
        seed=seed,
        repeats=1,
        metrics=metrics,
        rows=rows,
        wall_seconds=1.0,
    )
    return {**record, "utc": utc}


def setting_a(validation: float, test: float, dense: float = 0.95) -> list[dict[str, Any]]:
    """Rows of a run under setting A, dense and sparse."""
    return [
        accuracies("dense", "validation", dense),
        accuracies("dense", "test", dense),
        accuracies("setting_a", "validation", validation),
        accuracies("setting_a", "test", test),
    ]
