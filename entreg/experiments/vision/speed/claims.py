"""What the paper's claims on speed and training cost come to, from the speed and cost benchmarks.

The model is ViT-Base/16 at 224 with random weights, which decide accuracy and not speed; the batch is the headline
batch of :mod:`entreg.experiments.vision.speed.tables`. "The sparse model" is the partition plan at 80 % realised
sparsity, the one whose accuracy ``vit-top1`` judges; what key columns alone bring stands in the reason.
"""

from __future__ import annotations

import statistics
from typing import Any

from entreg.experiments.method_names import label
from entreg.experiments.vision.speed.tables import EXPERIMENT, Row, Setting, plan_label, speed_settings
from entreg.experiments.vision.speed.training_cost_tables import EXPERIMENT as TRAINING_COST
from entreg.experiments.vision.speed.training_cost_tables import PLAIN, change
from entreg.records.claims import Evidence, register_measure
from entreg.records.formatting import number, percent, ratio, seconds

Records = list[dict[str, Any]]

MODEL = "vit_base_224"
OURS = "partition_80"


def headline(records: Records, model: str = MODEL) -> Setting | None:
    """The setting that a verdict rests on: ViT-Base at 224, uncompiled; on a GPU in bfloat16 before float32."""
    found = [
        setting
        for setting in speed_settings(records)
        if setting.record["config"]["model"] == model and setting.record["config"]["compilation"] == "none"
    ]
    found.sort(
        key=lambda setting: (
            setting.record["config"]["device"] != "cuda",
            setting.record["config"]["device"] == "cuda" and setting.record["config"]["dtype"] != "bfloat16",
        )
    )
    return found[0] if found else None


@register_measure("vit-speed", experiments=(EXPERIMENT,))
def unfused_speedup(records: Records) -> Evidence | None:
    """Dense over sparse, both with unfused attention."""
    return _speedup(records, fused=False)


@register_measure("vit-flash", experiments=(EXPERIMENT,))
def fused_speedup(records: Records) -> Evidence | None:
    """Dense unfused over sparse fused."""
    return _speedup(records, fused=True)


@register_measure("vit-flash-only", experiments=(EXPERIMENT,))
def fusing_alone(records: Records) -> Evidence | None:
    """Dense unfused over dense fused."""
    setting = headline(records)
    row = None if setting is None else setting.get(setting.headline_batch, "dense", True)
    if row is None:
        return None
    slow = setting.get(setting.headline_batch, "dense", False)
    reason = (
        f"{_where(setting)}; kernels {row['kernel']}; attention takes {percent(slow['attention_share'])} of the dense "
        f"unfused time, so no attention kernel can bring more than {ratio(_everything(slow))}"
    )
    return _evidence(setting, row, reason)


def _speedup(records: Records, *, fused: bool) -> Evidence | None:
    setting = headline(records)
    if setting is None:
        return None
    batch = setting.headline_batch
    row = _ours(setting, fused)
    if row is None:
        return None
    reasons = [
        f"{_where(setting)}; {plan_label(row['method'])} at {percent(row['realised_sparsity'])}, kernels "
        f"{row['kernel']}; {ratio(row['speedup_over_dense_fused'])} over dense fused",
        f"skipping score entries alone allows {ratio(row['bound_attention_alone'])} over dense "
        f"{'fused' if fused else 'unfused'} (Amdahl; attention takes {percent(row['attention_share'])} of its time)",
    ]
    columns = setting.at_wanted_sparsity(batch, fused, "columns")
    if columns:
        reasons.append(f"key columns only: {ratio(columns[0]['speedup_over_dense'])}")
    small = headline(records, "scenes")
    other = None if small is None else _ours(small, fused)
    if other is not None:
        reasons.append(f"digit scenes' ViT: {ratio(other['speedup_over_dense'])}")
    return _evidence(setting, row, "; ".join(reasons))


def _ours(setting: Setting, fused: bool) -> Row | None:
    """The partition plan at the headline batch, if what it realised is about 80 %."""
    rows = setting.at_wanted_sparsity(setting.headline_batch, fused, "tokens")
    return next((row for row in rows if row["method"] == OURS), None)


def _evidence(setting: Setting, row: Row, reason: str) -> Evidence:
    """Evidence on a row's speed-up over dense unfused, with the range that the slowest and fastest rounds allow."""
    dense = setting.get(setting.headline_batch, "dense", False)
    return Evidence(
        value=row["speedup_over_dense"],
        interval=None if dense is None else range_of_ratio(dense, row),
        interval_is=RANGE,
        has_required=setting.record["config"]["device"] == "cuda" and "flash" in row["kernel"],
        scale=setting.record["scale"],
        record_ids=(setting.record["id"],),
        reason=reason,
        unit="x",
    )


RANGE = "range of the rounds"


def range_of_ratio(numerator: Row, denominator: Row) -> tuple[float, float]:
    """The least and the largest ratio of two rows' times that their fastest and slowest rounds allow."""
    return (
        numerator["seconds_min"] / denominator["seconds_max"],
        numerator["seconds_max"] / denominator["seconds_min"],
    )


def _where(setting: Setting) -> str:
    return f"{setting.title}, batch {setting.headline_batch}, random weights"


def _everything(row: Row) -> float:
    """Amdahl's bound when attention cost nothing at all."""
    return 1.0 / max(1.0 - row["attention_share"], 1e-3)


@register_measure("train-cost", experiments=(TRAINING_COST,))
def training_cost(records: Records) -> Evidence | None:
    """Time of a training step with our regulariser over a plain one, minus one, in per cent.

    A regulariser adds work. By how much the quickest of them came out faster than a plain step is therefore noise.
    """
    record = _newest(records, TRAINING_COST)
    if record is None:
        return None
    config, overheads = record["config"], record["metrics"]["step_overhead"]
    ours = config["ours"]
    adding = [value for name, value in overheads.items() if not config["methods"].get(name, {}).get("sparsity")]
    noise = -100.0 * min(0.0, *adding)
    others = [f"{label(name)} {change(value)}" for name, value in overheads.items() if name not in (ours, PLAIN)]
    device = record["device"]["gpu"] if config["device"] == "cuda" else "CPU"
    return Evidence(
        value=100.0 * overheads[ours],
        interval=None,
        scale=record["scale"],
        record_ids=(record["id"],),
        reason=(
            f"{label(ours)} on a whole step of {config['model']}, batch {config['batch']}, {config['precision']}, "
            f"{device}; others: {', '.join(others)}"
        ),
        unit="%",
        noise=noise,
    )


@register_measure("amortise", experiments=(EXPERIMENT, TRAINING_COST, "vit/imagenet", "vit/digit_scenes"))
def amortisation(records: Records) -> Evidence | None:
    """Batches after which the time that sparse inference saves has paid for the extra training.

    Saved per batch: dense fused minus the partition plan, fused, at 80 %. Extra training: what the training
    records of ours measured (``metrics.extra_training_seconds``), on the paper's model; else, because our method
    starts from a dense model, the whole fine-tuning stage: seconds per image of a step with the regulariser times the
    images of that stage. The reason says what the regulariser's own share of it is.
    """
    setting, cost = headline(records), _newest(records, TRAINING_COST)
    saved = None if setting is None else _saved(setting)
    if not saved or saved <= 0:
        return None
    extremes = _range_saved(setting)
    # Seconds of extra training that the slowest and fastest rounds allow; what was measured as a whole has no rounds.
    spread: tuple[float, float] | None = None
    used = [setting.record["id"]]
    trained = _extra_seconds(records, "vit/imagenet")
    if trained is not None:
        extra, ids = trained
        used += ids
        how = f"measured extra training {seconds(extra)}"
    elif cost is not None and cost["config"]["device"] == setting.record["config"]["device"]:
        config = cost["config"]
        rows = {row["method"]: row for row in cost["rows"]}
        images = config["training_images"]
        extra = images * rows[config["ours"]]["seconds_per_image"]
        own = images * (rows[config["ours"]]["seconds_per_image"] - rows[PLAIN]["seconds_per_image"])
        used.append(cost["id"])
        step = rows[config["ours"]]
        spread = (extra * step["seconds_min"] / step["seconds"], extra * step["seconds_max"] / step["seconds"])
        share = f"{number(own / saved)} batches" if own > 0 else "nothing measurable"
        how = (
            f"whole fine-tuning stage of {number(images)} images, {seconds(extra)} at the measured step; the "
            f"regulariser's share alone: {share}"
        )
    else:
        return None
    reasons = [f"{seconds(saved)} saved per batch ({_where(setting)})", how]
    small, scenes = headline(records, "scenes"), _extra_seconds(records, "vit/digit_scenes")
    saved_small = None if small is None else _saved(small)
    if saved_small and saved_small > 0 and scenes is not None:
        used += [small.record["id"], *scenes[1]]
        reasons.append(f"digit scenes' ViT: {number(scenes[0] / saved_small)} batches")
    low, high = spread or (extra, extra)
    return Evidence(
        value=extra / saved,
        interval=(low / extremes[1], high / extremes[0]) if extremes[0] > 0 else None,
        interval_is=RANGE,
        scale=setting.record["scale"],
        record_ids=tuple(dict.fromkeys(used)),
        reason="; ".join(reasons),
        unit="batches",
    )


def _saved(setting: Setting) -> float | None:
    """Seconds that the partition plan at 80 % saves per batch over dense fused."""
    dense = setting.get(setting.headline_batch, "dense", True)
    sparse = _ours(setting, True)
    return dense["seconds"] - sparse["seconds"] if dense and sparse else None


def _range_saved(setting: Setting) -> tuple[float, float]:
    """The least and the most that the slowest and fastest rounds of dense and sparse allow to be saved, seconds."""
    dense, sparse = setting.get(setting.headline_batch, "dense", True), _ours(setting, True)
    return dense["seconds_min"] - sparse["seconds_max"], dense["seconds_max"] - sparse["seconds_min"]


def _extra_seconds(records: Records, experiment: str) -> tuple[float, list[str]] | None:
    """Mean extra training time of ours over its seeds, and the records that it comes from."""
    found = [
        record
        for record in records
        if record["experiment"] == experiment
        and str(record["config"].get("method", "")).startswith("ours")
        and record["metrics"].get("extra_training_seconds") is not None
    ]
    if not found:
        return None
    mean = statistics.fmean(record["metrics"]["extra_training_seconds"] for record in found)
    return mean, [record["id"] for record in found]


def _newest(records: Records, experiment: str) -> dict[str, Any] | None:
    found = [record for record in records if record["experiment"] == experiment]
    return max(found, key=lambda record: (record["utc"], record["id"]), default=None)
