"""Table of the project's aims for language models: sparse attention at 75 %, on the offline model and a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from entreg.experiments.language.speed.tables import Row, SpeedCell, speed_cells
from entreg.experiments.language.study import (
    LANGUAGE,
    OURS,
    REFERENCE_CONTEXT,
    SPARSITY_TOLERANCE,
    WANTED_SPARSITY,
    LanguageStudy,
    is_default,
    quality_studies,
    random_weights,
)
from entreg.records.statistics import Estimate, exponential
from entreg.records.tables import MISSING, NOT_RUN, Table, TracedRow, estimate, number, percent, ratio, register_table

MODEL = "smollm2"
SCALE = "offline"
_VERDICT = 5
DTYPE = "bfloat16"
_ELSEWHERE = "not at 75 %"
FINE = "ours_fine"
"""The plan that puts quality first, which is shown beside the default plan and not judged."""


@dataclass(frozen=True)
class SpeedAim:
    """Least speed-up of the default plan over the dense model with fused attention."""

    phase: str
    context: int
    batch: int
    target: float


@dataclass(frozen=True)
class QualityAim:
    """Most that the default plan may lose on a test.

    Attributes:
        task, field: what is measured.
        words: of the table.
        target: the largest loss, in ``unit``.
        unit: of target and measured value.
    """

    task: str
    words: str
    target: float
    unit: str


SPEED_AIMS = (
    SpeedAim("prefill", 4096, 1, 1.6),
    SpeedAim("prefill", 8192, 1, 1.9),
    SpeedAim("decode", 4096, 8, 1.7),
)
QUALITY_AIMS = (
    QualityAim("perplexity", "perplexity above dense", 2.0, " %"),
    QualityAim("copy", "copy loss above dense", 0.05, " nats"),
    QualityAim("needle", "needle accuracy below dense", 0.0, ""),
    QualityAim("summary", "ROUGE-L below dense", 0.4, " points"),
)


@register_table("llm-aims", experiments=LANGUAGE)
def aims(records: list[dict[str, Any]]) -> Table | None:
    """Every aim of the offline model: measured, and met or missed."""
    records = [record for record in records if record["scale"] == SCALE]
    cells = [
        cell
        for cell in speed_cells(records)
        if cell.model.startswith(MODEL) and cell.dtype == DTYPE and cell.device.startswith("CPU")
    ]
    studies = quality_studies(
        r for r in records if r["experiment"] == f"{LANGUAGE[0]}{MODEL}" and not random_weights(r)
    )
    rows, used = [], []
    for aim in SPEED_AIMS:
        found = [c for c in cells if (c.phase, c.context, c.batch) == (aim.phase, aim.context, aim.batch)]
        # More threads last: the machine as it is used.
        cell = max(found, key=lambda one: one.device, default=None)
        where = f"context {aim.context:,}, batch {aim.batch}"
        outcome, fine, source = [NOT_RUN, MISSING, NOT_RUN], NOT_RUN, []
        if cell is not None:
            source = [cell.record["id"]]
            outcome = _speed_outcome(cell, aim)
            fine = next((ratio(_over_fused(row)) for row in cell.rows if row["method"] == FINE), NOT_RUN)
        used += source
        rows.append(TracedRow([f"{aim.phase}, speed-up", where, f">= {ratio(aim.target)}", *outcome, fine], source))
    for aim in QUALITY_AIMS:
        study = studies[0] if studies else None
        context = study.reference_context(aim.task) if study else None
        # The aim on perplexity names its context; the others are tested where their data allow.
        place = REFERENCE_CONTEXT if aim.task == "perplexity" else context
        where = MISSING if place is None else f"context {place:,}"
        outcome, fine = [NOT_RUN, MISSING, NOT_RUN], NOT_RUN
        if study is not None and place is not None:
            outcome = _quality_outcome(study, aim, place)
            of_fine = _loss(study, aim, FINE, study.nearest_level(FINE), place)
            fine = NOT_RUN if of_fine is None else estimate(of_fine, aim.unit)
        source = studies[0].record_ids if studies else []
        rows.append(TracedRow([aim.words, where, f"<= {number(aim.target)}{aim.unit}", *outcome, fine], source))
    if all(row[_VERDICT] == NOT_RUN for row in rows):
        return None
    if studies:
        used += studies[0].record_ids
    met = sum(row[_VERDICT] == "met" for row in rows)
    judged = sum(row[_VERDICT] in ("met", "missed") for row in rows)
    return Table(
        "llm-aims",
        "The project's aims for language models at 75 % realised sparsity",
        ["measure", "where", "aim", "measured", "at", "verdict", "with fine blocks"],
        rows,
        notes=[
            f"{met} of {judged} judged aims met, {len(rows)} set. The default plan on SmolLM2-135M, offline scale; "
            f"speed end to end in {DTYPE} on a CPU, over the fastest way to run the dense model with fused attention.",
            *(f"Quality: {study.circumstances}." for study in studies[:1]),
            "With fine blocks: the plan that puts quality first (blocks of 16, mixed estimates), in the same records;"
            " it is not judged.",
            f"A plan counts as at 75 % when it realises that within {100 * SPARSITY_TOLERANCE:.0f} points. Intervals "
            "are 95 %, paired by window or article; the verdict goes by the mean.",
        ],
        align="lllrllr",
        record_ids=sorted(set(used)),
    )


def _speed_outcome(cell: SpeedCell, aim: SpeedAim) -> list[str]:
    row = cell.default_plan()
    if row is None or row.get("speedup_over_dense") is None:
        elsewhere = any(is_default(one["method"]) for one in cell.rows) and row is None
        return [NOT_RUN, MISSING, _ELSEWHERE if elsewhere else NOT_RUN]
    at = f"{percent(row['realised_sparsity'])}, {row.get('kernel') or 'kernel unknown'}, {cell.device}"
    bound = "" if row.get("bound") is None else f"Amdahl {ratio(row['bound'])}"
    speedup = _over_fused(row)
    if speedup != row["speedup_over_dense"]:
        fastest = "over the fastest way to run the dense model, which is not fused"
        at += f"; {ratio(row['speedup_over_dense'])} {fastest}{bound and f' ({bound})'}"
    elif bound:
        at += f", {bound}"
    verdict = "met" if speedup >= aim.target else "missed"
    return [ratio(speedup), at, verdict]


def _over_fused(row: Row) -> float:
    return row.get("speedup_over_fused", row["speedup_over_dense"])


def _quality_outcome(study: LanguageStudy, aim: QualityAim, context: int) -> list[str]:
    level = study.nearest_level(OURS)
    found = _loss(study, aim, OURS, level, context)
    realised = study.mean(study.base, aim.task, OURS, level, "realised_sparsity", context=context)
    if found is None or realised is None:
        return [NOT_RUN, MISSING, NOT_RUN]
    measured = estimate(found, aim.unit)
    at = f"{percent(realised)} realised"
    decode = study.mean(study.base, aim.task, OURS, level, "decode_sparsity", context=context)
    if decode is not None:
        at += f", {percent(decode)} in decoding"
    if abs(realised - WANTED_SPARSITY) > SPARSITY_TOLERANCE:
        return [measured, at, _ELSEWHERE]
    # Tolerance: differences of rounded accuracies are not exact in binary.
    return [measured, at, "met" if found.mean <= aim.target + 1e-9 else "missed"]


def _loss(study: LanguageStudy, aim: QualityAim, plan: str, level: float | None, context: int) -> Estimate | None:
    """What a plan loses on an aim's test, in the aim's unit."""
    if aim.task in ("perplexity", "copy"):
        found = study.increase(study.base, aim.task, plan, level, "loss", context=context)
        if found is None or aim.task == "copy":
            return found
        ends = exponential(found)
        low, high = (None if end is None else 100.0 * (end - 1.0) for end in (ends.low, ends.high))
        return Estimate(100.0 * (ends.mean - 1.0), low, high, ends.count)
    field = "accuracy" if aim.task == "needle" else "rouge_l"
    return study.drop(study.base, aim.task, plan, level, field, context=context)
