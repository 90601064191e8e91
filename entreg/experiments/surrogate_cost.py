"""What the surrogates cost: time and memory of forward and backward, against one block of ViT-Base.

The paper's reviewers name 2-12 % extra training cost. Here each surrogate's own forward and backward pass (gradients
of its inputs and parameters included) is timed in turn with a training step (forward and backward, all gradients) of
one stock timm ViT-Base block in the same process. A fraction of one block's step is also the fraction of a whole
model's when every block carries the surrogate.

Peak memory is the largest sum of live allocations during one forward and backward, read from the allocator's events
in a trace of torch's profiler (``profile_memory``; tracemalloc does not see tensors, and the resident size of the
process does not shrink when they are freed); on CUDA it is ``torch.cuda.max_memory_allocated``. Inputs and parameters
that exist before are not counted, the returned gradients are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from entreg.atomic import require_writable
from entreg.entropy import BallEntropy, HalfspaceEntropy, attention_key_entropy, attention_row_entropy
from entreg.errors import ConfigError
from entreg.experiments.measuring import Step, peak_memory
from entreg.experiments.timing import interleaved_timings
from entreg.names import require_known
from entreg.records.record import new_record
from entreg.records.store import RecordStore

EXPERIMENT = "benchmark/regularizer_cost"
BLOCK_TOKENS, BLOCK_DIM, BLOCK_HEADS = 197, 768, 12
HEAD_DIM = 64
SURROGATES = ("ball", "halfspace", "row_entropy", "key_entropy")


def block_step(batch: int, device: torch.device) -> Step:
    """Forward and backward of one stock ViT-Base block (197 tokens of 768 numbers, 12 heads, float32).

    Raises:
        ConfigError: timm is not installed.
    """
    try:
        from timm.models.vision_transformer import Block
    except ModuleNotFoundError as error:
        raise ConfigError("the cost benchmark compares with timm's ViT-Base block: install entreg[vision]") from error
    block = Block(BLOCK_DIM, BLOCK_HEADS, qkv_bias=True).to(device).train()
    tokens = torch.randn(batch, BLOCK_TOKENS, BLOCK_DIM, device=device, requires_grad=True)
    upstream = torch.randn_like(tokens)
    wanted = [tokens, *block.parameters()]
    return lambda: torch.autograd.grad(block(tokens), wanted, upstream)


def surrogate_step(surrogate: str, batch: int, tokens: int, dim: int, cells: int | None, device: torch.device) -> Step:
    """Forward and backward of one surrogate.

    Args:
        surrogate: one of :data:`SURROGATES`.
        batch: point sets, or sequences.
        tokens: points per set, or sequence length.
        dim: coordinates per point; for attention the model's width, in heads of 64.
        cells: anchors of the ball surrogate, cells (a power of two) of the halfspace surrogate, sampled query rows of
            the attention entropies; None for exact attention entropies.
        device: where it runs.

    Raises:
        ConfigError: a combination that does not exist.
    """
    require_known([surrogate], SURROGATES, "surrogate")
    if surrogate in ("ball", "halfspace"):
        points = torch.randn(batch, tokens, dim, device=device, requires_grad=True)
        if surrogate == "ball":
            module = BallEntropy(cells, dim)
        else:
            halfspaces = cells.bit_length() - 1
            if 2**halfspaces != cells:
                raise ConfigError(f"the halfspace surrogate has a power of two of cells, not {cells}")
            module = HalfspaceEntropy(halfspaces, dim)
        module = module.to(device).initialize_from(points, method="random")
        return _gradients(lambda: module(points), [points, *module.parameters()])
    if dim % HEAD_DIM:
        raise ConfigError(f"attention entropies need a width that is a multiple of {HEAD_DIM}, not {dim}")
    shape = (batch, dim // HEAD_DIM, tokens, HEAD_DIM)
    q = torch.randn(shape, device=device, requires_grad=True)
    k = torch.randn(shape, device=device, requires_grad=True)
    entropy = attention_row_entropy if surrogate == "row_entropy" else attention_key_entropy
    return _gradients(lambda: entropy(q, k, num_sampled_queries=cells), [q, k])


def _gradients(forward: Callable[[], Tensor], wanted: Sequence[Tensor]) -> Step:
    return lambda: torch.autograd.grad(forward().mean(), wanted)


def run(config: Mapping[str, object], *, command: str = "", scale: str = "offline") -> dict[str, object]:
    """Measure every case once and return the run record.

    Args:
        config: ``batch``; ``cases``, a list of mappings with ``surrogate``, ``tokens``, ``dim`` and ``cells`` as in
            :func:`surrogate_step`, the first case of each surrogate being the one whose fraction is the headline;
            ``repeats``, counted rounds; ``seed``; ``threads``, None for torch's own choice; ``device``.
        command: what to type to repeat the run.
        scale: one of :data:`entreg.records.SCALES`.

    Raises:
        ConfigError: an impossible case, no CUDA device where one is asked for, or timm is missing.
    """
    start = time.perf_counter()
    device = torch.device(config["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no CUDA device")
    threads_before = torch.get_num_threads()
    torch.set_num_threads(config["threads"] or threads_before)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config["seed"])
            rows, block = _measure(config, device)
    finally:
        torch.set_num_threads(threads_before)
    headline = {}
    for row in rows:
        headline.setdefault(row["surrogate"], row["fraction_of_block"])
    return new_record(
        experiment=EXPERIMENT,
        scale=scale,
        config=config,
        command=command,
        dataset={"name": "standard normal tensors", "seed": config["seed"]},
        model={"name": "timm vision_transformer.Block, ViT-Base", **block},
        seed=config["seed"],
        repeats=config["repeats"],
        metrics={"fraction_of_block": headline, "largest_fraction_of_block": max(headline.values())},
        rows=rows,
        wall_seconds=time.perf_counter() - start,
    )


def _measure(config: Mapping[str, object], device: torch.device) -> tuple[list[dict[str, object]], dict[str, object]]:
    batch = config["batch"]
    steps: dict[str, Step] = {}
    for index, case in enumerate(config["cases"]):
        steps[str(index)] = surrogate_step(case["surrogate"], batch, case["tokens"], case["dim"], case["cells"], device)
    if not steps:
        raise ConfigError("the cost benchmark needs at least one case")
    steps["block"] = block_step(batch, device)
    timings = interleaved_timings(
        steps,
        repeats=config["repeats"],
        synchronize=(lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else None,
    )
    block = timings["block"]
    block_memory = peak_memory(steps["block"], device)
    rows = []
    for index, case in enumerate(config["cases"]):
        timing = timings[str(index)]
        memory = peak_memory(steps[str(index)], device)
        rows.append(
            {
                **case,
                "batch": batch,
                "seconds": timing.median,
                "seconds_min": timing.minimum,
                "seconds_max": timing.maximum,
                "fraction_of_block": timing.median / block.median,
                "peak_bytes": memory,
                "peak_fraction_of_block": memory / block_memory,
            }
        )
    facts = {
        "tokens": BLOCK_TOKENS,
        "dim": BLOCK_DIM,
        "heads": BLOCK_HEADS,
        "seconds": block.median,
        "seconds_min": block.minimum,
        "seconds_max": block.maximum,
        "peak_bytes": block_memory,
    }
    return rows, facts


def cost_cases(tokens: Sequence[int], dims: Sequence[int], cells: Sequence[int | None]) -> list[dict[str, object]]:
    """Cases of every surrogate: the first of each list together, then each list varied alone.

    A cell count of None (exact attention entropies) is left out for the surrogates that have none.
    """
    base = (tokens[0], dims[0], cells[0])
    grid = [base]
    for axis, values in enumerate((tokens, dims, cells)):
        grid += [(*base[:axis], value, *base[axis + 1 :]) for value in values[1:]]
    return [
        {"surrogate": surrogate, "tokens": n, "dim": d, "cells": k}
        for surrogate in SURROGATES
        for n, d, k in grid
        if k is not None or surrogate not in ("ball", "halfspace")
    ]


def run_regularizer_cost(
    *,
    batch: int,
    tokens: Sequence[int],
    dims: Sequence[int],
    cells: Sequence[int | None],
    profile: Mapping[str, object],
    store: str | Path,
    command: str,
    threads: int | None = None,
    device: str = "cpu",
    force: bool = False,
) -> list[Path]:
    """Run the cost benchmark and save its record.

    Args:
        batch: point sets per call.
        tokens, dims, cells: see :func:`cost_cases`; the first of each is the headline case.
        profile: the configuration group ``profile`` (``name``, ``repeats``, ``seeds``).
        store: folder of the records.
        command: what to type to repeat the run.
        threads: CPU threads; None for torch's own choice.
        device: ``cpu`` or ``cuda``.
        force: run again what has a record already.

    Returns:
        The record's file, as a list of one.

    Raises:
        ConfigError: an impossible combination of values, or timm is missing.
    """
    for name, values in (("batch", [batch]), ("tokens", tokens), ("dims", dims), ("cells", cells)):
        if not values or any(value is not None and value < 1 for value in values) or values[0] is None:
            raise ConfigError(f"{name} must start with a positive number and hold no other, got {list(values)}")
    config = {
        "batch": batch,
        "cases": cost_cases(tokens, dims, cells),
        "repeats": profile["repeats"],
        "seed": profile["seeds"][0],
        "threads": threads,
        "device": device,
        "profile": profile["name"],
    }
    require_writable(store)
    records = RecordStore(store)
    if not force and records.find(EXPERIMENT, config) is not None:
        return [records.path_for(EXPERIMENT, config)]
    return [records.save(run(config, command=command, scale=profile["name"]))]
