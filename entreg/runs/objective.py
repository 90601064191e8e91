"""The one number that a search makes large or small, and by which runs are told apart while a sweep goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from entreg.errors import ConfigError
from entreg.names import require_choice

_DIRECTIONS = ("maximize", "minimize")
_KEYS = ("name", "value", "where", "direction")


@dataclass(frozen=True)
class Objective:
    """A number of a record.

    Attributes:
        name: of the configuration in ``configs/objective``.
        value: of a record's rows the number with this name; their mean.
        where: the rows that count, by their other values; None: ``value`` names one of the record's metrics.
        direction: ``maximize`` or ``minimize``.
    """

    name: str
    value: str
    where: Mapping[str, Any] | None
    direction: str

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Objective:
        """From the content of a file in ``configs/objective``.

        Raises:
            ConfigError: an unknown or missing key, or another direction.
        """
        if set(values) != set(_KEYS):
            raise ConfigError(f"an objective has the keys {', '.join(_KEYS)}, got {', '.join(sorted(values))}")
        values = {**values, "where": None if values["where"] is None else dict(values["where"])}
        require_choice("objective.direction", values["direction"], _DIRECTIONS)
        return cls(**values)

    def of(self, records: Sequence[Mapping[str, Any]]) -> float | None:
        """Its mean over the records, or None if one of them has no such number."""
        values = [self._of_one(record) for record in records]
        return None if not values or None in values else fmean(values)

    def best(self, values: Sequence[float]) -> float:
        """The best of at least one value."""
        return max(values) if self.direction == "maximize" else min(values)

    def _of_one(self, record: Mapping[str, Any]) -> float | None:
        if self.where is None:
            found = [record["metrics"].get(self.value)]
        else:
            rows = [row for row in record["rows"] if all(row.get(key) == one for key, one in self.where.items())]
            found = [row.get(self.value) for row in rows]
        if not found or any(isinstance(one, bool) or not isinstance(one, int | float) for one in found):
            return None
        mean = fmean(found)
        return mean if math.isfinite(mean) else None
