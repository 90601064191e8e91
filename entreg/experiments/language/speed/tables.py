"""Tables of the language models' speed: prefill by context, decode by context and batch, each beside Amdahl's bound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from entreg.experiments.language.study import (
    CLAIMED_SPARSITY,
    SPARSITY_TOLERANCE,
    SPEED,
    WANTED_SPARSITY,
    is_default,
    model_label,
    plan_label,
    random_weights,
    where,
)
from entreg.records.record import SCALES
from entreg.records.tables import (
    MISSING,
    NOT_RUN,
    Cell,
    Table,
    TracedRow,
    number,
    percent,
    ratio,
    register_table,
    seconds,
)

Row = Mapping[str, Any]
Records = Sequence[dict[str, Any]]

_ROLES = ("baseline", "ours", "rival", "bound")


@dataclass(frozen=True)
class SpeedCell:
    """What was timed against each other in interleaved rounds: one model, phase, dtype, context and batch.

    Attributes:
        record: the record that it comes from.
        model, phase, dtype, context, batch: of all its rows.
        rows: baselines first, then ours, rivals and bounds.
    """

    record: Mapping[str, Any]
    model: str
    phase: str
    dtype: str
    context: int
    batch: int
    rows: tuple[Row, ...]

    @property
    def device(self) -> str:
        return where(self.record)

    @property
    def title(self) -> str:
        """Model, weights, precision, device and scale, without which no time may be read."""
        weights = ", random weights: speed only" if random_weights(self.record) else ""
        return f"{model_label(self.model)}{weights}, {self.dtype}, {self.device}, {self.record['scale']}"

    def default_plan(self, wanted: tuple[float, float] = (WANTED_SPARSITY, WANTED_SPARSITY)) -> Row | None:
        """The default plan's row whose realised sparsity lies in a range and is nearest to 75 %, or None."""
        low, high = wanted
        found = [
            row
            for row in self.rows
            if row["role"] == "ours"
            and is_default(row["method"])
            and row["realised_sparsity"] is not None
            and low - SPARSITY_TOLERANCE <= row["realised_sparsity"] <= high + SPARSITY_TOLERANCE
        ]
        return min(found, key=lambda row: abs(row["realised_sparsity"] - WANTED_SPARSITY), default=None)

    def at_claimed_sparsity(self) -> Row | None:
        """The default plan's row at 70 to 75 % realised sparsity, the one nearest to 75 %."""
        return self.default_plan(CLAIMED_SPARSITY)


def speed_cells(records: Iterable[Mapping[str, Any]], phase: str | None = None) -> list[SpeedCell]:
    """All cells, each from the newest record that has it: by model, dtype, device, phase, batch and context."""
    found: dict[tuple[Any, ...], SpeedCell] = {}
    for record in sorted(records, key=lambda one: (one["utc"], one["id"])):
        if not record["experiment"].startswith(SPEED):
            continue
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in record["rows"]:
            groups.setdefault((row["model"], row["phase"], row["dtype"], row["context"], row["batch"]), []).append(row)
        for key, rows in groups.items():
            if phase in (None, key[1]):
                rows.sort(key=lambda row: _ROLES.index(row["role"]))
                cell = SpeedCell(record, *key, tuple(rows))
                found[-SCALES.index(record["scale"]), cell.title, cell.phase, cell.batch, cell.context] = cell
    return [found[key] for key in sorted(found)]


_COSTS = (
    "Whole forward passes, everything counted: selection, gathers, cache. Medians of interleaved rounds in one "
    "process; speed-up is over the row dense, the fastest of all ways to run the dense model (fused attention, plain "
    "products, every kind of cache) in the same rounds."
)
_SHARES = (
    "Selection: choosing the keys, measured alone, over the plan's time. Attention's share: of the dense time. "
    "Amdahl's bound: what skipping those score entries could bring at most if choosing them cost nothing. Rivals and "
    "baselines are marked; a plan's sparsity is realised, not asked for."
)


@register_table("llm-speed-prefill", experiments=(SPEED,))
def prefill(records: Records) -> Table | None:
    """Context by method: time of a prefill and where it goes."""
    cells = speed_cells(records, "prefill")
    rows = [
        TracedRow(
            [
                cell.title,
                f"{cell.context:,}",
                str(cell.batch),
                _method(row),
                seconds(row.get("seconds")),
                _range(row),
                *_shares(row),
            ],
            [cell.record["id"]],
        )
        for cell in cells
        for row in cell.rows
    ]
    if not rows:
        return None
    return Table(
        "llm-speed-prefill",
        "Time of a prefill by context",
        ["model, precision, device, scale", "context", "batch", "method", "time", "range", *_SHARE_COLUMNS],
        rows,
        notes=[_COSTS, _SHARES, "A prefill's time is the time to the first token."],
        align="lrrlrr" + "r" * 5 + "lr",
        record_ids=_ids(cells),
    )


@register_table("llm-speed-decode", experiments=(SPEED,))
def decode(records: Records) -> Table | None:
    """Cache length by batch by method: time of a token and where it goes."""
    cells = speed_cells(records, "decode")
    rows = [
        TracedRow(
            [
                cell.title,
                f"{cell.context:,}",
                str(cell.batch),
                _method(row),
                _milliseconds(row.get("milliseconds_per_token")),
                _tokens(row.get("tokens_per_second")),
                *_shares(row),
            ],
            [cell.record["id"]],
        )
        for cell in cells
        for row in cell.rows
    ]
    if not rows:
        return None
    return Table(
        "llm-speed-decode",
        "Time of a decoding step by context in the cache and batch",
        [
            *("model, precision, device, scale", "context", "batch", "method"),
            *("time per token", "tokens/s", *_SHARE_COLUMNS),
        ],
        rows,
        notes=[
            _COSTS,
            _SHARES,
            "Time per token: of one step, which gives every sequence of the batch one token; tokens/s counts them all.",
        ],
        align="lrrlrr" + "r" * 5 + "lr",
        record_ids=_ids(cells),
    )


_SHARE_COLUMNS = (
    *("over fastest dense", "realised sparsity", "selection", "attention's share", "Amdahl"),
    *("kernel", "peak memory"),
)


def _shares(row: Row) -> list[Cell]:
    sparse = row["role"] != "baseline"
    total, selecting = row.get("seconds"), row.get("selection_seconds")
    return [
        ratio(row.get("speedup_over_dense")),
        percent(row.get("realised_sparsity")) if sparse else MISSING,
        percent(selecting / total) if sparse and total and selecting is not None else MISSING,
        MISSING if row.get("attention_share") is None else percent(row["attention_share"]),
        MISSING if not sparse or row.get("bound") is None else ratio(row["bound"]),
        row.get("kernel") or MISSING,
        MISSING if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB",
    ]


def _method(row: Row) -> str:
    label = plan_label(row["method"])
    if row["role"] == "ours":
        return f"**{label}**" if is_default(row["method"]) else label
    return f"{label} ({row['role']})"


def _range(row: Row) -> str:
    ends = [row.get("seconds_min"), row.get("seconds_max")]
    return MISSING if None in ends else f"{seconds(ends[0])} to {seconds(ends[1])}"


def _milliseconds(value: float | None) -> str:
    return NOT_RUN if value is None else seconds(value / 1e3)


def _tokens(value: float | None) -> str:
    return NOT_RUN if value is None else number(float(value))


def _ids(cells: Sequence[SpeedCell]) -> list[str]:
    return sorted({cell.record["id"] for cell in cells})
