"""Access to the records of a vision study by method, seed and plan, with selection scores chosen on validation."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LABELS = {
    "plain": "plain",
    "label_smoothing": "label smoothing",
    "row_entropy": "row entropy",
    "key_entropy": "key entropy",
    "selection_entropy": "selection entropy",
    "ball": "ball entropy, as published",
    "halfspace": "halfspace entropy, as published",
    "rate_distortion": "ball entropy with distortion",
    "l1_logits": "L1 on logits",
    "l1_gate": "L1 gate",
}

L1_METHODS = ("l1_logits", "l1_gate")


def label(method: str) -> str:
    """What tables and figures call a method."""
    return LABELS.get(method, method.replace("_", " "))


def is_ours(method: str) -> bool:
    """Whether a method trains with an entropy of this project's reading of the paper."""
    return method.startswith("ours") or method.endswith("_entropy")


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

    def seeds(self, method: str) -> list[int]:
        """Seeds that the method was run with."""
        return sorted(seed for name, seed in self.records if name == method)

    def shared_seeds(self, first: str, second: str) -> list[int]:
        """Seeds that both methods were run with."""
        return sorted(set(self.seeds(first)) & set(self.seeds(second)))

    def levels(self, plan: str) -> list[float | None]:
        """Levels of sparsity at which a plan was evaluated."""
        found = {row.get("level") for record in self.records.values() for row in record["rows"] if row["plan"] == plan}
        return sorted(found, key=lambda level: -1.0 if level is None else level)

    def best_choice(self, method: str, plan: str, level: float | None = None) -> tuple[str | None, str | None] | None:
        """Reduction and selection score with the highest mean validation accuracy of a method under a plan."""
        sums: dict[tuple[str | None, str | None], float] = {}
        for row in self._rows(method, self.seeds(method), "validation", plan, level):
            choice = (row.get("reduction"), row["score"])
            sums[choice] = sums.get(choice, 0.0) + row["top1"]
        return max(sums, key=sums.get) if sums else None

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
        choice = self.best_choice(method, plan, level)
        rows = self._rows(method, self.seeds(method) if seeds is None else seeds, split, plan, level)
        return [
            row[field] for row in rows if (row.get("reduction"), row["score"]) == choice and row.get(field) is not None
        ]

    def localisation(self, method: str, scores: Sequence[str] | None = None) -> dict[str, Any] | None:
        """Matched-area overlap at the score (of these, or any) and layer that are best on validation.

        Returns:
            ``score``, ``layer``, and per seed ``iou`` and ``random`` on the test images; None without measurements.
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
        found: dict[str, Any] = {"score": score, "layer": layer, "iou": [], "random": []}
        for seed in self.seeds(method):
            for row in self.records[method, seed]["rows"]:
                if (row["plan"], row["split"], row["score"], row.get("layer")) == (
                    "localisation",
                    "test",
                    score,
                    layer,
                ):
                    found["iou"].append(row["iou_matched"])
                    found["random"].append(row["iou_random"])
        return found

    def corruption_errors(self, method: str, plan: str, seeds: Sequence[int] | None = None) -> list[float]:
        """Mean corruption error of a method, ``plan`` dense or sparse, one value per seed."""
        chosen = self.seeds(method) if seeds is None else seeds
        found = [self.records[method, seed]["metrics"].get(f"mce_{plan}") for seed in chosen]
        return [value for value in found if value is not None]

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
    ) -> Iterable[Mapping[str, Any]]:
        for seed in seeds:
            for row in self.records[method, seed]["rows"]:
                if row["split"] == split and row["plan"] == plan and row.get("level") == level:
                    yield row


def _place(method: str) -> tuple[int, str]:
    order = list(LABELS)
    return (order.index(method) if method in order else len(order), method)
