"""Tables of the studies beside the digit scenes: token merging, budgets by entropy, distillation, equal sparsity."""

from __future__ import annotations

import statistics
from typing import Any

from entreg.experiments.method_names import label
from entreg.experiments.vision.study import VisionStudy
from entreg.experiments.vision.tables import accuracy, main_study, points, settings_table
from entreg.records.statistics import mean_and_interval
from entreg.records.tables import MISSING, Table, TracedRow, number, register_table

EXPERIMENT = "vit/token_rivals"

EQUAL, OWN = "setting_a", "budget_a"
"""Plans of setting A with the same budget for every image, and with exp(H) tokens for each."""

CHOICE = ("drop", "mixed")
"""How both reduce and rank tokens when they are compared: other scores cost another number of score entries."""


@register_table("vision-distillation", experiments=(EXPERIMENT,))
def distillation(records: list[dict[str, Any]]) -> Table | None:
    """Setting A, trained with and without the dense model's answers as a target."""
    return settings_table("setting_a", records, name="vision-distillation", title="Distillation from the dense model. ")


@register_table("vision-setting-b-forms", experiments=(EXPERIMENT,))
def forms(records: list[dict[str, Any]]) -> Table | None:
    """Setting B, further forms of our plan beside the plain loop."""
    return settings_table("setting_b", records, name="vision-setting-b-forms", title="Further forms of our plan. ")


@register_table("vision-token-merging", experiments=(EXPERIMENT,))
def merging(records: list[dict[str, Any]]) -> Table | None:
    """Token merging at its own sparsities beside ours in setting A."""
    study = main_study(records)
    if study is None:
        return None
    plans = [plan for plan in _plans(study) if plan.startswith("merging")]
    pairs = [(method, plan) for plan in plans for method in ("plain", "merging_a") if study.values(method, plan)]
    if not pairs:
        return None
    pairs += [(method, EQUAL) for method in ("plain", "loop_a", "ours_a") if study.values(method, EQUAL)]
    rows = []
    for method, plan in pairs:
        sparsity = statistics.fmean(study.values(method, plan, "sparsity"))
        how = "token merging (ToMe)" if plan.startswith("merging") else " by ".join(study.best_choice(method, plan))
        name = f"**{label(method)}**" if (method, plan) == ("ours_a", EQUAL) else label(method)
        cells = [points(accuracy(study, method, which)) for which in ("dense", plan)]
        row = [name, how, f"{100 * sparsity:.1f} %", *cells, len(study.seeds(method))]
        rows.append(TracedRow(row, study.ids_of(method)))
    return Table(
        "vision-token-merging",
        "Token merging (ToMe's rule) with and without training, beside ours",
        ["trained as", "tested with", "sparsity", "dense", "sparse", "seeds"],
        rows,
        notes=[
            "Test accuracy per answer in per cent, mean over seeds with 95 % interval. Token merging takes away at "
            "most half of the patch tokens in a layer, so its rule ends at the largest sparsity shown; merging a was "
            "trained with it active. Throughput of both: vision-speed-rivals.",
        ],
        align="llrrrr",
        record_ids=study.record_ids,
    )


@register_table("vision-entropy-budgets", experiments=(EXPERIMENT,))
def budgets(records: list[dict[str, Any]]) -> Table | None:
    """exp(H) tokens per image beside the same number for all, at equal mean sparsity."""
    study = main_study(records)
    if study is None:
        return None
    pairs = [(method, level) for level in study.levels(OWN) for method in study.methods]
    rows = [_budget_row(study, *pair) for pair in pairs if study.values_of_choice(pair[0], OWN, CHOICE, level=pair[1])]
    if not rows:
        return None
    return Table(
        "vision-entropy-budgets",
        "As many tokens per image as its entropy asks for, exp(H), against the same number for all",
        [
            "method",
            "mean sparsity",
            *(f"kept: {name}" for name in ("mean", "median", "95 %", "most")),
            "exp(H)",
            "equal",
            "seeds",
        ],
        rows,
        notes=[
            "Test accuracy per answer in per cent, mean over seeds with 95 % interval. Every image keeps m x exp(H) "
            "patch tokens, H the entropy of its selection scores; m is fitted on validation images so that the mean "
            "sparsity, each image run alone, is that of setting A. Equal: setting A itself, 14 tokens for every image. "
            "In both, tokens are dropped by the mixed score; our partition needs equal numbers.",
        ],
        align="lrrrrrrrr",
        record_ids=study.record_ids,
    )


@register_table("vision-equal-sparsity", experiments=("vit/equal_sparsity",))
def equal_sparsity(records: list[dict[str, Any]]) -> Table | None:
    """Every method with every reduction and score at one sparsity, whatever number of tokens that leaves."""
    study = main_study(records)
    if study is None:
        return None
    rows = []
    for method in study.methods:
        for level in study.levels("equal_a"):
            for choice in study.choices(method, "equal_a", level):
                values, sparsity = (
                    study.values_of_choice(method, "equal_a", choice, field, level=level)
                    for field in ("top1", "sparsity")
                )
                cells = [
                    f"**{label(method)}**" if method.startswith("ours") else label(method),
                    " by ".join(choice),
                    f"{100 * statistics.fmean(sparsity):.1f} %",
                    points(accuracy(study, method, "dense")),
                    points(mean_and_interval(values)),
                    len(values),
                ]
                rows.append(TracedRow(cells, study.ids_of(method)))
    if not rows:
        return None
    return Table(
        "vision-equal-sparsity",
        "Setting A at equal sparsity: 14 tokens by the mixed score, 22 by the prefix tokens' rows alone",
        ["trained as", "tokens are, by score", "sparsity", "dense", "sparse", "seeds"],
        rows,
        notes=[
            "Test accuracy per answer in per cent, mean over seeds with 95 % interval. Score entries that only serve "
            "the choice count as computed, so a cheaper score leaves room for more tokens; time per image grows with "
            "them. Trained with the sparse path by the prefix score: loop a (dropping) and ours a (partition).",
        ],
        align="llrrrr",
        record_ids=study.record_ids,
    )


def _budget_row(study: VisionStudy, method: str, level: float | None) -> TracedRow:
    """Mean and tail of a method's budgets, and its accuracy with them and with equal ones."""
    fields = ("sparsity", "budget_mean", "budget_median", "budget_p95", "budget_max")
    sparsity, *tail = (
        statistics.fmean(study.values_of_choice(method, OWN, CHOICE, field, level=level)) for field in fields
    )
    own = study.values_of_choice(method, OWN, CHOICE, level=level)
    equal = study.values_of_choice(method, EQUAL, CHOICE)
    cells = [
        label(method),
        f"{100 * sparsity:.1f} %",
        *map(number, tail),
        points(mean_and_interval(own)),
        points(mean_and_interval(equal)) if equal else MISSING,
        len(own),
    ]
    return TracedRow(cells, study.ids_of(method))


def _plans(study: VisionStudy) -> list[str]:
    """Names of the plans that were evaluated, in order."""
    return list(dict.fromkeys(row["plan"] for record in study.records.values() for row in record["rows"]))
