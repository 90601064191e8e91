"""What of a finished record goes to a tracker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from entreg.tracking.tracker import Row, Tracker


def track_record(tracker: Tracker, record: Mapping[str, Any]) -> None:
    """The record's measurements as tables, its scalar metrics as numbers of the whole run.

    Args:
        tracker: of the run.
        record: as :func:`entreg.records.record.new_record` makes it.
    """
    for name, rows in record_tables(record).items():
        tracker.table(name, rows)
    metrics = {
        f"result/{key}": value
        for key, value in record["metrics"].items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    tracker.summary({**metrics, "result/wall_seconds": record["wall_seconds"]})


def record_tables(record: Mapping[str, Any]) -> dict[str, list[Row]]:
    """The rows of a record by what they measure.

    Returns:
        ``sparsity_<task>`` of a language model's tasks, ``sparsity_accuracy`` of a vision model's plans, what else was
        measured under its own name, ``methods`` of a geometry run.
    """
    tables: dict[str, list[Row]] = {}
    for row in record["rows"]:
        if "task" in row:
            name = f"sparsity_{row['task']}"
        elif "sparsity" in row:
            name = "sparsity_accuracy"
        else:
            name = row.get("plan", "methods")
        tables.setdefault(name, []).append(row)
    return tables
