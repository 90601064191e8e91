"""Table of what the surrogates cost against one ViT-Base block."""

from typing import Any

from entreg.records.record import current_records
from entreg.records.tables import Table, percent, register_table, seconds

# Where the same aim is stated: configs/benchmark/regularizer_cost.yaml.
AIM = 0.02

LABELS = {
    "ball": "ball entropy",
    "halfspace": "halfspace entropy",
    "row_entropy": "attention row entropy",
    "key_entropy": "attention key entropy",
}


@register_table("regularizer-cost", experiments=("benchmark/regularizer_cost",))
def regularizer_cost_table(records: list[dict[str, Any]]) -> Table | None:
    """A row per surrogate and size: seconds, share of the block's step, memory."""
    chosen = current_records(records)
    if not chosen:
        return None
    record = chosen[-1]
    block, config = record["model"], record["config"]
    rows = []
    headlines: set[str] = set()
    for row in record["rows"]:
        share = percent(row["fraction_of_block"])
        if row["surrogate"] not in headlines:
            headlines.add(row["surrogate"])
            share = f"**{share}**"
        rows.append(
            [
                LABELS[row["surrogate"]],
                str(row["tokens"]),
                str(row["dim"]),
                "all rows" if row["cells"] is None else str(row["cells"]),
                seconds(row["seconds"]),
                share,
                f"{row['peak_bytes'] / 2**20:.1f} MiB",
                percent(row["peak_fraction_of_block"]),
            ]
        )
    largest = record["metrics"]["largest_fraction_of_block"]
    threads = config["threads"] or "all"
    return Table(
        name="regularizer-cost",
        title="Cost of the entropies, forward and backward, against one ViT-Base block",
        columns=(
            "entropy",
            "tokens",
            "width",
            "cells or sampled rows",
            "time",
            "of block's step",
            "peak memory",
            "of block's peak",
        ),
        rows=rows,
        notes=(
            f"Aim: each under {percent(AIM)} of the block's step in its first row (bold). Largest there: "
            f"{percent(largest)}, {'met' if largest < AIM else 'missed'}.",
            f"Block: forward and backward of one stock timm ViT-Base block, {block['tokens']} tokens, width "
            f"{block['dim']}, {block['heads']} heads, {seconds(block['seconds'])}, "
            f"{block['peak_bytes'] / 2**20:.1f} MiB. Batch {config['batch']}, float32, {threads} thread(s), "
            f"{config['device']}; medians of {config['repeats']} interleaved rounds.",
            "Every row is compared with the same block, whatever its own tokens and width. Memory is the most that is "
            "allocated at once beyond inputs and parameters, gradients included.",
        ),
        record_ids=(record["id"],),
    )
