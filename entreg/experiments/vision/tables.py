"""Tables of the vision experiments: what sparsity costs each method, overlap with masks, robustness."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from entreg.experiments.method_names import label
from entreg.experiments.vision.study import VisionStudy, ours_for
from entreg.records.formatting import p_value
from entreg.records.record import SCALES
from entreg.records.statistics import DifferenceTest, Estimate, holm_by_name, mean_and_interval, paired_test
from entreg.records.tables import MISSING, Table, TracedRow, estimate, number, register_table

SETTINGS = {"setting_a": "A", "setting_b": "B"}
"""Plans under which the plain model loses at least five points, chosen on validation."""

VIT = ("vit/digit_scenes", "vit/imagenet")

PAPER = ("vit/imagenet", "cifar/cifar100")
"""Experiments on the paper's own data."""


def points(value: Estimate | None) -> str:
    """Accuracy or its difference in points, with the interval."""
    if value is None:
        return MISSING
    scaled = Estimate(
        100 * value.mean,
        None if value.low is None else 100 * value.low,
        None if value.high is None else 100 * value.high,
        value.count,
    )
    return estimate(scaled)


def accuracy(study: VisionStudy, method: str, plan: str, **chosen: Any) -> Estimate | None:
    """Mean accuracy over the seeds, or None when the method was not run so."""
    values = study.values(method, plan, **chosen)
    return mean_and_interval(values) if values else None


def advantage(
    study: VisionStudy, ours: str, rival: str, plan: str, level: float | None = None
) -> DifferenceTest | None:
    """Our accuracy minus the rival's under one plan, tested in pairs over shared seeds."""
    first, second = study.pairs(ours, rival, plan, level=level)
    return paired_test(first, second) if first else None


def difference_cells(
    tests: Mapping[str, DifferenceTest | None], method: str, text: Callable[[Estimate], str] = points
) -> list[str]:
    """Two cells: a method's difference, and its p-value after Holm's correction over all of ``tests``."""
    test, adjusted = tests.get(method), holm_by_name(tests)
    return [text(test.difference) if test else MISSING, p_value(adjusted.get(method))]


TESTED = "p: paired t test over the seeds, after Holm's correction for all rows of the column."


def main_study(records: Sequence[Mapping[str, Any]]) -> VisionStudy | None:
    """The study of the largest scale at hand, the paper's own data first: tables never mix data sets or scales."""
    groups: dict[tuple[int, bool, str], list[Mapping[str, Any]]] = {}
    for record in records:
        if "method" in record["config"]:
            name = record["experiment"]
            groups.setdefault((SCALES.index(record["scale"]), name in PAPER, name), []).append(record)
    return VisionStudy(groups[max(groups)]) if groups else None


def settings_table(
    plan: str, records: Sequence[Mapping[str, Any]], *, name: str | None = None, title: str = ""
) -> Table | None:
    """Every method under one plan: dense and sparse accuracy, what sparsity costs, and ours against it.

    Args:
        plan: one of :data:`SETTINGS`.
        records: of one or more experiments; those of the main study count.
        name: of the table; None: ``vision-setting-`` and the letter.
        title: of the table, before what the setting is.
    """
    study = main_study(records)
    if study is None:
        return None
    ours = ours_for(plan, study.methods)
    shown = [method for method in study.methods if _belongs(method, plan)]
    tests = {method: advantage(study, ours, method, plan) for method in shown if ours and method != ours}
    rows = []
    for method in shown:
        sparse = accuracy(study, method, plan)
        if sparse is None:
            continue
        seeds = study.seeds(method)
        dense_plain = study.values("plain", "dense", seeds=[s for s in seeds if s in study.seeds("plain")])
        dense = accuracy(study, method, "dense")
        lost = statistics.fmean(dense_plain) - sparse.mean if dense_plain else None
        cells = [
            f"**{label(method)}**" if method == ours else label(method),
            points(dense),
            points(sparse),
            MISSING if lost is None else number(100 * lost),
            ", ".join(word for word in study.best_choice(method, plan) if word),
            *difference_cells(tests, method),
            len(seeds),
        ]
        rows.append(TracedRow(cells, study.ids_of(method, "plain", ours)))
    if not rows:
        return None
    settings = next(
        found
        for record in study.records.values()
        if (found := record["config"]["evaluation"]["plans"].get(plan)) is not None
    )
    found = [row["sparsity"] for record in study.records.values() for row in record["rows"] if row["plan"] == plan]
    # Scores that look at fewer rows save more.
    sparsity = " to ".join(dict.fromkeys(f"{100 * value:.1f}" for value in (min(found), max(found))))
    kept = f"{settings['keep']} patch tokens" if settings.get("keep") is not None else "fewer patch tokens"
    return Table(
        name or f"vision-setting-{SETTINGS[plan].lower()}",
        f"{title}Setting {SETTINGS[plan]}: {kept} from layer {settings['before_layer']} on, {sparsity} % sparsity",
        ["method", "dense", "sparse", "lost", "tokens are, by score", "ours − method", "p", "seeds"],
        rows,
        notes=[
            "Test accuracy per answer in per cent, mean over seeds with 95 % interval; lost: points below the plain "
            "model's dense accuracy. How tokens are reduced and ranked is each method's best on validation; "
            "differences are paired by seed. All methods start from the same dense model and take the same number of "
            "further steps. The sparsity depends on the score: what is computed only for the choice counts.",
            TESTED,
        ],
        align="lrrrlrrr",
        record_ids=study.record_ids,
    )


def _belongs(method: str, plan: str) -> bool:
    """A method that trains with the path of another setting has no row in this one."""
    return not any(method.endswith(f"_{s[-1]}") for s in SETTINGS if s != plan)


@register_table("vision-setting-a", experiments=VIT)
def setting_a(records: list[dict[str, Any]]) -> Table | None:
    return settings_table("setting_a", records)


@register_table("vision-setting-b", experiments=VIT)
def setting_b(records: list[dict[str, Any]]) -> Table | None:
    return settings_table("setting_b", records)


@register_table("vision-curves", experiments=VIT)
def curves(records: list[dict[str, Any]]) -> Table | None:
    """Accuracy over sparsity for column and token plans."""
    study = main_study(records)
    if study is None:
        return None
    plans = [(plan, level) for plan in ("columns", "tokens") for level in study.levels(plan) if level is not None]
    rows = []
    for method in study.methods:
        cells = [accuracy(study, method, plan, level=level) for plan, level in plans]
        if any(cells):
            dense = accuracy(study, method, "dense")
            row = [label(method), *map(points, (dense, *cells)), len(study.seeds(method))]
            rows.append(TracedRow(row, study.ids_of(method)))
    if not rows or not plans:
        return None
    return Table(
        "vision-curves",
        "Test accuracy by realised sparsity",
        ["method", "dense", *(f"{plan} {100 * level:.0f} %" for plan, level in plans), "seeds"],
        rows,
        notes=[
            "Per cent of answers, mean over seeds with 95 % interval, each with the selection score that is best on "
            "validation. Columns: keys per head, shared by its queries. Tokens: patch tokens dropped before the first "
            "layer.",
        ],
        record_ids=study.record_ids,
    )


@register_table("vision-masks", experiments=VIT)
def masks(records: list[dict[str, Any]]) -> Table | None:
    """Overlap of the best-ranked patches with the semantic mask at matched area."""
    study = main_study(records)
    if study is None:
        return None
    ours = ours_for("setting_a", study.methods)
    tests = {method: _overlap_difference(study, ours, method) for method in study.methods if ours and method != ours}
    rows = []
    for method in study.methods:
        found = study.localisation(method)
        if found is None or not found["iou"]:
            continue
        magnitude = study.localisation(method, scores=("magnitude",))
        cells = [
            label(method),
            estimate(mean_and_interval(found["iou"])),
            found["score"],
            found["layer"],
            number(statistics.fmean(magnitude["iou"])) if magnitude else MISSING,
            number(statistics.fmean(found["random"])),
            *difference_cells(tests, method, estimate),
            len(study.seeds(method)),
        ]
        rows.append(TracedRow(cells, study.ids_of(method, ours)))
    if not rows:
        return None
    return Table(
        "vision-masks",
        "Overlap (IoU) of the highest-ranked patches with the semantic mask, at matched area",
        ["method", "IoU", "score", "layer", "by magnitude", "random", "ours − method", "p", "seeds"],
        rows,
        notes=[
            "As many patches are kept as the image's mask covers; the best possible value is 1. Score and layer are "
            "each method's best on validation, the numbers are of the test images. Mean over seeds, 95 % interval.",
            TESTED,
        ],
        align="lrlrrrrrr",
        record_ids=study.record_ids,
    )


@register_table("vision-sensitivity", experiments=("vit/sensitivity",))
def sensitivity(records: list[dict[str, Any]]) -> Table | None:
    """Every variant of the sensitivity study: accuracy dense and in setting A, on validation scenes."""
    study = main_study(records)
    if study is None:
        return None
    rows = []
    for method in study.methods:
        dense = study.values(method, "dense", split="validation")
        sparse = study.values(method, "setting_a", split="validation")
        if dense and sparse:
            choice = study.best_choice(method, "setting_a")
            cells = [
                label(method),
                points(mean_and_interval(dense)),
                points(mean_and_interval(sparse)),
                ", ".join(word for word in choice if word),
                len(dense),
            ]
            rows.append(TracedRow(cells, study.ids_of(method)))
    if not rows:
        return None
    return Table(
        "vision-sensitivity",
        "Sensitivity to the settings of what is regularised and of our plan, one factor at a time",
        ["variant", "dense", "setting A", "tokens are, by score", "seeds"],
        rows,
        notes=[
            "Validation accuracy per answer in per cent after 100 further steps; names say what differs in training. "
            "All are tested by one plan, with the mixed score: what was trained with another score meets it unprepared."
        ],
        align="lrrlr",
        record_ids=study.record_ids,
    )


@register_table("cifar-mce", experiments=("cifar/",))
def mce(records: list[dict[str, Any]]) -> Table | None:
    """Clean accuracy and mean corruption error, dense and sparse."""
    study = main_study(records)
    if study is None:
        return None
    ours = ours_for("robustness", study.methods)
    others = [name for name in study.methods if ours and name != ours]
    tests = {name: _corruption_difference(study, name, ours, "dense") for name in others}
    gains = {name: _corruption_difference(study, "plain", name, "sparse") for name in study.methods if name != "plain"}
    rows = []
    for method in study.methods:
        errors = {plan: study.corruption_errors(method, plan) for plan in ("dense", "sparse")}
        if not errors["dense"]:
            continue
        cells = [points(mean_and_interval(values)) if values else MISSING for values in errors.values()]
        name = f"**{label(method)}**" if method == ours else label(method)
        clean = points(accuracy(study, method, "dense"))
        cells[1:1] = difference_cells(tests, method)
        row = [name, clean, *cells, *difference_cells(gains, method), len(study.seeds(method))]
        rows.append(TracedRow(row, study.ids_of(method, "plain", ours)))
    if not rows:
        return None
    return Table(
        "cifar-mce",
        "Mean corruption error",
        [
            "method",
            "clean accuracy",
            "mCE dense",
            "method − ours",
            "p",
            "mCE at 80 % sparsity",
            "plain − method, at 80 %",
            "p, at 80 %",
            "seeds",
        ],
        rows,
        notes=[
            "Per cent; mCE is the plain mean of the error over 15 corruptions and 5 severities, lower is better. Mean "
            "over seeds with 95 % interval; differences are paired by seed. At 80 % sparsity tokens are "
            "dropped before the first layer; what was trained with a partition is tested with it.",
            TESTED,
        ],
        record_ids=study.record_ids,
    )


def _overlap_difference(study: VisionStudy, ours: str, rival: str) -> DifferenceTest | None:
    """Our overlap minus the rival's, each at its own score and layer, tested in pairs over shared seeds."""
    found = [study.localisation(method) for method in (ours, rival)]
    if not all(found):
        return None
    own, other = (dict(zip(one["seeds"], one["iou"], strict=True)) for one in found)
    seeds = [seed for seed in own if seed in other]
    return paired_test([own[seed] for seed in seeds], [other[seed] for seed in seeds]) if seeds else None


def _corruption_difference(study: VisionStudy, first: str, second: str, plan: str) -> DifferenceTest | None:
    """Mean corruption error of the first method minus the second's, tested in pairs over shared seeds."""
    pairs = study.corruption_error_pairs(first, second, plan)
    return paired_test(*pairs) if pairs[0] else None


@register_table("cifar-corruptions", experiments=("cifar/",))
def corruptions(records: list[dict[str, Any]]) -> Table | None:
    """Error per corruption, mean over severities and seeds."""
    study = main_study(records)
    if study is None:
        return None
    by_method = {method: study.errors_by_corruption(method) for method in study.methods}
    by_method = {method: errors for method, errors in by_method.items() if errors}
    if not by_method:
        return None
    names = dict.fromkeys(name for errors in by_method.values() for name in errors)
    rows = [
        [name.replace("_", " "), *(100 * errors[name] if name in errors else None for errors in by_method.values())]
        for name in names
    ]
    return Table(
        "cifar-corruptions",
        "Error by corruption, dense",
        ["corruption", *(label(method) for method in by_method)],
        rows,
        notes=[
            "Per cent, mean over the measured severities and the seeds. Speckle noise, Gaussian blur, spatter and "
            "saturate do not count in the mCE."
        ],
        record_ids=study.record_ids,
    )
