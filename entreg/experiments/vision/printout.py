"""What the vision experiments print when they are done: tables, a comparison with the reference, verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entreg.experiments.printing import comparison, filled_tables, verdict_lines
from entreg.records.formatting import percent
from entreg.records.reference import Basis
from entreg.records.store import REFERENCE_ROOT

KEYS = ("experiment", "method", "split", "plan", "score", "level")
_ACCURACIES = Basis(
    timed=False,
    verdicts=("vit-top1", "vit-l1", "cifar-mce"),
    deviates="models are trained anew, and on another processor or from another dense model their weights differ, "
    "which moves the accuracy on some hundred images by a few per cent",
)


def report(records: Sequence[Mapping[str, Any]], store: str | Path, reference: str | Path = REFERENCE_ROOT) -> str:
    """Tables of the records, how their accuracies compare with the reference, and the claims' verdicts.

    Args:
        records: those of this call.
        store: the folder they lie in; the reference is not compared with itself.
        reference: folder of the reference records.

    Returns:
        Text for a terminal.
    """
    parts = [text for prefix in ("vision-", "cifar-") for text in filled_tables(records, prefix=prefix)]
    here = [{**record, "method": record["config"]["method"]} for record in records if "method" in record["config"]]
    parts += comparison(
        here,
        store,
        reference,
        KEYS,
        "top1",
        title="Accuracies here and in the reference",
        text=percent,
        tolerance=0.02,
        basis=_ACCURACIES,
    )
    parts += verdict_lines(records, ("vit-", "cifar-", "train-", "amortise"))
    return "\n".join([*parts, f"{len(records)} vision records in {store}"])
