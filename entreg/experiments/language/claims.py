"""What the paper's claims on language models come to, from the records of the language experiments.

Each claim speaks of several models; the value is that of the worst of those measured at the scale, and the reason
names it. "The sparse model" is the default plan at 70 to 75 % realised sparsity. At the offline scale the model is
SmolLM2-135M on packaged text; no verdict there is one on the paper's models.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from entreg.experiments.language.speed.tables import Row, SpeedCell, speed_cells
from entreg.experiments.language.study import (
    CLAIMED_SPARSITY,
    DENSE,
    LANGUAGE,
    MODEL_LABELS,
    ORACLES,
    OTHER_MODEL,
    OURS,
    PAPER_MODELS,
    SPARSITY_TOLERANCE,
    SPEED,
    WANTED_SPARSITY,
    WINDOW,
    LanguageStudy,
    model_label,
    plan_label,
    quality_studies,
)
from entreg.records.claims import Evidence, register_measure
from entreg.records.formatting import number, percent, ratio

Records = list[dict[str, Any]]


@register_measure("llm-speed", experiments=(SPEED,))
def prefill_speedup(records: Records) -> Evidence | None:
    """Dense time over the default plan's, prefill at a model's longest context; the least of the models.

    Where a model was timed on several devices or precisions, a GPU counts before a CPU and bfloat16 before float32.
    """
    known = PAPER_MODELS if records[0]["scale"] == "paper" else MODEL_LABELS
    wanted = {model_label(model) for model in known}
    cells = [cell for cell in speed_cells(records, "prefill") if model_label(cell.model) in wanted]
    found = [cell for cell in cells if _speedup(cell.at_claimed_sparsity()) is not None]
    by_model: dict[str, SpeedCell] = {}
    for cell in sorted(found, key=_weight):
        by_model[model_label(cell.model)] = cell
    if not by_model:
        return None
    worst = min(by_model.values(), key=lambda cell: cell.at_claimed_sparsity()["speedup_over_dense"])
    row = worst.at_claimed_sparsity()
    reasons = [
        f"prefill of {worst.title}, context {worst.context:,}, batch {worst.batch}; {_plan(row)} over fastest dense",
    ]
    if row.get("bound") is not None:
        share = f"; attention takes {percent(row['attention_share'])}" if row.get("attention_share") else ""
        reasons.append(f"Amdahl allows {ratio(row['bound'])}{share}")
    rivals = [f"{plan_label(one['method'])} {_at(one)}" for one in worst.rows if _is_rival(one)]
    if rivals:
        reasons.append(f"there also {', '.join(rivals)}")
    same = [cell for cell in found if cell.title == worst.title and cell.batch == worst.batch and cell is not worst]
    if same:
        reasons.append(f"at other contexts {', '.join(f'{cell.context:,} {_gain(cell)}' for cell in same)}")
    others = [f"{name} {_gain(cell)} at {cell.context:,}" for name, cell in by_model.items() if cell is not worst]
    if others:
        reasons.append(f"other models {', '.join(others)}")
    decoding = _decoding(records, worst)
    if decoding:
        reasons.append(f"decoding {', '.join(f'{_gain(c)} at {c.context:,}, batch {c.batch}' for c in decoding)}")
    used = {cell.record["id"] for cell in (*same, *by_model.values(), *decoding)}
    found = _evidence(records, row["speedup_over_dense"], _range(worst, row), sorted(used), "; ".join(reasons), "x")
    return replace(found, interval_is="range of the rounds")


def _range(cell: SpeedCell, row: Row) -> tuple[float, float] | None:
    """The least and the largest speed-up over the fastest dense that the fastest and slowest rounds allow."""
    dense = min((one for one in cell.rows if one["role"] == "baseline"), key=lambda one: one["seconds"], default=None)
    if dense is None:
        return None
    return dense["seconds_min"] / row["seconds_max"], dense["seconds_max"] / row["seconds_min"]


def _weight(cell: SpeedCell) -> tuple[Any, ...]:
    """Later counts: GPU, bfloat16, the longest context, the smallest batch."""
    return (not cell.device.startswith("CPU"), cell.dtype == "bfloat16", cell.context, -cell.batch)


def _decoding(records: Records, cell: SpeedCell) -> list[SpeedCell]:
    """Per batch the decoding cell of the longest context, on the same model, precision and device."""
    longest: dict[int, SpeedCell] = {}
    for one in speed_cells(records, "decode"):
        if one.title == cell.title and _speedup(one.at_claimed_sparsity()) is not None:
            longest[one.batch] = one
    return list(longest.values())


def _is_rival(row: Row) -> bool:
    return row["role"] == "rival" and _speedup(row) is not None


def _speedup(row: Row | None) -> float | None:
    return None if row is None else row.get("speedup_over_dense")


def _gain(cell: SpeedCell) -> str:
    return ratio(cell.at_claimed_sparsity()["speedup_over_dense"])


def _plan(row: Row) -> str:
    kernel = f", kernel {row['kernel']}" if row.get("kernel") else ""
    return f"{plan_label(row['method'])} at {percent(row['realised_sparsity'])} realised{kernel}"


def _at(row: Row) -> str:
    return f"{ratio(row['speedup_over_dense'])} ({percent(row['realised_sparsity'])})"


@register_measure("llm-ppl", experiments=LANGUAGE)
def perplexity_increase(records: Records) -> Evidence | None:
    """Perplexity of the default plan minus dense, the largest of the models; interval paired over windows."""
    found = []
    for study in _judged(records):
        level = _claimed_level(study, "perplexity")
        by = study.perplexity_ratio(study.base, OURS, level)
        losses = study.losses(study.base, DENSE)
        if by is not None:
            dense = math.exp(sum(losses.values()) / len(losses))
            found.append((dense * (by.mean - 1.0), study, level, by, dense))
    if not found:
        return None
    value, study, level, by, dense = max(found, key=lambda one: one[0])
    context = study.reference_context("perplexity")
    reasons = [
        f"{study.model} on {study.circumstances}, context {context:,}, {_realised(study, 'perplexity', level)}: dense "
        f"{number(dense, 4)}, ratio {ratio(by, 4)}"
    ]
    copied = study.increase(study.base, "copy", OURS, level, "loss")
    if copied is not None:
        reasons.append(f"loss of copying {number(copied.mean)} nats above dense")
    for words, plan in _compared(study).items():
        theirs = study.nearest_level(plan)
        other = study.perplexity_ratio(study.base, plan, theirs)
        copied = study.increase(study.base, "copy", plan, theirs, "loss")
        if other is not None:
            copying = "" if copied is None else f", loss of copying {number(copied.mean)} above dense"
            reasons.append(f"{words}: ratio {ratio(other.mean, 4)}{copying}")
    reasons += _others(found, study)
    interval = None if by.interval is None else tuple(dense * (end - 1.0) for end in by.interval)
    return _evidence(records, value, interval, study.record_ids, "; ".join(reasons), "")


@register_measure("llm-rouge", experiments=LANGUAGE)
def rouge_drop(records: Records) -> Evidence | None:
    """ROUGE-L of the dense model's summaries minus the default plan's, the largest of the models."""
    found = []
    for study in _judged(records):
        level = _claimed_level(study, "summary")
        drop = study.drop(study.base, "summary", OURS, level, "rouge_l")
        if drop is not None:
            found.append((drop.mean, study, level, drop))
    if not found:
        return None
    value, study, level, drop = max(found, key=lambda one: one[0])
    dense = study.mean(study.base, "summary", DENSE, 0.0, "rouge_l")
    own = study.mean(study.base, "summary", OURS, level, "rouge_l_to_dense")
    items = study.mean(study.base, "summary", OURS, level, "items")
    many = "" if items is None else f", {items:,.0f} articles"
    reasons = [
        f"{study.model} on {study.circumstances}{many}, {_realised(study, 'summary', level)}: dense {number(dense)}"
    ]
    if own is not None:
        reasons.append(f"ROUGE-L to the dense model's own text {number(own)}")
    for words, plan in _compared(study).items():
        lost = study.drop(study.base, "summary", plan, study.nearest_level(plan), "rouge_l")
        if lost is not None:
            reasons.append(f"{words}: drop {number(lost.mean)}")
    reasons += _others(found, study)
    return _evidence(records, value, drop.interval, study.record_ids, "; ".join(reasons), "points")


def _judged(records: Records) -> list[LanguageStudy]:
    """Studies that a verdict may rest on: of trained models, at the paper's scale of the paper's only."""
    studies = [study for study in quality_studies(records) if not study.random_weights]
    if records[0]["scale"] == "paper":
        wanted = tuple(f"{LANGUAGE[0]}{model}" for model in PAPER_MODELS)
        return [study for study in studies if study.experiment in wanted]
    return [study for study in studies if study.experiment != OTHER_MODEL]


def _claimed_level(study: LanguageStudy, task: str) -> float | None:
    """The default plan's level whose realised sparsity on a test lies at 70 to 75 % and nearest to 75 %, or None."""
    low, high = (end + sign * SPARSITY_TOLERANCE for end, sign in zip(CLAIMED_SPARSITY, (-1, 1), strict=True))
    realised = {level: study.mean(study.base, task, OURS, level, "realised_sparsity") for level in study.levels(OURS)}
    inside = {level: value for level, value in realised.items() if value is not None and low <= value <= high}
    return min(inside, key=lambda level: abs(inside[level] - WANTED_SPARSITY), default=None)


def _compared(study: LanguageStudy) -> dict[str, str]:
    """Words to plan, of those that are neither the default one nor an oracle: the best on validation, the window."""
    others = [plan for plan in study.plans() if plan != OURS and not plan.startswith(ORACLES)]
    best = study.best_plan(study.base, others)
    found = {} if best is None else {f"best other plan on validation, {plan_label(best)}": best}
    return found if best == WINDOW or WINDOW not in others else {**found, plan_label(WINDOW): WINDOW}


def _realised(study: LanguageStudy, task: str, level: float) -> str:
    words = f"{percent(study.mean(study.base, task, OURS, level, 'realised_sparsity'))} realised"
    decode = study.mean(study.base, task, OURS, level, "decode_sparsity")
    return words if decode is None else f"{words}, {percent(decode)} in decoding"


def _others(found: list[tuple[Any, ...]], study: LanguageStudy) -> list[str]:
    others = [f"{one[1].model} {number(one[0])}" for one in found if one[1] is not study]
    return [f"other models {', '.join(others)}"] if others else []


def _evidence(
    records: Records,
    value: float,
    interval: tuple[float, float] | None,
    record_ids: list[str],
    reason: str,
    unit: str,
) -> Evidence:
    return Evidence(
        value=value, interval=interval, scale=records[0]["scale"], record_ids=record_ids, reason=reason, unit=unit
    )
