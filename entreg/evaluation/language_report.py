"""What the language experiments print when they are done: tables, a comparison with the reference, verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entreg.evaluation.reporting import comparison, filled_tables, verdict_lines
from entreg.records.formatting import number, percent
from entreg.records.store import REFERENCE_ROOT

KEYS = ("experiment", "method", "task", "plan", "level", "context", "split")


def report(records: Sequence[Mapping[str, Any]], store: str | Path, reference: str | Path = REFERENCE_ROOT) -> str:
    """Tables of the records, how their numbers compare with the reference, and the claims' verdicts.

    Args:
        records: those of this call.
        store: the folder they lie in; the reference is not compared with itself.
        reference: folder of the reference records.

    Returns:
        Text for a terminal.
    """
    parts = filled_tables(records, prefix="llm-")
    here = [{**record, "method": record["config"]["method"]} for record in records]
    for value, text, title in (
        ("loss", number, "Losses (nats per token) here and in the reference"),
        ("accuracy", percent, "Needle retrieval here and in the reference"),
        ("rouge_l", number, "ROUGE-L here and in the reference"),
    ):
        parts += comparison(here, store, reference, KEYS, value, title=title, text=text, tolerance=0.02)
    parts += verdict_lines(records, ("llm-",))
    return "\n".join([*parts, f"{len(records)} language records in {store}"])
