"""The cost table on a record made by hand."""

from entreg.experiments.surrogate_cost_tables import regularizer_cost_table
from entreg.records.registry import discover
from entreg.records.tables import table_registry


def record(fraction: float) -> dict:
    def row(surrogate, tokens, cells, share):
        return {
            "surrogate": surrogate,
            "tokens": tokens,
            "dim": 64,
            "cells": cells,
            "seconds": share * 0.1,
            "fraction_of_block": share,
            "peak_bytes": 3 * 2**20,
            "peak_fraction_of_block": 0.25,
        }

    return {
        "id": "benchmark/regularizer_cost-abc",
        "experiment": "benchmark/regularizer_cost",
        "scale": "offline",
        "utc": "2026-01-01T00:00:00Z",
        "config": {"threads": 1, "batch": 8, "device": "cpu", "repeats": 7},
        "model": {"tokens": 197, "dim": 768, "heads": 12, "seconds": 0.1, "peak_bytes": 12 * 2**20},
        "metrics": {"largest_fraction_of_block": fraction},
        "rows": [row("ball", 10, 4, fraction), row("ball", 20, 4, 0.5), row("key_entropy", 10, None, 0.001)],
    }


def test_headline_rows_are_bold_and_the_verdict_follows_from_them():
    text = regularizer_cost_table([record(0.01)]).to_markdown()
    lines = [line for line in text.splitlines() if line.startswith("| ball") or line.startswith("| attention")]
    assert "**1 %**" in lines[0].replace("1.00", "1")
    assert "**" not in lines[1]
    assert "all rows" in lines[2]
    assert "3.0 MiB" in lines[0]
    assert "met." in text
    assert "missed." in regularizer_cost_table([record(0.03)]).to_markdown()


def test_it_is_registered_and_empty_without_records():
    discover()
    assert table_registry.get("regularizer-cost").function is regularizer_cost_table
    assert regularizer_cost_table([]) is None
