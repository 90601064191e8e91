"""Table of what each regulariser adds to a training step of a whole vision transformer."""

from __future__ import annotations

from typing import Any

from entreg.experiments.method_names import label
from entreg.records.record import current_records
from entreg.records.tables import MISSING, Table, percent, register_table, seconds

EXPERIMENT = "benchmark/training_cost"
PLAIN = "plain"
# Where the same aim is stated: configs/benchmark/training_cost.yaml.
AIM = 0.02


def change(fraction: float) -> str:
    """An overhead with its sign, for example ``+1.2 %``."""
    return ("+" if fraction >= 0 else "−") + percent(abs(fraction))


@register_table("training-cost", experiments=(EXPERIMENT,))
def training_cost_table(records: list[dict[str, Any]]) -> Table | None:
    """A row per method: seconds of a step, what it adds to a plain one, memory."""
    chosen = current_records(records)
    if not chosen:
        return None
    record = chosen[-1]
    config = record["config"]
    rows = [
        [
            f"**{label(row['method'])}**" if row["method"] == config["ours"] else label(row["method"]),
            seconds(row["seconds"]),
            f"{seconds(row['seconds_min'])} to {seconds(row['seconds_max'])}",
            MISSING if row["method"] == PLAIN else change(row["step_overhead"]),
            MISSING if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB",
        ]
        for row in record["rows"]
    ]
    dense = [row for row in record["rows"] if row["method"] != PLAIN and not _sparse(config, row["method"])]
    within = sum(row["step_overhead"] <= AIM for row in dense)
    device = record["device"]["gpu"] if config["device"] == "cuda" else f"CPU, {record['metrics']['threads']} thread(s)"
    return Table(
        name="training-cost",
        title=f"Cost of regularisers in a training step of {config['model']}",
        columns=("method", "step", "range", "against plain", "peak memory"),
        rows=rows,
        notes=(
            f"A step: forward, loss, backward, AdamW; batch {config['batch']}, {config['precision']}, {device}, "
            f"random weights, attention fused; medians of {config['repeats']} interleaved rounds.",
            f"Aim: at most {percent(AIM)} over a plain step; {within} of {len(dense)} regularisers are within it. "
            "Methods with a loop train with the sparse path active, whose steps are shorter.",
            "Probes and entropies act on all layers except where one layer is said; attention entropies look at 32 "
            "sampled rows.",
        ),
        record_ids=(record["id"],),
    )


def _sparse(config: dict[str, Any], method: str) -> bool:
    return bool(config["methods"][method].get("sparsity"))
