"""How a user's fresh numbers compare with the committed reference."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from entreg.errors import InputError
from entreg.records.formatting import MISSING, number, ratio
from entreg.records.tables import Table

Key = tuple[Any, ...]


def compare_with_reference(
    new_records: Sequence[Mapping[str, Any]],
    reference_records: Sequence[Mapping[str, Any]],
    keys: Sequence[str],
    value: str,
    *,
    title: str = "Your numbers against the reference",
    tolerance: float = 0.25,
    text: Callable[[float], str] = number,
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
    return Table(
        "comparison", title, [*keys, "here", "reference", "here / reference"], rows, [_summary(ratios, tolerance)]
    )


def _summary(ratios: Sequence[float], tolerance: float) -> str:
    if not ratios:
        return "The reference holds none of these measurements."
    agreeing = sum(1.0 / (1.0 + tolerance) <= value <= 1.0 + tolerance for value in ratios)
    return (
        f"{agreeing} of {len(ratios)} measurements lie within {100 * tolerance:.0f} % of the reference; "
        f"median ratio {number(statistics.median(ratios))}."
    )


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
