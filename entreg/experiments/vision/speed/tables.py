"""Tables of the vision speed benchmark: the paper's four cells, every plan, and rivals at equal throughput."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from entreg.records.record import SCALES
from entreg.records.tables import MISSING, Table, TracedRow, number, percent, ratio, register_table, seconds

EXPERIMENT = "vit/speed"
HEADLINE_BATCH = {"reproduce": 32, "offline": 32, "paper": 256}
"""Batch at which verdicts and the four cells are given (our choice; the paper names none), or the next smaller one."""
AIM = 2.07
WANTED_SPARSITY = 0.8
# A whole number of tokens cannot hit a sparsity exactly.
SPARSITY_TOLERANCE = 0.015

Row = Mapping[str, Any]
Records = Sequence[dict[str, Any]]

MODEL_LABELS = {
    "vit_base_224": "ViT-Base/16 at 224",
    "vit_base_384": "ViT-Base/16 at 384",
    "scenes": "digit scenes' ViT, 48 x 48",
}

_WORDS = {
    "tokens": "tokens dropped",
    "partition": "tokens, soft partition",
    "columns": "key columns",
    "token_merging": "token merging (ToMe)",
    "class_token_dropping": "tokens dropped by the class token's row",
}
_TAKE_A_NUMBER = ("keep", "layer")


def plan_label(method: str) -> str:
    """What tables call a plan: ``tokens_80_previous`` is ``tokens dropped, 80 %, previous``."""
    beginning = max((one for one in _WORDS if method == one or method.startswith(f"{one}_")), key=len, default=None)
    if beginning is None:
        return method.replace("_", " ")
    number_before = "r = " if beginning == "token_merging" else ""
    parts = [_WORDS[beginning]]
    for word in filter(None, method[len(beginning) :].split("_")):
        if word.isdigit() and parts[-1] not in _TAKE_A_NUMBER:
            parts.append(f"{number_before}{word}" + ("" if number_before else " %"))
        elif word.isdigit():
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    return ", ".join(parts)


@dataclass(frozen=True)
class Setting:
    """Everything that must be the same for two times to be compared, but the batch: one record."""

    record: dict[str, Any]

    @property
    def title(self) -> str:
        """Model, dtype, compilation and device in words."""
        config, device = self.record["config"], self.record["device"]
        where = device["gpu"] if config["device"] == "cuda" else f"CPU, {self.record['metrics']['threads']} thread(s)"
        compiled = "" if config["compilation"] == "none" else f", compiled ({config['compilation']})"
        return f"{MODEL_LABELS.get(config['model'], config['model'])}, {config['dtype']}{compiled}, {where}"

    @property
    def batches(self) -> list[int]:
        """Batch sizes, ascending."""
        return sorted({row["batch"] for row in self.record["rows"]})

    @property
    def headline_batch(self) -> int:
        """The largest batch not above :data:`HEADLINE_BATCH`, or the smallest there is."""
        wanted = HEADLINE_BATCH.get(self.record["scale"], 1)
        return max((batch for batch in self.batches if batch <= wanted), default=self.batches[0])

    def rows(self, batch: int) -> list[Row]:
        """The rows of one batch size, as measured."""
        return [row for row in self.record["rows"] if row["batch"] == batch]

    def get(self, batch: int, method: str, fused: bool) -> Row | None:
        """One row, or None when not measured."""
        found = [row for row in self.rows(batch) if row["method"] == method and is_fused(row) == fused]
        return found[0] if found else None

    def at_wanted_sparsity(self, batch: int, fused: bool, kind: str) -> list[Row]:
        """Our rows of one kind of plan at 80 % realised sparsity, fastest first."""
        plans = self.record["config"]["plans"]
        found = [
            row
            for row in self.rows(batch)
            if row["role"] == "ours"
            and is_fused(row) == fused
            and plans[row["method"]]["kind"] == kind
            and abs(row["realised_sparsity"] - WANTED_SPARSITY) <= SPARSITY_TOLERANCE
        ]
        return sorted(found, key=lambda row: row["seconds"])


def is_fused(row: Row) -> bool:
    """Whether a row's attention was fused."""
    return row["cell"].endswith("+ fused")


def is_bound(row: Row) -> bool:
    """Whether a row's ``bound`` is one: of a plan that leaves out score entries and nothing else (Amdahl).

    A plan with fewer tokens shrinks all of the model's products. In proportion to them, its time would shrink to what
    the row says; but smaller products may also take less time each, for their operands fit into caches.
    """
    return row["bound"] <= row["bound_attention_alone"] * (1 + 1e-9)


def speed_settings(records: Iterable[dict[str, Any]]) -> list[Setting]:
    """One setting per model, dtype, compilation, kind of device and scale: the newest record of each."""
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in sorted(records, key=lambda one: (one["utc"], one["id"])):
        if record["experiment"] != EXPERIMENT:
            continue
        config = record["config"]
        scale = SCALES.index(record["scale"])
        key = (-scale, *(str(config[name]) for name in ("model", "device", "dtype", "compilation", "threads")))
        newest[key] = record
    # The paper's own model first.
    ordered = sorted(newest, key=lambda key: (key[0], not key[1].startswith("vit_base"), *key[1:]))
    return [Setting(newest[key]) for key in ordered]


_COSTS = (
    "Forward passes from images to logits, everything counted: scores, gathers, merges. Random weights: speed only. "
    "Medians of interleaved rounds in one process."
)


@register_table("vision-speed-cells", experiments=(EXPERIMENT,))
def four_cells(records: Records) -> Table | None:
    """Dense and sparse, unfused and fused, as in the paper's claim; the fastest token plan and the fastest columns."""
    rows = []
    settings = speed_settings(records)
    for setting in settings:
        batch = setting.headline_batch
        unfused, fused = (setting.get(batch, "dense", choice) for choice in (False, True))
        for kind, word in (("tokens", "tokens"), ("columns", "columns only")):
            slow = setting.at_wanted_sparsity(batch, False, kind)
            fast = setting.at_wanted_sparsity(batch, True, kind)
            if not unfused or not fused or not fast:
                continue
            cells = [
                setting.title,
                str(batch),
                f"{word}: {plan_label(fast[0]['method'])}",
                seconds(unfused["seconds"]),
                _time_and_gain(fused),
                _time_and_gain(slow[0]) if slow else MISSING,
                _time_and_gain(fast[0]),
                ratio(fast[0]["speedup_over_dense_fused"]),
                ratio(fast[0]["bound_attention_alone"]),
                ratio(fast[0]["bound"]),
            ]
            rows.append(TracedRow(cells, [setting.record["id"]]))
    if not rows:
        return None
    return Table(
        name="vision-speed-cells",
        title="The paper's four cells at 80 % realised sparsity: time of a batch and speed-up over dense unfused",
        columns=(
            "model, precision, device",
            "batch",
            "sparse plan",
            "dense",
            "dense, fused",
            "sparse",
            "sparse, fused",
            "sparse fused over dense fused",
            "Amdahl: attention alone",
            "in proportion to the work",
        ),
        rows=rows,
        align="lll" + "r" * 7,
        notes=(
            _COSTS,
            f"The paper claims 1.60x (sparse), 1.63x (dense, fused) and {AIM}x (sparse, fused), all over dense; it "
            "names no batch. Fused is torch's scaled dot product attention (FlashAttention's algorithm).",
            "Amdahl's bound is on the speed-up over dense fused: what skipping the plan's score entries could bring if "
            "nothing else changed. In proportion to the work: the speed-up if choosing tokens cost nothing and the "
            "time of each part shrank as its tokens and entries do; no bound, for smaller products may take less time "
            "each. Shares of the time are measured by leaving attention's products out of the model.",
        ),
        record_ids=tuple(setting.record["id"] for setting in settings),
    )


@register_table("vision-speed", experiments=(EXPERIMENT,))
def all_plans(records: Records) -> Table | None:
    """Every candidate at every batch size."""
    settings = speed_settings(records)
    rows = [
        TracedRow(
            [
                setting.title,
                str(batch),
                _method(row),
                row["cell"],
                row["kernel"],
                percent(row["realised_sparsity"]),
                seconds(row["seconds"]),
                f"{seconds(row['seconds_min'])} to {seconds(row['seconds_max'])}",
                number(row["images_per_second"]),
                ratio(row["speedup_over_dense"]),
                ratio(row["speedup_over_dense_fused"]),
                percent(row["attention_share"]),
                ratio(row["bound"]),
                MISSING if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB",
            ],
            [setting.record["id"]],
        )
        for setting in settings
        for batch in setting.batches
        for row in setting.rows(batch)
    ]
    if not rows:
        return None
    return Table(
        name="vision-speed",
        title="Speed of dense and sparse vision transformers",
        columns=(
            "model, precision, device",
            "batch",
            "plan",
            "cell",
            "kernels",
            "sparsity",
            "time",
            "range",
            "images/s",
            "over dense",
            "over dense fused",
            "attention's share",
            "in proportion to the work",
            "peak memory",
        ),
        rows=rows,
        align="lllll" + "r" * 9,
        notes=(
            _COSTS,
            "Kernels: which attention kernels ran, and how often in one pass; `math` beside another one is the "
            "attention of the sampled queries from which a selection score comes. Attention's share and the speed-up "
            "in proportion to the work (if the time of each part shrank as its tokens and entries do; of key columns "
            "it is Amdahl's bound) refer to the dense cell with the same kind of attention.",
            "`given`: random columns that cost nothing to choose, the most that columns can bring. Rivals: token "
            "merging by its published rule, and dropping by the class and register tokens' attention alone.",
        ),
        record_ids=tuple(setting.record["id"] for setting in settings),
    )


@register_table("vision-speed-rivals", experiments=(EXPERIMENT,))
def equal_throughput(records: Records) -> Table | None:
    """For each rival, the token plan of ours that is nearest in time at the headline batch."""
    rows = []
    settings = speed_settings(records)
    for setting in settings:
        batch = setting.headline_batch
        fused = [row for row in setting.rows(batch) if is_fused(row)]
        kinds = {name: plan["kind"] for name, plan in setting.record["config"]["plans"].items()}
        ours = [row for row in fused if row["role"] == "ours" and kinds[row["method"]] == "tokens"]
        for rival in (row for row in fused if row["role"] == "rival"):
            if not ours:
                continue
            near = min(ours, key=lambda row, rival=rival: abs(row["seconds"] - rival["seconds"]))
            cells = [
                setting.title,
                str(batch),
                plan_label(rival["method"]),
                percent(rival["realised_sparsity"]),
                number(rival["images_per_second"]),
                ratio(rival["speedup_over_dense_fused"]),
                plan_label(near["method"]),
                percent(near["realised_sparsity"]),
                number(near["images_per_second"]),
                ratio(near["speedup_over_dense_fused"]),
            ]
            rows.append(TracedRow(cells, [setting.record["id"]]))
    if not rows:
        return None
    return Table(
        name="vision-speed-rivals",
        title="Rivals and our token plan of the nearest throughput, fused attention",
        columns=(
            "model, precision, device",
            "batch",
            "rival",
            "its sparsity",
            "images/s",
            "over dense fused",
            "our nearest plan",
            "sparsity",
            "images/s",
            "over dense fused",
        ),
        rows=rows,
        align="lll" + "rrr" + "l" + "rrr",
        notes=(_COSTS, "Accuracies of the same plans are in the tables of the vision experiments."),
        record_ids=tuple(setting.record["id"] for setting in settings),
    )


def _method(row: Row) -> str:
    if row["role"] == "baseline":
        return "dense"
    label = plan_label(row["method"])
    return f"{label} (rival)" if row["role"] == "rival" else label


def _time_and_gain(row: Row) -> str:
    return f"{seconds(row['seconds'])} ({ratio(row['speedup_over_dense'])})"
