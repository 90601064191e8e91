"""How much faster a language model reads and writes by sparsity, all costs counted, against every rival.

*Prefill* is a whole forward pass from token ids to the logits of the last token, with the cache that it fills: the
time to the first token. *Decode* is one step of every sequence of a batch, with a cache of random keys and values that
grows as in ``generate``; summaries of pages are kept from step to step and brought up to date within the time. All
candidates of a context and batch run in turn in every round of one process. Beside each speed-up stands what Amdahl's
law allows: attention's share of the dense time, which is what a model without any attention saves, and the bound at the
plan's realised sparsity. Choosing blocks and pages is timed once more alone, on queries and keys of all layers.

In decoding, ``dense`` (the base of ``speedup_over_dense``) is the fastest of these: transformers' SDPA
attention, with its dynamic and its static cache and with a cache that grows in place, and the same with query heads
grouped by key head, fused or as two products. ``speedup_over_fused`` leaves the products out: it is over the fastest
that goes through SDPA. Sparse candidates use the growing cache.

Without Hydra (a bare GPU machine needs torch, transformers, numpy, numba, scipy, safetensors, pyyaml and jsonschema)::

    import yaml
    from entreg.evaluation.language_speed import run_language_speed

    settings = yaml.safe_load(open("configs/benchmark/language_speed_gpu.yaml"))
    settings.pop("_target_")
    profile = {"name": "paper", "repeats": 21, "seeds": [0]}
    run_language_speed(**settings, profile=profile, store="outputs/runs", command="python scripts/benchmark.py ...")
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from entreg.adapters import sparsify
from entreg.adapters.growing_cache import require_full_attention
from entreg.adapters.handles import DecoderSparsifyHandle
from entreg.adapters.language_models import (
    ARCHITECTURES,
    DTYPES,
    LanguageModel,
    load_language_model,
    random_language_model,
    require_context,
)
from entreg.atomic import require_writable
from entreg.errors import ConfigError, InputError
from entreg.evaluation.language_steps import (
    FREE,
    GROUPED,
    PRODUCTS,
    Choosing,
    DecoderSizes,
    Decoding,
    FilledCache,
    Prefill,
    seen_by_layers,
)
from entreg.evaluation.regularizer_cost import peak_memory
from entreg.evaluation.speed_models import amdahl_bound, shared_copy, speed_device
from entreg.evaluation.timing import Timing, interleaved_timings, warm_up
from entreg.records.record import new_record
from entreg.records.store import RecordStore
from entreg.sparse import DecoderSparsity, recorded_kernels, sparsity_from_mapping

EXPERIMENT = "llm/speed"
PHASES = ("prefill", "decode")
COMPILATIONS = ("none", "default", "reduce-overhead")
DENSE = "dense"
FREE_METHOD = "attention for free"
_CHOOSING = "choosing of "
# Fewer rounds tell no median from an outlier.
_LEAST_ROUNDS = 3
# The second call may compile once more, when it finds what the first one left; graphs are recorded after that.
_COMPILING_CALLS = 3
# Calls whose tokens differ from each other.
_TOKEN_SETS = 4
# Dense decoding: attention implementation and cache by the name of the row that is not the fastest.
_UNFUSED = "dense_grouped_products"
_DENSE_DECODING = {
    "dense_dynamic_cache": ("sdpa", "dynamic"),
    "dense_static_cache": ("sdpa", "static"),
    "dense_growing_cache": ("sdpa", "growing"),
    "dense_grouped_heads": (GROUPED, "growing"),
    _UNFUSED: (PRODUCTS, "static"),
}
# Of the largest output of the first layer's attention. All that follows amplifies rounding: in bfloat16 the logits of
# two fused kernels of torch, on a cache of made-up keys and values, are 0.2 apart after 30 layers.
_TOLERANCES = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}

# Also where it is installed: with the transformers that it asks for, this package does not work.
_KVPRESS = "kvpress 0.5 needs transformers below 5.3; it decodes as dense attention does with a cache of fewer keys"

Step = Prefill | Decoding


@dataclass(frozen=True)
class Cell:
    """What is timed against each other: one phase, context and batch."""

    phase: str
    context: int
    batch: int

    def __str__(self) -> str:
        return f"{self.phase}, context {self.context}, batch {self.batch}"


@dataclass(frozen=True)
class Candidate:
    """One way through the model that is timed.

    Attributes:
        method: ``dense``, a plan's name, or what a dense variant is called.
        role: ``baseline``, ``ours``, ``rival`` or ``bound`` (attention that costs nothing).
        step: what is timed.
        kernel: attention kernels of one pass and how often they run, see :func:`entreg.sparse.recorded_kernels`, or the
            name of the backend; recorded uncompiled. ``math`` beside another kernel is the softmax of a selection.
        sparsity: realised, over all layers.
        cache: of decoding, one of :data:`~entreg.evaluation.language_steps.CACHES`.
        choosing: of a plan: its choice alone.
    """

    method: str
    role: str
    step: Step
    kernel: str
    sparsity: float
    cache: str | None = None
    choosing: Choosing | None = None


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
    """Measure every model that has no record yet; one record per model, phase, dtype and compilation.

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
    limits = profile.get("language") or {}
    speed = limits.get("speed") or {}
    configs = [
        {
            "model": name,
            **model,
            # A record of its own for each, so that one that fails does not take the other with it.
            "phases": {phase: sizes},
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
        for name, model in _checked_models(models, limits).items()
        for phase, sizes in phases_within(phases, speed.get("max_context"), tokens_per_call).items()
        for dtype in speed.get("dtypes") or dtypes
        for compilation in compilations
    ]
    speed_device(device)
    if not configs:
        raise ConfigError("the speed benchmark needs a model, a phase, a dtype and a compilation")
    for config in configs:
        if config["dtype"] not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got '{config['dtype']}'")
        if config["compilation"] not in COMPILATIONS:
            raise ConfigError(f"compilation must be one of {', '.join(COMPILATIONS)}, got '{config['compilation']}'")
        _require_possible_architecture(config)
    require_writable(store)
    records = RecordStore(store)
    paths = []
    for config in configs:
        if force or records.find(EXPERIMENT, config) is None:
            records.save(run(config, command=command, scale=profile["name"]))
        paths.append(records.path_for(EXPERIMENT, config))
    return paths


def run(config: Mapping[str, Any], *, command: str = "", scale: str = "offline") -> dict[str, Any]:
    """Measure one model and return the run record.

    Args:
        config: see :func:`run_language_speed`, whose records carry it.
        command: what to type to repeat the run.
        scale: ``smoke``, ``offline`` or ``paper``.
    """
    start = time.perf_counter()
    device = speed_device(config["device"])
    threads_before = torch.get_num_threads()
    torch.set_num_threads(config["threads"] or threads_before)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(config["seed"])
            loaded = _load(config)
            cells = list(_cells(config["phases"]))
            _require_possible_model(loaded, cells)
            left_out = _too_large(loaded.model, cells, device)
            kept = [cell for cell in cells if str(cell) not in left_out]
            _announce(loaded.model, config, kept, device)
            not_run = {
                "kvpress": "kvpress 0.5 needs transformers below 5.3; it decodes with a dense cache of fewer keys"
            }
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
            "checks": ["sparsity 0 equals stock SDPA bit for bit", "dense variants agree", "outputs are finite"],
        },
        rows=rows,
        wall_seconds=time.perf_counter() - start,
    )


def phases_within(
    phases: Mapping[str, Mapping[str, Sequence[int]] | None], max_context: int | None, tokens_per_call: int
) -> dict[str, dict[str, list[int]]]:
    """The phases that are measured, contexts above a limit cut to it.

    Raises:
        ConfigError: an unknown phase, none, or contexts, batches or tokens per call that are impossible.
    """
    found = {}
    for phase, sizes in phases.items():
        if phase not in PHASES:
            raise ConfigError(f"there is no phase '{phase}' of the speed benchmark; the phases are {', '.join(PHASES)}")
        if sizes is None:
            continue
        if set(sizes) != {"contexts", "batches"} or not sizes["contexts"] or not sizes["batches"]:
            raise ConfigError(f"phase '{phase}' must have contexts and batches, at least one of each")
        contexts = sorted(
            {context if max_context is None else min(context, max_context) for context in sizes["contexts"]}
        )
        found[phase] = {"contexts": contexts, "batches": list(sizes["batches"])}
        least = tokens_per_call + 1 if phase == "decode" else 2
        if tokens_per_call < 1 or contexts[0] < least or min(sizes["batches"]) < 1:
            raise ConfigError(
                f"phase '{phase}' needs contexts of at least {least} tokens, batches and tokens_per_call of at least 1"
            )
    if not found:
        raise ConfigError("the speed benchmark needs a phase: prefill, decode or both")
    return found


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
        candidates = list(_candidates(model, cell, config, not_run))
        steps: dict[str, Callable[[], object]] = {one.method: one.step for one in candidates}
        steps |= {_CHOOSING + one.method: one.choosing for one in candidates if one.choosing is not None}
        if config["compilation"] != "none":
            for one in candidates:
                for _ in range(_COMPILING_CALLS):
                    one.step()
        synchronize = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else None
        warm = {name: warm_up(step, synchronize) for name, step in steps.items()}
        loops = {name: count for name, (count, _) in warm.items()}
        round_seconds = sum(count * seconds for count, seconds in warm.values())
        rounds = min(config["repeats"], max(_LEAST_ROUNDS, int(config["cell_seconds"] / round_seconds)))
        _say(f"{cell}: {len(steps)} steps, {rounds} rounds, {_duration(rounds * round_seconds)}")
        measured = interleaved_timings(steps, repeats=rounds, warmup=0, inner_loops=loops, synchronize=synchronize)
        timings = {
            name: Timing(tuple(value / steps[name].tokens_per_call for value in timing.seconds))
            for name, timing in measured.items()
        }
        memory = {one.method: peak_memory(one.step, device) if device.type == "cuda" else None for one in candidates}
    fastest = fused = DENSE
    if cell.phase == "decode":
        dense = [one.method for one in candidates if one.role == "baseline"]
        fastest = min(dense, key=lambda name: timings[name].median)
        fused = min((name for name in dense if name != _UNFUSED), key=lambda name: timings[name].median)
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
            "rounds": rounds,
            "calls_per_round": loops[one.method] * one.step.tokens_per_call,
            "tokens_per_second": tokens / timing.median,
            "peak_bytes": memory[one.method],
            "speedup_over_dense": base / timing.median,
            "speedup_over_fused": timings[fused].median / timing.median,
            "attention_share": share,
            "bound": amdahl_bound((share, 1.0 - one.sparsity)),
            "selection_seconds": None if choosing is None else choosing.median,
            "compilation": config["compilation"],
        }
        if cell.phase == "decode":
            row |= {"milliseconds_per_token": 1e3 * timing.median, "cache": one.cache, "variant": one.method}
        rows.append(row)
    return sorted(rows, key=lambda row: row["method"] != DENSE)


def _candidates(
    model: nn.Module, cell: Cell, config: Mapping[str, Any], not_run: dict[str, str]
) -> Iterator[Candidate]:
    make_step = _steps_of(model, cell, config)
    dense = list(_dense_variants(model, cell, config, not_run))
    stock = _with_attention(model, "sdpa")
    reference_step = make_step(stock, "growing")
    reference = reference_step()
    nothing_left_out = _with_attention(model, "sdpa")
    sparsify(nothing_left_out, 0.0)
    if not torch.equal(make_step(nothing_left_out, "growing")(), reference):
        raise RuntimeError(f"{cell}: the sparse path at sparsity 0 differs from stock SDPA")
    seen = seen_by_layers(stock, make_step(stock, "growing"))
    first = _first_attention(stock, make_step(stock, "growing"))
    for method, variant, cache in dense:
        step = make_step(variant, cache)
        deviation = (_first_attention(variant, step) - first).abs().max()
        if deviation > _TOLERANCES[config["dtype"]] * first.abs().max():
            raise RuntimeError(f"{cell}: the attention of '{method}' is not that of stock SDPA")
        _, kernel = _recorded(make_step(variant, cache))
        if method == "dense_flash_attention_2":
            kernel = "flash-attn"
        yield Candidate(
            method, "baseline", _compiled(variant, cache, make_step, config), kernel, 0.0, _cache(cell, cache)
        )
    for role, plans in (("ours", config["plans"]), ("rival", config["rivals"])):
        for method, values in plans.items():
            plan = sparsity_from_mapping(values)
            variant = _with_attention(model, "sdpa")
            handle = sparsify(variant, plan, record=True)
            step = make_step(variant, "growing")
            if plan.backend == "gather":
                out, kernel = _recorded(step)
            else:
                # A recorder would keep the flexible kernel from being compiled.
                out, kernel = step(), plan.backend
            if not torch.isfinite(out).all():
                raise RuntimeError(f"{cell}: the output of plan '{method}' is not finite")
            sparsity = _realised(handle)
            handle.record, handle.selections = False, []
            compiled = _compiled(variant, "growing", make_step, config)
            yield Candidate(method, role, compiled, kernel, sparsity, _cache(cell, "growing"), Choosing(seen, plan))
    free = _compiled(_with_attention(model, FREE), "growing", make_step, config)
    yield Candidate(FREE_METHOD, "bound", free, "none", 1.0, _cache(cell, "growing"))


def _dense_variants(
    model: nn.Module, cell: Cell, config: Mapping[str, Any], not_run: dict[str, str]
) -> Iterator[tuple[str, nn.Module, str]]:
    """Name, model and kind of cache."""
    if cell.phase == "decode":
        sizes = DecoderSizes.of(model)
        for method, (attention, cache) in _DENSE_DECODING.items():
            if attention == GROUPED and sizes.heads == sizes.key_heads:
                continue
            needed = sizes.weight_bytes + 2.2 * sizes.cache_bytes(cell.batch * cell.context)
            if cache == "dynamic" and needed > _memory(next(model.parameters()).device):
                not_run[f"{method}, {cell}"] = "the copy of the cache that every step makes does not fit into memory"
                continue
            yield method, _with_attention(model, attention), cache
        return
    yield DENSE, _with_attention(model, "sdpa"), "dynamic"
    if cell.context <= config["eager_up_to"]:
        yield "dense_eager", _with_attention(model, "eager"), "dynamic"
    if config["device"] != "cuda":
        not_run["dense_flash_attention_2"] = "flash-attn is for CUDA"
    elif importlib.util.find_spec("flash_attn") is None:
        not_run["dense_flash_attention_2"] = "flash-attn is not installed; SDPA has a FlashAttention kernel of its own"
    elif config["dtype"] == "float32":
        not_run["dense_flash_attention_2"] = "flash-attn has no float32"
    else:
        yield "dense_flash_attention_2", _with_attention(model, "flash_attention_2"), "dynamic"


def _steps_of(model: nn.Module, cell: Cell, config: Mapping[str, Any]) -> Callable[[nn.Module, str], Step]:
    """How a step is made of a model and a kind of cache; all of a cell have the same inputs."""
    device, vocabulary = next(model.parameters()).device, model.config.get_text_config().vocab_size
    if cell.phase == "prefill":
        ids = torch.randint(vocabulary, (cell.batch, cell.context), device=device)
        return lambda variant, _: Prefill(variant, ids)
    filled = FilledCache(model, cell.batch, cell.context)
    shape = (_TOKEN_SETS, cell.batch, config["tokens_per_call"])
    ids = torch.randint(vocabulary, shape, device=device)
    return lambda variant, kind: Decoding(variant, filled, kind, ids)


def _with_attention(model: nn.Module, name: str) -> nn.Module:
    variant = shared_copy(model)
    variant.set_attn_implementation(name)
    return variant


def _compiled(
    variant: nn.Module, cache: str, make_step: Callable[[nn.Module, str], Step], config: Mapping[str, Any]
) -> Step:
    if config["compilation"] != "none":
        variant = torch.compile(variant, mode=config["compilation"])
    return make_step(variant, cache)


def _first_attention(model: nn.Module, step: Step) -> Tensor:
    """Output of the first layer's attention in the first pass of a call: the same input for all ways to attend."""
    outputs: list[Tensor] = []
    layer = next(module for module in model.modules() if getattr(module, "layer_idx", None) == 0)
    hook = layer.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    try:
        step()
    finally:
        hook.remove()
    return outputs[0]


def _recorded(step: Step) -> tuple[Tensor, str]:
    """The output of a call, and its attention kernels per pass."""
    with recorded_kernels() as names:
        out = step()
    counts = Counter(names).items()
    return out, ", ".join(f"{count // step.tokens_per_call} {name}" for name, count in counts)


def _realised(handle: DecoderSparsifyHandle) -> float:
    """Of the last pass: mean over all layers, 0 where a layer is or ran dense."""
    return sum(one.plan.sparsity for one in handle.selections if one.plan is not None) / handle.depth


def _cache(cell: Cell, kind: str) -> str | None:
    return kind if cell.phase == "decode" else None


def _cells(phases: Mapping[str, Mapping[str, Sequence[int]]]) -> Iterator[Cell]:
    for phase, sizes in phases.items():
        for context in sizes["contexts"]:
            for batch in sizes["batches"]:
                yield Cell(phase, context, batch)


def _load(config: Mapping[str, Any]) -> LanguageModel:
    source, common = config["source"], {"dtype": config["dtype"], "device": config["device"]}
    if "name" in source:
        return load_language_model(source["name"], **common)
    return random_language_model(source["architecture"], source["options"], seed=config["seed"], **common)


def _checked_models(models: Mapping[str, Mapping[str, Any]], limits: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The models as a profile runs them, with whole sources."""
    wanted, replacement = limits.get("plans"), limits.get("model")
    found = {}
    for name, model in models.items():
        if set(model) != {"source", "plans", "rivals"}:
            raise ConfigError(f"the speed benchmark's model '{name}' must have exactly the keys source, plans, rivals")
        source = dict(model["source"] if replacement is None else replacement)
        source.pop("dtype", None)
        if set(source) != {"name"}:
            source = {"options": {}, **source}
            if set(source) != {"architecture", "options"} or source["architecture"] not in ARCHITECTURES:
                raise ConfigError(
                    f"the source of model '{name}' must be name, or architecture (one of {', '.join(ARCHITECTURES)}) "
                    f"and perhaps options, got {source}"
                )
        kept: dict[str, Any] = {"source": source}
        for role in ("plans", "rivals"):
            for plan, values in model[role].items():
                if not isinstance(sparsity_from_mapping(values), DecoderSparsity):
                    raise ConfigError(f"plan '{plan}' of model '{name}' must be of kind decoder")
            kept[role] = {plan: values for plan, values in model[role].items() if wanted is None or plan in wanted}
        found[name] = kept
        if replacement is not None:
            break
    return found


def _require_possible_architecture(config: Mapping[str, Any]) -> None:
    """What a random model's configuration says is found before any model is made."""
    source = config["source"]
    if "architecture" not in source:
        return
    fields = {**ARCHITECTURES[source["architecture"]][1], **source["options"]}
    longest = max(cell.context for cell in _cells(config["phases"]))
    if longest > fields["max_position_embeddings"]:
        raise ConfigError(
            f"a context of {longest} tokens is longer than the {fields['max_position_embeddings']} that model "
            f"'{config['model']}' is made for; its options can raise max_position_embeddings"
        )
    if fields.get("sliding_window") is not None:
        raise ConfigError(
            f"model '{config['model']}' attends to a sliding window of {fields['sliding_window']}; the speed benchmark "
            "is for full attention: set its options to sliding_window: null"
        )


def _require_possible_model(loaded: LanguageModel, cells: Sequence[Cell]) -> None:
    require_context(loaded.model, max(cell.context for cell in cells), loaded.name)
    try:
        require_full_attention(loaded.model.config)
    except InputError as error:
        raise InputError(f"the speed benchmark is for full attention: {error}") from error


def _memory(device: torch.device) -> int:
    """Bytes of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _too_large(model: nn.Module, cells: Sequence[Cell], device: torch.device) -> dict[str, str]:
    """Cells that do not fit into memory, and why."""
    sizes, room = DecoderSizes.of(model), _memory(device)
    found = {}
    for cell in cells:
        tokens = cell.batch * cell.context
        needed = sizes.prefill_bytes(tokens) if cell.phase == "prefill" else 1.2 * sizes.cache_bytes(tokens)
        needed += sizes.weight_bytes
        if needed > room:
            found[str(cell)] = f"needs about {needed / 2**30:.0f} GiB of {room / 2**30:.0f} GiB"
    return found


def _announce(model: nn.Module, config: Mapping[str, Any], cells: Sequence[Cell], device: torch.device) -> None:
    """Say about how long it will take, from short passes: linear layers grow with tokens, attention with their square.

    A decoding step is taken to be as long as reading weights and cache from memory.
    """
    plans = len(config["plans"]) + len(config["rivals"])
    short = min(256, *(cell.context for cell in cells)) if cells else 256
    seconds = {}
    for name, attention, tokens in (("all", "sdpa", short), ("free", FREE, short), ("one", "sdpa", 1)):
        step = _steps_of(model, Cell("prefill", tokens, 1), config)(_with_attention(model, attention), "dynamic")
        step()
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds[name] = time.perf_counter() - start
    sizes, total = DecoderSizes.of(model), 0.0
    for cell in cells:
        if cell.phase == "prefill":
            factor = cell.context / short
            attention = max(seconds["all"] - seconds["free"], 0.0)
            one = cell.batch * (seconds["free"] * factor + attention * factor**2)
            count = plans + 3
        else:
            share = sizes.cache_bytes(cell.batch * cell.context) / sizes.weight_bytes
            one = config["tokens_per_call"] * seconds["one"] * (1.0 + share)
            count = plans + len(_DENSE_DECODING) + 1
        # Checks and warming up take about four calls of each.
        timed = min(config["repeats"], max(_LEAST_ROUNDS, int(config["cell_seconds"] / (count * one)))) + 4
        total += timed * count * one
    _say(
        f"{EXPERIMENT}: {config['model']}, {config['dtype']}, {config['device']}: {len(cells)} contexts and batches, "
        f"{_duration(total)}"
    )


def _duration(seconds: float) -> str:
    return f"about {seconds:.0f} s" if seconds < 120 else f"about {seconds / 60:.0f} min"


def _say(text: str) -> None:
    print(text, flush=True)
