"""Records of language runs made by hand, for the tests of their study, tables, figures and claims."""

import math
from typing import Any

from entreg.records.record import new_record


def text(
    plan: str,
    level: float,
    windows: list[float],
    *,
    task: str = "perplexity",
    realised: float | None = None,
    context: int = 2048,
    split: str = "test",
    **more: Any,
) -> dict[str, Any]:
    """One row of losses, of plain text or of copying; realised as asked for unless told otherwise."""
    loss = sum(windows) / len(windows)
    return {
        "task": task,
        "plan": plan,
        "level": level,
        "realised_sparsity": level if realised is None else realised,
        "decode_sparsity": None,
        "context": context,
        "split": split,
        "items": len(windows),
        "tokens": len(windows) * context,
        "loss": loss,
        "perplexity": math.exp(loss),
        "loss_per_item": windows,
        "seconds": 1.0,
        **more,
    }


def needle(plan: str, level: float, accuracy: float, **more: Any) -> dict[str, Any]:
    """One row of needle retrieval."""
    return _without_loss({**text(plan, level, [0.0], task="needle", **more), "items": 20, "accuracy": accuracy})


def summary(plan: str, level: float, rouge_l: float, to_dense: float | None = None, **more: Any) -> dict[str, Any]:
    """One row of summaries; decoding as sparse as prefill."""
    row = {**text(plan, level, [0.0], task="summary", **more), "items": 30, "rouge_l": rouge_l}
    row["decode_sparsity"] = level
    return _without_loss(row if to_dense is None else {**row, "rouge_l_to_dense": to_dense})


def _without_loss(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith(("loss", "perplexity"))}


def language_record(
    rows: list[dict[str, Any]],
    method: str = "none",
    seed: int = 0,
    *,
    experiment: str = "llm/smollm2",
    scale: str = "offline",
    utc: str = "2026-01-01T00:00:00Z",
    model: str = "smollm2",
    weights: str = "published",
    **metrics: Any,
) -> dict[str, Any]:
    """A valid record of one training method and seed, on a CPU whatever this machine has."""
    record = new_record(
        experiment=experiment,
        scale=scale,
        config={"method": method, "seed": seed, "device": "cpu", "dtype": "float32", "threads": 2},
        command="make reproduce-llm",
        dataset={"name": "wikipedia_sample"},
        model={"name": model, "revision": {"source": f"{model}, {weights} weights"}},
        seed=seed,
        repeats=1,
        metrics=metrics,
        rows=rows,
        wall_seconds=1.0,
    )
    return {**record, "utc": utc}


def timed(
    method: str,
    seconds: float,
    *,
    role: str = "ours",
    phase: str = "prefill",
    context: int = 4096,
    batch: int = 1,
    realised: float | None = 0.75,
    dense: float = 1.0,
    model: str = "smollm2",
    dtype: str = "bfloat16",
    **more: Any,
) -> dict[str, Any]:
    """One row of the speed record: ``dense`` is the time of the dense model in the same rounds."""
    row = {
        "model": model,
        "phase": phase,
        "context": context,
        "batch": batch,
        "dtype": dtype,
        "method": method,
        "role": role,
        "kernel": "sdpa" if role == "baseline" else "gather",
        "realised_sparsity": 0.0 if role == "baseline" else realised,
        "seconds": seconds,
        "seconds_min": 0.995 * seconds,
        "seconds_max": 1.005 * seconds,
        "rounds": 7,
        "calls_per_round": 1,
        "tokens_per_second": (context if phase == "prefill" else 1) * batch / seconds,
        "peak_bytes": None,
        "speedup_over_dense": dense / seconds,
        "attention_share": 0.5,
        "bound": None if role == "baseline" else 1.0 / (1.0 - 0.5 * (realised or 0.0)),
        "selection_seconds": None if role == "baseline" else 0.1 * seconds,
        "compilation": "none",
    }
    if phase == "decode":
        row["milliseconds_per_token"] = 1e3 * seconds
    return {**row, **more}


def speed_record(
    rows: list[dict[str, Any]],
    *,
    scale: str = "offline",
    utc: str = "2026-01-01T00:00:00Z",
    model: str = "smollm2",
    weights: str = "published",
    gpu: str | None = None,
    number: int = 0,
) -> dict[str, Any]:
    """A valid record of speed, on a CPU with two threads or a GPU, whatever this machine has."""
    device = "cpu" if gpu is None else "cuda"
    record = new_record(
        experiment="llm/speed",
        scale=scale,
        config={"number": number, "model": model, "device": device, "threads": 2},
        command="make bench-llm",
        dataset={"name": "random tokens"},
        model={"name": model, "weights": f"{weights} weights"},
        seed=0,
        repeats=7,
        metrics={"threads": 2},
        rows=rows,
        wall_seconds=1.0,
    )
    return {**record, "utc": utc, "device": {**record["device"], "gpu": gpu}}
