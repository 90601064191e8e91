"""Access to the records of a vision study by method, seed and plan, with selection scores chosen on validation."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from entreg.experiments.method_names import LABELS

L1_METHODS = ("l1_logits", "l1_gate")


def ours_for(plan: str, methods: Sequence[str]) -> str | None:
    """The method that stands for this project under a plan: ``ours_<letter>`` of its setting, else ``ours``."""
    for name in (f"ours_{plan[-1]}", "ours"):
        if name in methods:
            return name
    return None


class VisionStudy:
    """Rows of ``vit/...`` or ``cifar/...`` records of one experiment.

    Args:
        records: of one experiment and scale; where a method and seed has several (another commit or setting), the
            newest counts.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        newest: dict[tuple[str, int], Mapping[str, Any]] = {}
        for record in sorted(records, key=lambda one: one["utc"]):
            newest[record["config"]["method"], record["seed"]] = record
        self.records = newest
        self.methods = list(dict.fromkeys(method for method, _ in newest))
        self.methods.sort(key=_place)

    @property
    def record_ids(self) -> list[str]:
        """Identifiers of the records that are used."""
        return sorted(record["id"] for record in self.records.values())

    def ids_of(self, *methods: str | None) -> list[str]:
        """Identifiers of the records of some methods; those that were not run, and None, add nothing."""
        return [record["id"] for (method, _), record in self.records.items() if method in methods]

    def seeds(self, method: str) -> list[int]:
        """Seeds that the method was run with."""
        return sorted(seed for name, seed in self.records if name == method)

    def levels(self, plan: str) -> list[float | None]:
        """Levels of sparsity at which a plan was evaluated."""
        found = {row.get("level") for record in self.records.values() for row in record["rows"] if row["plan"] == plan}
        return sorted(found, key=lambda level: -1.0 if level is None else level)

    def best_choice(self, method: str, plan: str, level: float | None = None) -> tuple[str | None, str | None] | None:
        """Reduction and selection score with the highest mean validation accuracy of a method under a plan.

        Only what was evaluated for the most seeds is compared.
        """
        found: dict[tuple[str | None, str | None], list[float]] = {}
        for _, row in self._rows(method, self.seeds(method), "validation", plan, level):
            found.setdefault((row.get("reduction"), row["score"]), []).append(row["top1"])
        most = max(map(len, found.values()), default=0)
        means = {choice: statistics.fmean(values) for choice, values in found.items() if len(values) == most}
        return max(means, key=means.get) if means else None

    def values(
        self,
        method: str,
        plan: str,
        field: str = "top1",
        *,
        level: float | None = None,
        split: str = "test",
        seeds: Sequence[int] | None = None,
    ) -> list[float]:
        """A field of a method under a plan, one value per seed, with the choice that is best on validation."""
        found = self._by_seed(method, plan, field, level, split)
        return [value for seed, value in found.items() if seeds is None or seed in seeds]

    def values_of_choice(
        self,
        method: str,
        plan: str,
        choice: tuple[str | None, str | None],
        field: str = "top1",
        *,
        level: float | None = None,
        split: str = "test",
    ) -> list[float]:
        """A field of a method under a plan with a given reduction and score, one value per seed that has it."""
        return [
            row[field]
            for _, row in self._rows(method, self.seeds(method), split, plan, level)
            if (row.get("reduction"), row["score"]) == choice
        ]

    def choices(self, method: str, plan: str, level: float | None = None) -> list[tuple[str | None, str | None]]:
        """Pairs of reduction and selection score with which a method was tested under a plan, in order."""
        rows = self._rows(method, self.seeds(method), "test", plan, level)
        return list(dict.fromkeys((row.get("reduction"), row["score"]) for _, row in rows))

    def pairs(
        self, first: str, second: str, plan: str, *, level: float | None = None
    ) -> tuple[list[float], list[float]]:
        """Test accuracies of two methods under a plan, seed by seed, of the seeds that both have."""
        return self.shared((first, plan), (second, plan), level=level)

    def shared(
        self, first: tuple[str, str], second: tuple[str, str], *, level: float | None = None
    ) -> tuple[list[float], list[float]]:
        """Test accuracies of two pairs of method and plan, seed by seed, of the seeds that both have."""
        own, other = (self._by_seed(method, plan, "top1", level, "test") for method, plan in (first, second))
        return _shared(own, other)

    def localisation(self, method: str, scores: Sequence[str] | None = None) -> dict[str, Any] | None:
        """Matched-area overlap at the score (of these, or any) and layer that are best on validation.

        Returns:
            ``score``, ``layer``, ``seeds``, and per seed ``iou`` and ``random`` on the test images; None without
            measurements.
        """
        totals: dict[tuple[str, int | str], list[float]] = {}
        for seed in self.seeds(method):
            for row in self.records[method, seed]["rows"]:
                wanted = scores is None or row["score"] in scores
                if row["plan"] == "localisation" and row["split"] == "validation" and wanted:
                    totals.setdefault((row["score"], row["layer"]), []).append(row["iou_matched"])
        if not totals:
            return None
        score, layer = max(totals, key=lambda key: statistics.fmean(totals[key]))
        found: dict[str, Any] = {"score": score, "layer": layer, "seeds": [], "iou": [], "random": []}
        for seed in self.seeds(method):
            for row in self.records[method, seed]["rows"]:
                if (row["plan"], row["split"], row["score"], row.get("layer")) == (
                    "localisation",
                    "test",
                    score,
                    layer,
                ):
                    found["seeds"].append(seed)
                    found["iou"].append(row["iou_matched"])
                    found["random"].append(row["iou_random"])
        return found

    def corruption_errors(self, method: str, plan: str) -> list[float]:
        """Mean corruption error of a method, ``plan`` dense or sparse, one value per seed."""
        return list(self._corruption_errors_by_seed(method, plan).values())

    def corruption_error_pairs(self, first: str, second: str, plan: str = "dense") -> tuple[list[float], list[float]]:
        """Mean corruption errors of two methods, dense or sparse, seed by seed, of the seeds that both have."""
        return _shared(*(self._corruption_errors_by_seed(method, plan) for method in (first, second)))

    def errors_by_corruption(self, method: str) -> dict[str, float]:
        """Dense error per corruption, mean over severities and seeds."""
        groups: dict[str, list[float]] = {}
        for seed in self.seeds(method):
            for row in self.records[method, seed]["rows"]:
                if row["plan"] == "robustness" and row["setting"] == "dense":
                    groups.setdefault(row["corruption"], []).append(row["error"])
        return {name: statistics.fmean(values) for name, values in groups.items()}

    def _rows(
        self, method: str, seeds: Sequence[int], split: str, plan: str, level: float | None
    ) -> Iterable[tuple[int, Mapping[str, Any]]]:
        for seed in seeds:
            for row in self.records[method, seed]["rows"]:
                if row["split"] == split and row["plan"] == plan and row.get("level") == level:
                    yield seed, row

    def _by_seed(self, method: str, plan: str, field: str, level: float | None, split: str) -> dict[int, float]:
        choice = self.best_choice(method, plan, level)
        return {
            seed: row[field]
            for seed, row in self._rows(method, self.seeds(method), split, plan, level)
            if (row.get("reduction"), row["score"]) == choice and row.get(field) is not None
        }

    def _corruption_errors_by_seed(self, method: str, plan: str) -> dict[int, float]:
        found = {seed: self.records[method, seed]["metrics"].get(f"mce_{plan}") for seed in self.seeds(method)}
        return {seed: value for seed, value in found.items() if value is not None}


def _shared(first: Mapping[int, float], second: Mapping[int, float]) -> tuple[list[float], list[float]]:
    seeds = [seed for seed in first if seed in second]
    return [first[seed] for seed in seeds], [second[seed] for seed in seeds]


def _place(method: str) -> tuple[int, str]:
    order = list(LABELS)
    return (order.index(method) if method in order else len(order), method)
