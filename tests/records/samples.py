"""Small valid records for the tests of this folder."""

from collections.abc import Mapping, Sequence
from typing import Any

from entreg.records import new_record


def sample_record(
    experiment: str = "geometry/hull",
    scale: str = "offline",
    config: Mapping[str, Any] | None = None,
    rows: Sequence[Mapping[str, Any]] = ({"distribution": "square", "n": 1000, "seconds": 0.25},),
) -> dict[str, Any]:
    return new_record(
        experiment=experiment,
        scale=scale,
        config={"n": 1000, "seed": 0} if config is None else config,
        command="python scripts/geometry.py profile=offline",
        dataset={"name": "square", "points": 1000},
        model={"name": "EntropyNet", "parameters": 1234},
        seed=0,
        repeats=7,
        metrics={"speedup": 4.5, "interval": [4.0, 5.0], "by_name": {"é": None}},
        rows=rows,
        wall_seconds=1.5,
    )


def dated_record(*arguments: Any, **keywords: Any) -> dict[str, Any]:
    """A sample record that is the same at every call: pages show when a record was made."""
    return {**sample_record(*arguments, **keywords), "utc": "2026-01-02T03:04:05Z"}
