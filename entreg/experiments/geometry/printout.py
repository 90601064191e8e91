"""What the geometry experiment prints when it is done: tables, a comparison with the reference, verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entreg.experiments.geometry.methods import ADVISE, OURS, REWRITE, REWRITE_FREE
from entreg.experiments.printing import comparison, filled_tables, verdict_lines
from entreg.records.formatting import percent, ratio
from entreg.records.reference import Basis
from entreg.records.store import REFERENCE_ROOT

KEYS = ("experiment", "distribution", "n", "method")
_SUMMARIES = (
    "geometry-net-hull",
    "geometry-net-triangulation",
    "geometry-net-pareto-front",
    "geometry-sensitivity",
)
_SPEEDS = Basis(timed=True, verdicts=("geo-hull-speed", "geo-tri-speed", "geo-v1-speed"))
_ERRORS = Basis(
    timed=False,
    verdicts=("geo-error",),
    deviates="the network is trained anew, and on another processor its weights may differ",
)


def report(records: Sequence[Mapping[str, Any]], store: str | Path, reference: str | Path = REFERENCE_ROOT) -> str:
    """Summary tables of the records, how the learned rows compare with the reference, and the claims' verdicts.

    Args:
        records: those of this call.
        store: the folder they lie in; the reference is not compared with itself.
        reference: folder of the reference records.

    Returns:
        Text for a terminal.
    """
    parts = filled_tables(records, names=_SUMMARIES)
    for value, methods, title, text, basis in (
        ("speedup", (OURS, REWRITE, REWRITE_FREE, ADVISE), "Speed-ups here and in the reference", ratio, _SPEEDS),
        ("area_error", (REWRITE,), "Area errors here and in the reference", percent, _ERRORS),
    ):
        here = _key_rows(records, methods)
        parts += comparison(here, store, reference, KEYS, value, title=title, text=text, basis=basis)
    parts += verdict_lines(records, ("geo-",))
    return "\n".join([*parts, f"{len(records)} geometry records in {store}"])


def _key_rows(records: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> list[dict[str, Any]]:
    """The records of the main experiments with the rows of these methods at each record's largest size."""
    kept = []
    for record in records:
        if record["experiment"] != "geometry/sensitivity":
            largest = record["config"]["sizes"][-1]
            rows = [row for row in record["rows"] if row["method"] in methods and row["n"] == largest]
            kept.append({**record, "rows": rows})
    return kept
