"""What the geometry experiment prints when it is done: tables, a comparison with the reference, verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entreg.evaluation.geometry_methods import ADVISE, OURS, REWRITE, REWRITE_FREE
from entreg.records.claims import judge_all, load_claims
from entreg.records.comparison import compare_with_reference
from entreg.records.formatting import percent, ratio
from entreg.records.registry import discover
from entreg.records.store import REFERENCE_ROOT, RecordStore
from entreg.records.tables import table_registry

KEYS = ("experiment", "distribution", "n", "method")
_SUMMARIES = (
    "geometry-net-hull",
    "geometry-net-triangulation",
    "geometry-net-pareto-front",
    "geometry-sensitivity",
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
    discover()
    records = [dict(record) for record in records]
    parts = []
    for name in _SUMMARIES:
        entry = table_registry.get(name)
        selected = entry.select(records)
        if selected:
            parts.append(entry.function(selected).to_text())
    same_seeds = {record["seed"] for record in records}
    if Path(store).resolve() != Path(reference).resolve() and any(r["scale"] != "smoke" for r in records):
        committed = [r for r in RecordStore(reference).load_all("geometry/") if r["seed"] in same_seeds]
        for value, methods, title, text in (
            ("speedup", (OURS, REWRITE, REWRITE_FREE, ADVISE), "Speed-ups here and in the reference", ratio),
            ("area_error", (REWRITE,), "Area errors here and in the reference", percent),
        ):
            here = _key_rows(records, methods)
            if any(record["rows"] for record in here):
                parts.append(compare_with_reference(here, committed, KEYS, value, title=title, text=text).to_text())
    claims = [claim for claim in load_claims() if claim.id.startswith("geo-")]
    judged = [record for record in records if record["scale"] != "smoke"]
    lines = [
        f"{claim.id}: {claim.claim}, paper {claim.paper_value}; here {verdict.measured}: "
        f"{verdict.verdict.upper()} ({scale}). {verdict.reason}"
        for claim, at in zip(claims, judge_all(claims, judged), strict=True)
        for scale, verdict in at.items()
        if verdict.record_ids
    ]
    return "\n".join([*parts, *lines, f"{len(records)} geometry records in {store}"])


def _key_rows(records: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> list[dict[str, Any]]:
    """The records of the main experiments with the rows of these methods at each record's largest size."""
    kept = []
    for record in records:
        if record["experiment"] != "geometry/sensitivity":
            largest = record["config"]["sizes"][-1]
            rows = [row for row in record["rows"] if row["method"] in methods and row["n"] == largest]
            kept.append({**record, "rows": rows})
    return kept
