"""Parts of what an experiment prints when it is done; the same for every family of experiments."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from entreg.records.claims import QUICK, judge_all, load_claims
from entreg.records.reference import Basis, compare_with_reference
from entreg.records.registry import discover
from entreg.records.store import REFERENCE_ROOT, RecordStore
from entreg.records.tables import MISSING, Table, table_registry


def filled_tables(records: Sequence[Mapping[str, Any]], *, prefix: str = "", names: Sequence[str] = ()) -> list[str]:
    """Every registered table that the records fill, as text.

    Args:
        records: run records.
        prefix: of the names of the tables, in the order of the registry; or
        names: the tables themselves, in this order.
    """
    discover()
    entries = [table_registry.get(name) for name in names] or [
        entry for entry in table_registry.entries() if entry.name.startswith(prefix)
    ]
    parts = []
    for entry in entries:
        selected = entry.select([dict(record) for record in records])
        table = entry.function(selected) if selected else None
        if table is not None:
            parts.append(table.to_text())
    return parts


def comparison(
    records: Sequence[Mapping[str, Any]],
    store: str | Path,
    reference: str | Path,
    keys: Sequence[str],
    value: str,
    *,
    title: str,
    text: Callable[[float], str],
    basis: Basis,
    tolerance: float = 0.25,
    derive: Callable[[Mapping[str, Any]], dict[str, Any]] = dict,
) -> list[str]:
    """How fresh rows compare with those of the reference records of the same seeds, as a list of at most one text.

    Empty when the records are the reference, are smoke runs or hold no such value.

    Args:
        records: those of this call.
        store: the folder they lie in.
        reference: folder of the reference records.
        keys, value, title, text, basis, tolerance: see
            :func:`entreg.records.reference.compare_with_reference`; ``method`` among the keys is looked up in a
            record's configuration where the row has none.
        derive: applied to every record, fresh or reference, before they are compared; may add fields to its rows.
    """
    if Path(store).resolve() == Path(reference).resolve() or all(r["scale"] == "smoke" for r in records):
        return []
    records = [derive(record) for record in records]
    if not any(row.get(value) is not None for record in records for row in record["rows"]):
        return []
    seeds, experiments = {r["seed"] for r in records}, {r["experiment"] for r in records}
    committed = [
        {**({"method": r["config"]["method"]} if "method" in r["config"] else {}), **derive(r)}
        for r in RecordStore(reference).load_all()
        if r["seed"] in seeds and r["experiment"] in experiments
    ]
    table = compare_with_reference(
        records, committed, keys, value, title=title, text=text, tolerance=tolerance, basis=basis
    )
    return [table.to_text()]


def verdict_lines(records: Sequence[Mapping[str, Any]], prefixes: Sequence[str]) -> list[str]:
    """A table with one line per claim that the records give a verdict on, and where to read why; at most 100 columns.

    Args:
        records: those of this call.
        prefixes: beginnings of the identifiers of the claims to look at.
    """
    discover()
    claims = [claim for claim in load_claims() if claim.id.startswith(tuple(prefixes))]
    judged = [dict(record) for record in records if record["scale"] != "smoke"]
    reference = _reference_values()
    rows = [
        [
            claim.id,
            claim.paper_value,
            _without_interval(verdict.measured),
            reference.get(claim.id, MISSING),
            f"{verdict.short_words}, paper's scale" if scale == "paper" else verdict.short_words,
        ]
        for claim, at in zip(claims, judge_all(claims, judged), strict=True)
        for scale, verdict in at.items()
        if verdict.record_ids
    ]
    if not rows:
        return []
    quick = any(record["scale"] == QUICK for record in judged)
    where = [
        *(["This was a quick run; the reference's numbers come from whole studies."] if quick else []),
        "Why, rules and commands: results/tables/claims.md for the reference;",
        "for your own runs: make tables RECORDS=outputs/runs writes outputs/tables/claims.md.",
    ]
    columns = ["claim", "paper", "here", "reference", "verdict here"]
    return [Table("verdicts", "Verdicts on the paper's claims", columns, rows, where, "lllll").to_text()]


def _reference_values() -> dict[str, str]:
    """What the reference records gave offline, by claim, without its interval; empty where there is no such table."""
    path = REFERENCE_ROOT.parent / "tables" / "claims.csv"
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {row["id"]: _without_interval(row["here, offline"]) for row in csv.DictReader(file)}


def _without_interval(measured: str) -> str:
    return re.split(r" [\[±†]", measured)[0]
