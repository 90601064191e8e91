"""How much faster a language model reads and writes by sparsity, all costs counted, against every rival.

*Prefill* is a whole forward pass from token ids to the logits of the last token, with the cache that it fills: the
time to the first token. *Decode* is one step of every sequence of a batch, with a cache of random keys and values that
grows as in ``generate``; summaries of pages are kept from step to step and brought up to date within the time. All
candidates of a context and batch run in turn in every round of one process. Beside each speed-up stands what Amdahl's
law allows: attention's share of the dense time, which is what a model without any attention saves, and the bound at the
plan's realised sparsity. Choosing blocks and pages is timed once more alone, on queries and keys of all layers.

``dense``, the base of ``speedup_over_dense``, is the fastest of all ways to run the dense model. For a prompt these are
SDPA, unfused attention, flash-attn where it is installed, and the products of the sparse path with nothing left out (on
a CPU in bfloat16). In decoding they are transformers' SDPA attention, with its dynamic and its static cache and with a
cache that grows in place, the same with query heads grouped by key head, fused or as two products, and the compiled
loops of the sparse path over all pages (on a CPU). ``speedup_over_fused`` leaves products and loops out: it is over the
fastest that goes through a fused kernel. Sparse candidates use the growing cache.

Without Hydra (a bare GPU machine needs torch, transformers, numpy, numba, scipy, safetensors, pyyaml and jsonschema)::

    import yaml
    from entreg.experiments.language.speed.benchmark import run_language_speed

    settings = yaml.safe_load(open("configs/benchmark/language_speed_gpu.yaml"))
    settings.pop("_target_")
    profile = {"name": "paper", "repeats": 21, "seeds": [0]}
    run_language_speed(**settings, profile=profile, store="outputs/runs", command="python scripts/benchmark.py ...")
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from entreg.adapters.growing_cache import require_full_attention
from entreg.adapters.language_models import (
    DTYPES,
    LanguageModel,
    load_language_model,
    random_language_model,
    require_context,
    require_language_model,
)
from entreg.atomic import require_writable
from entreg.errors import ConfigError, InputError
from entreg.experiments.language.speed.candidates import (
    DENSE,
    FREE_METHOD,
    UNFUSED,
    Cell,
    candidates_of,
    device_memory,
)
from entreg.experiments.language.speed.settings import (
    cells_of,
    checked_models,
    phases_within,
    require_possible_architecture,
)
from entreg.experiments.language.speed.steps import DecoderSizes
from entreg.experiments.measuring import amdahl_bound, peak_memory, speed_device
from entreg.experiments.timing import Timing, interleaved_timings
from entreg.names import require_choice
from entreg.progress import progress, progress_bar
from entreg.records.record import new_record
from entreg.records.store import RecordStore

EXPERIMENT = "llm/speed"
COMPILATIONS = ("none", "default", "reduce-overhead")
_CHOOSING = "choosing of "
# Fewer rounds tell no median from an outlier.
_LEAST_ROUNDS = 3
# The second call may compile once more, when it finds what the first one left; graphs are recorded after that.
_COMPILING_CALLS = 3
_KVPRESS = "kvpress 0.5 needs transformers below 5.3; it decodes as dense attention does with a cache of fewer keys"


def run_language_speed(
    *,
    models: Mapping[str, Mapping[str, Any]],
    phases: Mapping[str, Mapping[str, Sequence[int]] | None],
    dtypes: Sequence[str],
    compilations: Sequence[str],
    device: str,
    threads: int | None,
    eager_up_to: int,
    tokens_per_call: int,
    cell_seconds: float,
    profile: Mapping[str, Any],
    store: str | Path,
    command: str,
    force: bool = False,
) -> list[Path]:
    """Measure what has no record yet; one record per model, phase, context, batch, dtype and compilation.

    Args:
        models: name to ``{source, plans, rivals}``: ``source`` is ``{name: ...}`` of
            :func:`~entreg.adapters.language_models.load_language_model` or ``{architecture: ..., options: ...}`` of
            random weights; plans and rivals map names to sparsities of kind ``decoder``.
        phases: ``prefill`` and ``decode`` to ``{contexts, batches}``, or null for a phase that is left out. The context
            of decoding counts the token that is written.
        dtypes: ``float32``, ``bfloat16``, ``float16``.
        compilations: ``none``, or a mode of ``torch.compile``: ``default``, ``reduce-overhead``.
        device: ``cpu`` or ``cuda``.
        threads: CPU threads; None for torch's own choice.
        eager_up_to: longest context at which unfused attention is measured, too.
        tokens_per_call: tokens that are written between two starts at the same length, at least 1.
        cell_seconds: about how long one context and batch may take; there are fewer rounds, at least 3, where all of
            the profile's would take longer.
        profile: the configuration group ``profile``: ``name`` (the records' scale), ``repeats``, ``seeds`` (the first
            is used) and perhaps ``language``: ``plans`` (these only; null: all), ``model`` (a source in place of the
            models' own) and ``speed``: ``max_context`` (longer ones are cut to it), ``cell_seconds``, ``dtypes`` in
            place of the benchmark's.
        store: folder of the records.
        command: what to type to repeat the run.
        force: measure again what has a record already.

    Returns:
        The records' files.

    Raises:
        ConfigError: an unknown or impossible value; nothing has been measured then.
        InputError: a context that the model is not made for, or a model with sliding windows; likewise.
        AssetError: a model that cannot be had.
    """
    limits = profile.get("language", {})
    speed = limits.get("speed", {})
    configs = [
        {
            "model": name,
            **model,
            # A record of its own for each, so that one that fails or is killed does not take the others with it.
            "phases": {phase: {"contexts": [context], "batches": [batch]}},
            "dtype": dtype,
            "compilation": compilation,
            "eager_up_to": eager_up_to,
            "tokens_per_call": tokens_per_call,
            "cell_seconds": speed.get("cell_seconds") or cell_seconds,
            "repeats": profile["repeats"],
            "seed": profile["seeds"][0],
            "threads": threads,
            "device": device,
            "profile": profile["name"],
        }
        for name, model in checked_models(models, limits).items()
        for phase, sizes in phases_within(phases, speed.get("max_context"), tokens_per_call).items()
        for context in sizes["contexts"]
        for batch in sizes["batches"]
        for dtype in speed.get("dtypes") or dtypes
        for compilation in compilations
    ]
    speed_device(device)
    if not configs:
        raise ConfigError("the speed benchmark needs a model, a phase, a dtype and a compilation")
    for config in configs:
        require_choice("dtype", config["dtype"], DTYPES)
        require_choice("compilation", config["compilation"], COMPILATIONS)
        require_possible_architecture(config)
    require_writable(store)
    records = RecordStore(store)
    missing = [config["source"] for config in configs if force or records.find(EXPERIMENT, config) is None]
    for name in dict.fromkeys(source["name"] for source in missing if "name" in source):
        require_language_model(name)
    paths = []
    last: tuple[Any, LanguageModel] | None = None
    for config in progress(configs, "language models' speed"):
        if force or records.find(EXPERIMENT, config) is None:
            wanted = {key: config[key] for key in ("source", "dtype", "device", "seed")}
            if last is None or last[0] != wanted:
                # The old model's memory first.
                last = None
                last = wanted, _load(config)
                sizes = [one["phases"] for one in configs if wanted.items() <= one.items()]
                _require_possible_model(last[1], [cell for phase in sizes for cell in cells_of(phase)])
            records.save(run(config, last[1], command=command, scale=profile["name"]))
        paths.append(records.path_for(EXPERIMENT, config))
    return paths


def run(
    config: Mapping[str, Any], loaded: LanguageModel, *, command: str = "", scale: str = "offline"
) -> dict[str, Any]:
    """Measure one model and return the run record.

    Args:
        config: see :func:`run_language_speed`, whose records carry it.
        loaded: its model.
        command: what to type to repeat the run.
        scale: one of :data:`entreg.records.SCALES`.
    """
    start = time.perf_counter()
    device = speed_device(config["device"])
    threads_before = torch.get_num_threads()
    torch.set_num_threads(config["threads"] or threads_before)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(config["seed"])
            cells = list(cells_of(config["phases"]))
            left_out = _too_large(loaded.model, cells, device)
            kept = [cell for cell in cells if str(cell) not in left_out]
            not_run = {"kvpress": _KVPRESS}
            rows = [row for cell in kept for row in measure(loaded.model, cell, config, device, not_run)]
        threads = torch.get_num_threads()
    finally:
        torch.set_num_threads(threads_before)
    sizes, random = DecoderSizes.of(loaded.model), loaded.tokenizer is None
    return new_record(
        experiment=EXPERIMENT,
        scale=scale,
        config=config,
        command=command,
        dataset={"name": "random tokens; random keys and values in the cache", "seed": config["seed"]},
        model={
            "name": loaded.name,
            "weights": "random weights: speed only" if random else "published weights",
            "revision": loaded.revision,
            "parameters": sizes.parameters,
            "layers": sizes.layers,
            "heads": sizes.heads,
            "key_heads": sizes.key_heads,
            "head_dim": sizes.head_dim,
        },
        seed=config["seed"],
        repeats=config["repeats"],
        metrics={
            "threads": threads,
            "left_out": left_out,
            "not_run": not_run,
            # Checked at every context and batch before its timing, which would have ended otherwise.
            "checks": [
                "sparsity 0 differs from stock SDPA no more than that from itself",
                "dense variants agree",
                "outputs are finite",
            ],
        },
        rows=rows,
        wall_seconds=time.perf_counter() - start,
    )


def measure(
    model: nn.Module, cell: Cell, config: Mapping[str, Any], device: torch.device, not_run: dict[str, str]
) -> list[dict[str, Any]]:
    """Time all candidates of one cell in turn; a row for each, dense ones first.

    Args:
        model: stock decoder.
        cell: phase, context and batch.
        config: of the record.
        device: of the model.
        not_run: filled with what could not be measured, and why.
    """
    with ExitStack() as stack:
        if config["compilation"] != "none":
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=256))
            torch.compiler.reset()
        # What is timed is made and checked first, which takes about as long as timing it.
        bar = stack.enter_context(progress_bar(2, str(cell)))
        bar.describe(f"{cell}: checks")
        candidates = list(candidates_of(model, cell, config, not_run))
        steps: dict[str, Callable[[], object]] = {one.method: one.step for one in candidates}
        steps |= {_CHOOSING + one.method: one.choosing for one in candidates if one.choosing is not None}
        if config["compilation"] != "none":
            for one in candidates:
                for _ in range(_COMPILING_CALLS):
                    one.step()
        bar.advance()
        synchronize = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else None
        measured = interleaved_timings(
            steps,
            repeats=config["repeats"],
            least=min(_LEAST_ROUNDS, config["repeats"]),
            time_budget=config["cell_seconds"],
            synchronize=synchronize,
            title=str(cell),
        )
        timings = {
            name: Timing(tuple(value / steps[name].tokens_per_call for value in timing.seconds))
            for name, timing in measured.items()
        }
        memory = {one.method: peak_memory(one.step, device) if device.type == "cuda" else None for one in candidates}
    dense = [one.method for one in candidates if one.role == "baseline"]
    fastest = min(dense, key=lambda name: timings[name].median)
    fused = min((name for name in dense if name not in UNFUSED), key=lambda name: timings[name].median)
    free = timings[FREE_METHOD].median
    rows = []
    for one in candidates:
        timing, base = timings[one.method], timings[fastest].median
        share = max(1.0 - free / base, 0.0)
        choosing = timings.get(_CHOOSING + one.method)
        tokens = cell.batch * (cell.context if cell.phase == "prefill" else 1)
        row = {
            "model": config["model"],
            "phase": cell.phase,
            "context": cell.context,
            "batch": cell.batch,
            "dtype": config["dtype"],
            "method": DENSE if one.method == fastest else one.method,
            "role": one.role,
            "kernel": one.kernel,
            "realised_sparsity": one.sparsity,
            "seconds": timing.median,
            "seconds_min": timing.minimum,
            "seconds_max": timing.maximum,
            "rounds": measured[one.method].rounds,
            "calls_per_round": measured[one.method].calls * one.step.tokens_per_call,
            "tokens_per_second": tokens / timing.median,
            "peak_bytes": memory[one.method],
            "speedup_over_dense": base / timing.median,
            "speedup_over_fused": timings[fused].median / timing.median,
            "attention_share": share,
            "bound": amdahl_bound((share, 1.0 - one.sparsity)),
            "selection_seconds": None if choosing is None else choosing.median,
            "compilation": config["compilation"],
            "variant": one.method,
        }
        if cell.phase == "decode":
            row |= {"milliseconds_per_token": 1e3 * timing.median, "cache": one.cache}
        rows.append(row)
    return sorted(rows, key=lambda row: row["method"] != DENSE)


def _load(config: Mapping[str, Any]) -> LanguageModel:
    source, common = config["source"], {"dtype": config["dtype"], "device": config["device"]}
    if "name" in source:
        return load_language_model(source["name"], **common)
    return random_language_model(source["architecture"], source["options"], seed=config["seed"], **common)


def _require_possible_model(loaded: LanguageModel, cells: Sequence[Cell]) -> None:
    require_context(loaded.model, max(cell.context for cell in cells), loaded.name)
    try:
        require_full_attention(loaded.model.config)
    except InputError as error:
        raise InputError(f"the speed benchmark is for full attention: {error}") from error


def _too_large(model: nn.Module, cells: Sequence[Cell], device: torch.device) -> dict[str, str]:
    """Cells that do not fit into memory, and why."""
    sizes, room = DecoderSizes.of(model), device_memory(device)
    found = {}
    for cell in cells:
        tokens = cell.batch * cell.context
        needed = sizes.prefill_bytes(tokens) if cell.phase == "prefill" else 1.2 * sizes.cache_bytes(tokens)
        needed += sizes.weight_bytes
        if needed > room:
            found[str(cell)] = f"needs about {needed / 2**30:.0f} GiB of {room / 2**30:.0f} GiB"
    return found
