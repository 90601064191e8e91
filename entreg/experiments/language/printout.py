"""What the language experiments print when they are done: tables, a comparison with the reference, verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entreg.experiments.printing import comparison, filled_tables, verdict_lines
from entreg.records.formatting import ratio
from entreg.records.reference import Basis
from entreg.records.store import REFERENCE_ROOT

KEYS = ("experiment", "method", "task", "plan", "level", "context", "split")
_LOSSES = Basis(
    timed=False,
    verdicts=("llm-ppl", "llm-rouge"),
    deviates="the ten-minute version reads fewer texts than the reference, and single texts differ by several per cent",
)


def report(records: Sequence[Mapping[str, Any]], store: str | Path, reference: str | Path = REFERENCE_ROOT) -> str:
    """Tables of the records, what sparsity costs here and in the reference, and the claims' verdicts.

    Args:
        records: those of this call.
        store: the folder they lie in; the reference is not compared with itself.
        reference: folder of the reference records.

    Returns:
        Text for a terminal.
    """
    parts = filled_tables(records, prefix="llm-")
    here = [{**record, "method": record["config"]["method"]} for record in records]
    parts += comparison(
        here,
        store,
        reference,
        KEYS,
        "ratio_to_dense",
        title="Perplexity over dense (copy: that of the second copy), here and in the reference",
        text=lambda value: ratio(value, 4),
        tolerance=0.02,
        basis=_LOSSES,
        derive=with_ratios,
    )
    parts += verdict_lines(records, ("llm-",))
    return "\n".join([*parts, f"{len(records)} language records in {store}"])


def with_ratios(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with ``ratio_to_dense`` in the rows of sparse plans that have a loss.

    Losses themselves differ with the number of windows, which profiles choose; the ratio hardly does.
    """

    def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return row["task"], row["context"], row["split"]

    dense = {place(row): row["loss"] for row in record["rows"] if row.get("plan") == "dense" and "loss" in row}
    rows = [
        {**row, "ratio_to_dense": math.exp(row["loss"] - dense[place(row)])}
        if "loss" in row and row["plan"] != "dense"
        else dict(row)
        for row in record["rows"]
    ]
    return {**record, "rows": rows}
