"""Tables of the language experiments: what sparsity costs by plan and level, training, and effective support."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from entreg.experiments.language.study import (
    DENSE,
    LANGUAGE,
    OURS,
    PLAIN,
    SPARSITY_TOLERANCE,
    TRAINING,
    LanguageStudy,
    is_default,
    method_label,
    plan_label,
    quality_studies,
    training_studies,
)
from entreg.records.formatting import p_value
from entreg.records.statistics import (
    DifferenceTest,
    Estimate,
    exponential,
    holm_by_name,
    mean_and_interval,
    paired_difference,
)
from entreg.records.tables import (
    MISSING,
    NOT_RUN,
    Table,
    TracedRow,
    estimate,
    number,
    percent,
    ratio,
    register_table,
)

Records = list[dict[str, Any]]

TASKS = {"perplexity": "perplexity", "copy": "copy test", "needle": "needle retrieval", "summary": "summaries"}
_UNITS = {"perplexity": "windows", "copy": "windows", "needle": "tasks", "summary": "articles"}


def span(values: tuple[float, float] | None) -> str:
    """A realised sparsity, or its range where tasks or seeds differ, in per cent."""
    if values is None:
        return NOT_RUN
    low, high = (percent(value) for value in values)
    return low if low == high else f"{low.removesuffix(' %')} to {high}"


def circumstances(studies: Sequence[LanguageStudy]) -> list[str]:
    """A note per study: data, how much of it at which context, precision and device."""
    notes = []
    for study in studies:
        parts = []
        for task, words in TASKS.items():
            context = study.reference_context(task)
            sizes = [
                row["items"] for m in study.methods for row in study.rows(m, task, DENSE).values() if "items" in row
            ]
            if context is not None:
                items = f"{max(sizes):,} {_UNITS[task]}, " if sizes else ""
                parts.append(f"{words}: {items}context {context:,}")
        notes.append(f"{study.title} scale: {study.circumstances}; {'; '.join(parts)}.")
    return notes


_PAIRED = (
    "Ratio to dense, copy loss minus dense (nats per token, on the second of two copies) and ROUGE-L drop are paired "
    "by window or article, with 95 % intervals over those; numbers are of the test split."
)


@register_table("llm-quality", experiments=LANGUAGE)
def quality(records: Records) -> Table | None:
    """Every plan at its level nearest 75 %, beside dense."""
    studies = quality_studies(records)
    rows = []
    for study in studies:
        for method in study.methods:
            places = [(DENSE, 0.0), *((plan, study.nearest_level(plan)) for plan in study.plans())]
            shown = [place for place in places if _measured(study, method, *place)]
            against = [
                {place: study.minus_ours(method, task, *place, "loss") for place in shown}
                for task in ("perplexity", "copy")
            ]
            rows += [_quality_row(study, method, *place, against) for place in shown]
    if not rows:
        return None
    return Table(
        "llm-quality",
        "What sparse attention costs a language model, at the level nearest 75 % sparsity",
        [
            *("model, scale", "plan", "realised sparsity", "decode sparsity", "perplexity", "ratio to dense"),
            *("ratio to ours", "p", "copy loss", "copy loss − dense", "copy loss − ours", "p, copy"),
            *("needle accuracy", "needle − dense"),
            *("ROUGE-L", "ROUGE-L drop", "ROUGE-L to dense"),
        ],
        rows,
        notes=[
            *circumstances(studies),
            _PAIRED,
            "Ratio to ours (of perplexities) and copy loss − ours: the same pairs against our default plan, equal "
            "weight for every item; p: paired t test, after Holm's correction for all rows of the model and column.",
            "Realised sparsity: share of the causal score entries that is not computed, entries of the selection "
            "counted as computed, from the least to the largest over the tests. ROUGE-L (0 to 100) is against the "
            "reference summaries, its drop in points below dense; ROUGE-L to dense is against the dense model's own "
            "text. Oracles choose with the exact scores and save no time.",
        ],
        align="ll" + "r" * 15,
        record_ids=_ids(studies),
    )


def _quality_row(
    study: LanguageStudy, method: str, plan: str, level: float, against: Sequence[Mapping[Any, DifferenceTest | None]]
) -> TracedRow:
    perplexities, copies = (tests[plan, level] for tests in against)
    p_perplexity, p_copy = (p_value(holm_by_name(tests).get((plan, level))) for tests in against)
    name = _plan_name(study, method, plan)
    perplexity = _perplexity(study, method, plan, level)
    sparse = plan != DENSE
    copied = study.mean(method, "copy", plan, level, "loss")
    found = study.mean(method, "needle", plan, level, "accuracy")
    lost = study.increase(method, "needle", plan, level, "accuracy")
    drop = study.drop(method, "summary", plan, level, "rouge_l")
    decode = study.realised(method, plan, level, tuple(TASKS), "decode_sparsity")
    cells = [
        study.title,
        name,
        span(study.realised(method, plan, level, tuple(TASKS))) if sparse else MISSING,
        span(decode) if sparse and decode is not None else MISSING,
        _number(perplexity, 4),
        _ratio(study.perplexity_ratio(method, plan, level)) if sparse else MISSING,
        _ratio(exponential(perplexities.difference)) if perplexities else MISSING,
        p_perplexity,
        _number(copied),
        estimate(study.increase(method, "copy", plan, level, "loss")) if sparse else MISSING,
        estimate(copies.difference) if copies else MISSING,
        p_copy,
        _number(found),
        estimate(lost) if sparse else MISSING,
        _number(study.mean(method, "summary", plan, level, "rouge_l")),
        estimate(drop) if sparse else MISSING,
        _number(study.mean(method, "summary", plan, level, "rouge_l_to_dense")) if sparse else MISSING,
    ]
    return TracedRow(cells, study.ids_of(method))


@register_table("llm-levels", experiments=LANGUAGE)
def levels(records: Records) -> Table | None:
    """Every plan at every level, at every context of every test."""
    studies = quality_studies(records)
    tests = {task: sorted({context for study in studies for context in study.contexts(task)}) for task in TASKS}
    columns = [(task, context) for task, contexts in tests.items() for context in contexts]
    rows = []
    for study in studies:
        for method in study.methods:
            for plan in study.plans():
                for level in study.levels(plan):
                    cells = [_level_cell(study, method, plan, level, *column) for column in columns]
                    if any(cell is not None for cell in cells):
                        realised = study.realised(method, plan, level, tuple(TASKS))
                        name = _plan_name(study, method, plan)
                        words = [NOT_RUN if cell is None else cell for cell in cells]
                        row = [study.title, name, percent(level), span(realised), *words]
                        rows.append(TracedRow(row, study.ids_of(method)))
    if not rows:
        return None
    headings = {
        "perplexity": "perplexity / dense",
        "copy": "copy loss − dense",
        "needle": "needle (dense)",
        "summary": "ROUGE-L drop",
    }
    return Table(
        "llm-levels",
        "Every sparse plan of the language experiments at every level",
        [
            *("model, scale", "plan", "level", "realised sparsity"),
            *(f"{headings[task]}, {context:,}" for task, context in columns),
        ],
        rows,
        notes=[
            *circumstances(studies),
            _PAIRED,
            "Level: the sparsity asked for; realised: what it came to at the contexts named above, from the least to "
            "the largest over the tests. The number after each measure is the context in tokens; the needle's accuracy "
            "has dense in brackets; ROUGE-L drop in points.",
        ],
        align="ll" + "r" * (2 + len(columns)),
        record_ids=_ids(studies),
    )


def _level_cell(study: LanguageStudy, method: str, plan: str, level: float, task: str, context: int) -> str | None:
    if task == "perplexity":
        found = study.perplexity_ratio(method, plan, level, context=context)
        return None if found is None else _ratio(found)
    if task == "copy":
        found = study.increase(method, task, plan, level, "loss", context=context)
        return None if found is None else estimate(found)
    if task == "needle":
        found = study.mean(method, task, plan, level, "accuracy", context=context)
        dense = study.mean(method, task, DENSE, 0.0, "accuracy", context=context)
        return None if found is None else f"{number(found)} ({NOT_RUN if dense is None else number(dense)})"
    found = study.drop(method, task, plan, level, "rouge_l", context=context)
    return None if found is None else estimate(found)


@register_table("llm-training", experiments=(TRAINING,))
def training(records: Records) -> Table | None:
    """Perplexity gap to dense by training method, plan and level, against the same number of plain steps."""
    studies = training_studies(records)
    rows = [
        _training_row(study, method, plan, level)
        for study in studies
        for plan in study.plans()
        for level in study.levels(plan)
        for method in study.methods
        if study.gaps(method, plan, level) and _at_level(study, method, plan, level)
    ]
    if not rows:
        return None
    steps = sorted({record["metrics"].get("training_steps") for s in studies for record in s.records.values()} - {None})
    how_long = f" Steps: {', '.join(f'{one:,}' for one in steps)} (0: no further training)." if steps else ""
    return Table(
        "llm-training",
        "Does regularised training make sparse attention cheaper? Perplexity after the same number of steps",
        [
            *("model, scale", "plan", "level", "training", "dense perplexity", "sparse perplexity"),
            *("gap to own dense, %", "gap − that of plain steps", "sparse perplexity / that of plain steps"),
            *("effective support", "seeds"),
        ],
        rows,
        notes=[
            *circumstances(studies),
            "Means over seeds with 95 % intervals; differences to plain steps are paired by seed. Gap: perplexity of "
            "the plan over that of the same trained model dense, minus one, in per cent; its difference in points. A "
            "gap also shrinks when the dense model gets worse, so the ratio of the sparse perplexities decides: below "
            f"1 the regulariser helped.{how_long}",
            "Effective support: exp of the mean row entropy of the trained model's dense attention, mean over layers "
            "and heads, in keys.",
            f"Left out: plans that missed their level by more than {100 * SPARSITY_TOLERANCE:.0f} points, as where the "
            "budget leaves no choice and attention runs dense.",
        ],
        align="llrl" + "r" * 7,
        record_ids=_ids(studies),
    )


def _at_level(study: LanguageStudy, method: str, plan: str, level: float) -> bool:
    """Whether a plan came near its level; where a sequence is too short for the budget it runs dense."""
    found = study.realised(method, plan, level, ["perplexity"])
    return found is None or abs(found[0] - level) <= SPARSITY_TOLERANCE


def _training_row(study: LanguageStudy, method: str, plan: str, level: float) -> TracedRow:
    gaps, plain_gaps = (study.gaps(name, plan, level) for name in (method, PLAIN))
    seeds = [seed for seed in gaps if seed in plain_gaps] if method != PLAIN else []
    gain = paired_difference([gaps[seed] for seed in seeds], [plain_gaps[seed] for seed in seeds]) if seeds else None
    over = study.perplexity_over(method, PLAIN, plan, level) if seeds else None
    support = study.effective_support(method)
    name = method_label(method)
    cells = [
        study.title,
        plan_label(plan),
        percent(level),
        f"**{name}**" if method.startswith(OURS) else name,
        _number(_perplexity(study, method, DENSE, 0.0), 4),
        _number(_perplexity(study, method, plan, level), 4),
        estimate(mean_and_interval(list(gaps.values()))),
        MISSING if gain is None else estimate(gain),
        MISSING if over is None else _ratio(over),
        MISSING if support is None else number(statistics.fmean(head for layer in support[0] for head in layer)),
        len(gaps),
    ]
    return TracedRow(cells, study.ids_of(method, PLAIN))


@register_table("llm-support", experiments=LANGUAGE)
def support(records: Records) -> Table | None:
    """Effective support of the dense model's attention per layer."""
    rows, used = [], []
    for study in quality_studies(records):
        found = study.effective_support(study.base)
        if found is None:
            continue
        used.append(study)
        for layer, heads in enumerate(found[0]):
            mean = statistics.fmean(heads)
            row = [study.title, str(layer), mean, min(heads), max(heads), len(heads), found[1]]
            rows.append(TracedRow(row, study.ids_of(study.base)))
    if not rows:
        return None
    return Table(
        "llm-support",
        "Effective support of dense attention by layer, in keys",
        ["model, scale", "layer", "mean over heads", "least head", "largest head", "heads", "context"],
        rows,
        notes=[
            *(f"{study.title} scale: {study.circumstances}." for study in used),
            "exp(H), H the entropy of an attention row, mean over rows and windows: as many keys as a row really uses. "
            "Layers are counted from 0; context is the length of the windows in tokens.",
        ],
        align="lrrrrrr",
        record_ids=_ids(used),
    )


def _measured(study: LanguageStudy, method: str, plan: str, level: float | None) -> bool:
    return any(study.rows(method, task, plan, level) for task in TASKS)


def _plan_name(study: LanguageStudy, method: str, plan: str) -> str:
    """The plan in words, ours bold; with the training method where the study has several."""
    name = f"**{plan_label(plan)}**" if is_default(plan) else plan_label(plan)
    return name if len(study.methods) == 1 else f"{name}; {method_label(method)}"


def _perplexity(study: LanguageStudy, method: str, plan: str, level: float) -> float | None:
    """Perplexity of the mean loss over seeds, so that ratios of the table's perplexities are the table's ratios."""
    losses = study.losses(method, plan, level)
    return math.exp(statistics.fmean(losses.values())) if losses else None


def _number(value: float | None, digits: int = 3) -> str:
    return NOT_RUN if value is None else number(value, digits)


def _ratio(value: Estimate | None) -> str:
    # Four digits: what matters is the third one behind the point, 1.012 against 1.020.
    return ratio(value, 4)


def _ids(studies: Sequence[LanguageStudy]) -> list[str]:
    return [record_id for study in studies for record_id in study.record_ids]
