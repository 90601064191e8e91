"""How a user's fresh numbers compare with the committed reference, and what follows from it."""

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from entreg.errors import InputError
from entreg.records.formatting import MISSING, number, ratio
from entreg.records.tables import Table

Key = tuple[Any, ...]

# From this share of agreeing measurements on the whole counts as agreeing; our choice.
_MOST = 0.8


@dataclass(frozen=True)
class Basis:
    """What the compared numbers are, so that it can be said what a deviation means.

    Attributes:
        timed: whether they are ratios of times taken in turns within one run; otherwise they are computed, and no
            machine's speed or load changes them.
        verdicts: ids of the claims whose verdicts rest on them.
        deviates: of numbers that are computed, why they may deviate although nothing is wrong.
    """

    timed: bool
    verdicts: tuple[str, ...]
    deviates: str = ""


def compare_with_reference(
    new_records: Sequence[Mapping[str, Any]],
    reference_records: Sequence[Mapping[str, Any]],
    keys: Sequence[str],
    value: str,
    *,
    title: str = "Your numbers against the reference",
    tolerance: float = 0.25,
    text: Callable[[float], str] = number,
    basis: Basis | None = None,
) -> Table:
    """Puts the same measurement of two sets of records side by side.

    Args:
        new_records: the records just made.
        reference_records: the committed ones.
        keys: fields that say what was measured, looked up in each row and then in its record (``experiment``, ...).
            Rows with equal keys (rounds, seeds) are averaged.
        value: the row field to compare; rows without it are left out.
        title: the table's heading.
        tolerance: relative deviation up to which a row counts as agreeing.
        text: how to write a value.
        basis: what the numbers are; with it, a second sentence says what follows.

    Returns:
        A table of the keys, the value here, the reference and their ratio, in the order of the new rows, with a
        closing sentence that counts the agreeing rows; print it with :meth:`Table.to_text`.

    Raises:
        InputError: no row of ``new_records`` has all the keys and the value.
    """
    here = _averages(new_records, keys, value)
    reference = _averages(reference_records, keys, value)
    if not here:
        raise InputError(f"None of the new records has rows with {', '.join([*keys, value])}.")
    rows = []
    ratios = []
    for key, mean in here.items():
        other = reference.get(key)
        quotient = None
        if other is not None and other != 0.0:
            quotient = mean / other
            ratios.append(quotient)
        elif other == mean:
            ratios.append(1.0)
        rows.append(
            [
                *(part if isinstance(part, str | int) else str(part) for part in key),
                text(mean),
                "no reference" if other is None else text(other),
                MISSING if quotient is None else ratio(quotient),
            ]
        )
    notes = [_summary(ratios, tolerance)]
    if basis is not None and ratios:
        notes.append(_what_follows(ratios, tolerance, basis, _processors(new_records), _processors(reference_records)))
    return Table("comparison", title, [*keys, "here", "reference", "here / reference"], rows, notes)


def _summary(ratios: Sequence[float], tolerance: float) -> str:
    if not ratios:
        return "The reference holds none of these measurements."
    agreeing = _agreeing(ratios, tolerance)
    return (
        f"{agreeing} of {len(ratios)} measurements lie within {100 * tolerance:.0f} % of the reference; "
        f"median ratio {number(statistics.median(ratios))}."
    )


def _agreeing(ratios: Sequence[float], tolerance: float) -> int:
    return sum(1.0 / (1.0 + tolerance) <= value <= 1.0 + tolerance for value in ratios)


def _what_follows(
    ratios: Sequence[float], tolerance: float, basis: Basis, here: Sequence[str], there: Sequence[str]
) -> str:
    """Whether a deviation is the load, the machine or a fault, and which verdicts it touches."""
    verdicts = f"the verdict{'s' * (len(basis.verdicts) > 1)} on {', '.join(basis.verdicts)}"
    if _agreeing(ratios, tolerance) >= _MOST * len(ratios):
        return f"What follows: this run confirms the reference, and {verdicts} can be relied on."
    if not basis.timed:
        return (
            "What follows: these numbers are computed, so neither load nor a slower machine explains a deviation; "
            f"{basis.deviates}; with the reference's settings, processor and library versions a deviation is a fault, "
            f"please report it; {verdicts} must be read with that in mind."
        )
    machine = f"here as there {here[0]}" if list(here) == list(there) else f"{', '.join(here)}, not {', '.join(there)}"
    return (
        "What follows: nothing has failed, every exact answer was checked; only ratios of times within one run count, "
        "so a machine that is slower throughout changes none of them, but other processes at the same time do "
        f"({_load()}), and another processor does ({machine}); {verdicts} come from these ratios: where one differs "
        "from the README's, run again on an idle machine with force=true, and report it as a fault if it still differs "
        "on the reference's processor."
    )


def _load() -> str:
    """How busy the machine is as the sentence is written."""
    if not hasattr(os, "getloadavg"):
        return "the load is not known here"
    load, cores = os.getloadavg()[2], os.cpu_count() or 1
    busy = "which explains a deviation" if load > 1.25 * cores else "so it is not that"
    return f"in the last 15 minutes {load:.1f} wanted the {cores} cores, {busy}"


def _processors(records: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({record["device"]["cpu"] for record in records})


def _averages(records: Sequence[Mapping[str, Any]], keys: Sequence[str], value: str) -> dict[Key, float]:
    groups: dict[Key, list[float]] = {}
    for record in records:
        for row in record["rows"]:
            fields = {**record, **row}
            if any(name not in fields for name in keys) or row.get(value) is None:
                continue
            groups.setdefault(tuple(_hashable(fields[name]) for name in keys), []).append(float(row[value]))
    return {key: statistics.fmean(values) for key, values in groups.items()}


def _hashable(item: Any) -> Any:
    if isinstance(item, list | dict):
        return str(item)
    # A size written 1e6 in one configuration and 1000000 in another is the same size.
    return int(item) if isinstance(item, float) and item.is_integer() else item
