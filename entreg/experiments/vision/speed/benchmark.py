"""How much faster a vision transformer gets by sparsity: the paper's four cells, every plan, and rivals.

The four cells are dense and sparse, each with unfused attention (explicit products, as before FlashAttention) and
with torch's fused attention. All candidates of a batch size run in turn in every round of one process, forward passes
from images to logits, so what a plan costs (scores, gathers, merges) is in its time. Beside each measured speed-up
stands what Amdahl's law allows for the attention products alone, and what time in proportion to all work would give.

Weights are random: they decide accuracy, not speed. Accuracies at the same plans come from the trained models of the
vision experiments.

Without Hydra (a bare GPU machine needs torch, timm, numpy, numba, scipy, safetensors, pyyaml and jsonschema)::

    import yaml
    from entreg.experiments.vision.speed.benchmark import run_vision_speed

    settings = yaml.safe_load(open("configs/benchmark/vision_speed_gpu.yaml"))
    settings.pop("_target_")
    profile = {"name": "paper", "repeats": 21, "seeds": [0]}
    run_vision_speed(**settings, profile=profile, store="outputs/runs", command="python scripts/benchmark.py ...")
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from entreg.adapters import SparsifyHandle, sparsify
from entreg.adapters.timm_models import require_architecture
from entreg.atomic import require_writable
from entreg.errors import ConfigError
from entreg.experiments.measuring import amdahl_bound, peak_memory, shared_copy, speed_device
from entreg.experiments.timing import Timing, interleaved_timings
from entreg.experiments.vision.speed.models import (
    DTYPES,
    Geometry,
    Step,
    counted_tokens,
    give_columns,
    set_fused_attention,
    speed_model,
    without_attention,
    without_blocks,
)
from entreg.names import require_choice, require_known
from entreg.progress import progress
from entreg.records.record import new_record
from entreg.records.store import RecordStore
from entreg.sparse import ColumnSparsity, recorded_kernels, sparsity_from_mapping

EXPERIMENT = "vit/speed"
COMPILATIONS = ("none", "default", "reduce-overhead")
# Parts of the dense model that are timed beside the candidates.
_FREE, _REST = "attention for free", "all but the blocks"


@dataclass(frozen=True)
class Candidate:
    """One forward pass that is timed.

    Attributes:
        method: ``dense`` or the plan's name.
        role: ``baseline``, ``ours``, ``rival`` or ``bound`` (columns that cost nothing to choose).
        fused: whether attention is fused.
        step: the forward pass.
        kernel: attention kernels that run and how often, see :func:`entreg.sparse.recorded_kernels`; recorded
            uncompiled. ``math`` beside another kernel is the attention of the sampled queries in a selection score.
        sparsity: realised, over all layers.
        tokens: that the MLP of each layer sees.
    """

    method: str
    role: str
    fused: bool
    step: Step
    kernel: str
    sparsity: float
    tokens: Sequence[int]

    @property
    def cell(self) -> str:
        """The cell of the paper's table: dense or sparse, fused or not."""
        return ("dense" if self.role == "baseline" else "sparse") + (" + fused" if self.fused else "")


def run_vision_speed(
    *,
    models: Mapping[str, Mapping[str, Any]],
    batches: Sequence[int],
    dtypes: Sequence[str],
    compilations: Sequence[str],
    device: str,
    threads: int | None,
    profile: Mapping[str, Any],
    store: str | Path,
    command: str,
    force: bool = False,
) -> list[Path]:
    """Measure what has no record yet; one record per model, dtype, compilation and batch.

    Args:
        models: name to ``{name, options, plans, rivals, unfused}``: timm's name and keyword arguments, our plans and
            the rivals' by name (see :func:`entreg.sparse.sparsity_from_mapping`), and the names of those that are
            also measured with unfused attention.
        batches: images per forward pass.
        dtypes: ``float32``, ``bfloat16`` (of weights and activations).
        compilations: ``none``, or a mode of ``torch.compile``: ``default``, ``reduce-overhead``.
        device: ``cpu`` or ``cuda``.
        threads: CPU threads; None for torch's own choice.
        profile: the configuration group ``profile``: ``name`` (the records' scale), ``repeats``, ``seeds`` (the first
            is used) and perhaps ``vision.speed``: ``max_batch``, which leaves out larger batches, and
            ``model_options``, which replace the models' own.
        store: folder of the records.
        command: what to type to repeat the run.
        force: measure again what has a record already.

    Returns:
        The records' files.

    Raises:
        ConfigError: an unknown or impossible value; nothing has been measured then.
    """
    limits = profile.get("vision", {}).get("speed", {})
    configs = [
        {
            "model": name,
            **_checked_model(name, model, limits.get("model_options", {})),
            # A record of its own for each, so that one that is killed does not take the others with it.
            "batches": [batch],
            "dtype": dtype,
            "compilation": compilation,
            "repeats": profile["repeats"],
            "seed": profile["seeds"][0],
            "threads": threads,
            "device": device,
            "profile": profile["name"],
        }
        for name, model in models.items()
        for dtype in dtypes
        for compilation in compilations
        for batch in batches
        if batch <= (limits.get("max_batch") or batch)
    ]
    if not configs or min(batches) < 1:
        raise ConfigError("the speed benchmark needs a model, a dtype, a compilation and a batch of at least 1")
    for dtype in dtypes:
        require_choice("dtype", dtype, DTYPES)
    for compilation in compilations:
        require_choice("compilation", compilation, COMPILATIONS)
    speed_device(device)
    require_writable(store)
    records = RecordStore(store)
    paths = []
    for config in progress(configs, "vision models' speed"):
        if force or records.find(EXPERIMENT, config) is None:
            records.save(run(config, command=command, scale=profile["name"]))
        paths.append(records.path_for(EXPERIMENT, config))
    return paths


def run(config: Mapping[str, Any], *, command: str = "", scale: str = "offline") -> dict[str, Any]:
    """Measure one model and return the run record.

    Args:
        config: see :func:`run_vision_speed`, whose records carry it.
        command: what to type to repeat the run.
        scale: one of :data:`entreg.records.SCALES`.
    """
    start = time.perf_counter()
    device = speed_device(config["device"])
    threads_before = torch.get_num_threads()
    torch.set_num_threads(config["threads"] or threads_before)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.inference_mode():
            torch.manual_seed(config["seed"])
            model = speed_model(config["name"], config["options"], config["dtype"], device)
            rows = [row for batch in config["batches"] for row in measure(model, batch, config, device)]
        threads = torch.get_num_threads()
    finally:
        torch.set_num_threads(threads_before)
    sizes = Geometry.of(model)
    return new_record(
        experiment=EXPERIMENT,
        scale=scale,
        config=config,
        command=command,
        dataset={"name": "standard normal images", "seed": config["seed"]},
        model={
            "name": config["name"],
            "weights": "random weights: speed only",
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "image_size": sizes.image[1],
            "tokens": sizes.tokens,
            "prefix_tokens": sizes.prefix,
            "depth": sizes.depth,
        },
        seed=config["seed"],
        repeats=config["repeats"],
        metrics={"threads": threads},
        rows=rows,
        wall_seconds=time.perf_counter() - start,
    )


def measure(model: nn.Module, batch: int, config: Mapping[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """Time all candidates of one batch size in turn; a row for each, the dense ones first."""
    images = Geometry.of(model).images(batch, model)
    with ExitStack() as stack:
        if config["compilation"] != "none":
            # All copies share their code, for which torch keeps a small number of compiled versions and then quietly
            # runs uncompiled.
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True))
            torch.compiler.reset()
        candidates = {_key(one.method, one.fused): one for one in _candidates(model, images, config)}
        steps = {name: one.step for name, one in candidates.items()}
        for part, variant in ((_FREE, without_attention(model)), (_REST, without_blocks(model))):
            steps[part] = _forward(variant, images, config["compilation"], True)
        synchronize = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else None
        timings = interleaved_timings(steps, repeats=config["repeats"], synchronize=synchronize)
        memory = {
            name: peak_memory(one.step, device) if device.type == "cuda" else None for name, one in candidates.items()
        }
    return [
        {
            "model": config["model"],
            "batch": batch,
            "dtype": config["dtype"],
            "compilation": config["compilation"],
            "method": one.method,
            "role": one.role,
            "cell": one.cell,
            "kernel": one.kernel,
            "realised_sparsity": one.sparsity,
            "tokens_per_layer": list(one.tokens),
            "seconds": timings[name].median,
            "seconds_min": timings[name].minimum,
            "seconds_max": timings[name].maximum,
            "rounds": config["repeats"],
            "calls_per_round": timings[name].calls,
            "images_per_second": batch / timings[name].median,
            "peak_bytes": memory[name],
            **_comparison(one, name, timings, Geometry.of(model)),
        }
        for name, one in candidates.items()
    ]


def _comparison(one: Candidate, name: str, timings: Mapping[str, Timing], sizes: Geometry) -> dict[str, float]:
    """Speed-ups over both dense cells, shares of the dense time, and what smaller work allows.

    ``bound_attention_alone`` is Amdahl's bound on leaving out score entries; ``bound`` is the speed-up if the time of
    the layers shrank in proportion to their tokens as well, which is a bound only where no token is left out: smaller
    products may take less time each. Both are over the dense cell with the same kind of attention.
    """
    seconds = timings[name].median
    dense = timings[_key("dense", one.fused)].median
    attention = max(1.0 - timings[_FREE].median / dense, 0.0)
    linear = max(1.0 - attention - timings[_REST].median / dense, 0.0)
    entries_left = 1.0 - one.sparsity
    tokens_left = sum(one.tokens) / (sizes.tokens * sizes.depth)
    return {
        "speedup_over_dense": timings[_key("dense", False)].median / seconds,
        "speedup_over_dense_fused": timings[_key("dense", True)].median / seconds,
        "attention_share": attention,
        "blocks_share": attention + linear,
        "bound_attention_alone": amdahl_bound((attention, entries_left)),
        "bound": amdahl_bound((attention, entries_left), (linear, tokens_left)),
    }


def _candidates(model: nn.Module, images: Tensor, config: Mapping[str, Any]) -> list[Candidate]:
    found = []
    for method, role, fused, variant, path in _variants(model, len(images), config):
        # In inference mode torch shows the recorder attention as a whole and not the kernel that it becomes.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            _attention_choice(fused),
            recorded_kernels() as names,
            counted_tokens(variant) as tokens,
        ):
            if isinstance(path, SparsifyHandle):
                sparsity = path.realised_sparsity(images)
            else:
                sparsity = path
                variant(images)
        kernel = ", ".join(f"{count} {name}" for name, count in Counter(names).items())
        step = _forward(variant, images, config["compilation"], fused)
        found.append(Candidate(method, role, fused, step, kernel, sparsity, tuple(tokens)))
    return found


def _variants(
    model: nn.Module, batch: int, config: Mapping[str, Any]
) -> Iterator[tuple[str, str, bool, nn.Module, SparsifyHandle | float]]:
    """Method, role, whether fused, the model, and its sparse path or, where it has none, its sparsity."""
    for fused in (False, True):
        yield "dense", "baseline", fused, set_fused_attention(shared_copy(model), fused), 0.0
    for role, plans in (("ours", config["plans"]), ("rival", config["rivals"])):
        for method, values in plans.items():
            plan = sparsity_from_mapping(values)
            for fused in (False, True) if method in config["unfused"] else (True,):
                sparse = set_fused_attention(shared_copy(model), fused)
                yield method, role, fused, sparse, sparsify(sparse, plan)
            if isinstance(plan, ColumnSparsity) and plan.sparsity is not None:
                given = set_fused_attention(shared_copy(model), True)
                yield f"{method}_given", "bound", True, given, give_columns(given, batch, plan.sparsity, plan.backend)


def _attention_choice(fused: bool) -> AbstractContextManager[None]:
    """Unfused also where attention goes through torch: a path over chosen keys ignores the stock module's switch."""
    return nullcontext() if fused else sdpa_kernel(SDPBackend.MATH)


def _forward(model: nn.Module, images: Tensor, compilation: str, fused: bool) -> Step:
    compiled = model if compilation == "none" else torch.compile(model, mode=compilation, dynamic=False)

    def step() -> object:
        with _attention_choice(fused):
            return compiled(images)

    return step


def _key(method: str, fused: bool) -> str:
    return method + (", fused" if fused else ", unfused")


def _checked_model(name: str, model: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    keys = {"name", "options", "plans", "rivals", "unfused"}
    if set(model) != keys:
        raise ConfigError(f"the speed benchmark's model '{name}' must have exactly the keys {', '.join(sorted(keys))}")
    require_architecture(model["name"])
    plans = {**model["plans"], **model["rivals"]}
    for plan, values in plans.items():
        if sparsity_from_mapping(values) is None:
            raise ConfigError(f"plan '{plan}' of model '{name}' must not be dense")
    require_known(model["unfused"], plans, "plan", f"models.{name}.unfused")
    return {**model, "options": {**model["options"], **options}}
