"""What a regulariser adds to a training step of a whole vision transformer, probes and all.

A step is forward pass, loss, backward pass and AdamW. Steps with each regulariser, with the sparse path active, and
plain ones with fused attention run in turn in one process on the same weights; the learning rate is 0, so that they
all do the same work in every round. The cost of the surrogates by themselves is in
:mod:`entreg.experiments.surrogate_cost`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from entreg.adapters import probe, sparsify
from entreg.adapters.timm_models import require_architecture
from entreg.atomic import require_writable
from entreg.errors import ConfigError
from entreg.experiments.measuring import peak_memory, shared_copy, speed_device
from entreg.experiments.timing import interleaved_timings
from entreg.experiments.vision.speed.models import Geometry, Step, set_fused_attention, speed_model
from entreg.names import require_choice, require_known
from entreg.records.record import new_record
from entreg.records.store import RecordStore
from entreg.sparse import sparsity_from_mapping
from entreg.training.penalties import Penalties, penalty_from_mapping, prepare_penalties
from entreg.training.vision import VisionObjective

EXPERIMENT = "benchmark/training_cost"
PLAIN = "plain"
_PRECISIONS = ("float32", "bfloat16")
_METHOD_KEYS = {"penalties", "sparsity"}


def run_training_cost(
    *,
    model: str,
    options: Mapping[str, Any],
    batch: int,
    precision: str,
    methods: Mapping[str, Mapping[str, Any]],
    ours: str,
    training_images: int,
    device: str,
    threads: int | None,
    profile: Mapping[str, Any],
    store: str | Path,
    command: str,
    force: bool = False,
) -> list[Path]:
    """Measure the steps and save the record.

    Args:
        model: timm's name.
        options: keyword arguments of ``timm.create_model``.
        batch: images per step.
        precision: ``float32``, or ``bfloat16`` through autocast.
        methods: name to ``penalties`` (see :func:`entreg.training.penalties.penalty_from_mapping`) and perhaps
            ``sparsity``, the path that is active while training; :data:`PLAIN` is added by itself.
        ours: the method whose cost is this project's.
        training_images: images of the whole training from which the claim ``amortise`` is computed.
        device: ``cpu`` or ``cuda``.
        threads: CPU threads; None for torch's own choice.
        profile: the configuration group ``profile``: ``name``, ``repeats``, ``seeds`` and perhaps
            ``vision.speed``: ``max_batch`` and ``model_options``, which replace the model's own.
        store: folder of the records.
        command: what to type to repeat the run.
        force: run again what has a record already.

    Returns:
        The record's file, as a list of one.

    Raises:
        ConfigError: an unknown or impossible value.
    """
    require_choice("precision", precision, _PRECISIONS)
    require_architecture(model)
    require_choice("ours", ours, methods)
    if PLAIN in methods:
        raise ConfigError(f"none of the methods may be called '{PLAIN}'")
    for name, method in methods.items():
        require_known(method, sorted(_METHOD_KEYS), "key", f"method '{name}' of the training cost")
        for penalty in method.get("penalties", {}).values():
            penalty_from_mapping(penalty)
        if method.get("sparsity"):
            sparsity_from_mapping(method["sparsity"])
    if batch < 1 or training_images < 1:
        raise ConfigError(f"batch and training_images must be at least 1, got {batch} and {training_images}")
    speed_device(device)
    limits = profile.get("vision", {}).get("speed", {})
    config = {
        "model": model,
        "options": {**options, **limits.get("model_options", {})},
        "batch": min(batch, limits.get("max_batch") or batch),
        "precision": precision,
        "methods": {name: dict(method) for name, method in methods.items()},
        "ours": ours,
        "training_images": training_images,
        "device": device,
        "threads": threads,
        "repeats": profile["repeats"],
        "seed": profile["seeds"][0],
        "profile": profile["name"],
    }
    require_writable(store)
    records = RecordStore(store)
    if force or records.find(EXPERIMENT, config) is None:
        records.save(run(config, command=command, scale=profile["name"]))
    return [records.path_for(EXPERIMENT, config)]


def run(config: Mapping[str, Any], *, command: str = "", scale: str = "offline") -> dict[str, Any]:
    """Measure once and return the run record.

    Args:
        config: see :func:`run_training_cost`, whose record carries it.
        command: what to type to repeat the run.
        scale: one of :data:`entreg.records.SCALES`.
    """
    start = time.perf_counter()
    device = speed_device(config["device"])
    threads_before = torch.get_num_threads()
    torch.set_num_threads(config["threads"] or threads_before)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(config["seed"])
            model = speed_model(config["model"], config["options"], "float32", device)
            rows = _measure(model, config, device)
        threads = torch.get_num_threads()
    finally:
        torch.set_num_threads(threads_before)
    return new_record(
        experiment=EXPERIMENT,
        scale=scale,
        config=config,
        command=command,
        dataset={"name": "standard normal images", "seed": config["seed"]},
        model={
            "name": config["model"],
            "weights": "random",
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
        seed=config["seed"],
        repeats=config["repeats"],
        metrics={"threads": threads, "step_overhead": {row["method"]: row["step_overhead"] for row in rows}},
        rows=rows,
        wall_seconds=time.perf_counter() - start,
    )


def _measure(model: nn.Module, config: Mapping[str, Any], device: torch.device) -> list[dict[str, Any]]:
    images = Geometry.of(model).images(config["batch"], model)
    labels = torch.randint(10, (config["batch"],), device=device)
    if model(images[:1]).dim() == 3:
        labels = labels[:, None]
    batch = {"images": images, "labels": labels}
    steps = {
        name: training_step(model, batch, method, config["precision"], config["seed"])
        for name, method in {PLAIN: {}, **config["methods"]}.items()
    }
    timings = interleaved_timings(
        steps,
        repeats=config["repeats"],
        synchronize=(lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else None,
    )
    plain = timings[PLAIN].median
    return [
        {
            "method": name,
            "seconds": timing.median,
            "seconds_min": timing.minimum,
            "seconds_max": timing.maximum,
            "seconds_per_image": timing.median / config["batch"],
            "step_overhead": timing.median / plain - 1.0,
            "peak_bytes": peak_memory(steps[name], device) if device.type == "cuda" else None,
        }
        for name, timing in timings.items()
    ]


def training_step(
    model: nn.Module, batch: Mapping[str, Tensor], method: Mapping[str, Any], precision: str, seed: int
) -> Step:
    """One step of a method on a copy of the model that shares its weights.

    Args:
        model: a stock timm vision transformer; its parameters get gradients, their values stay.
        batch: ``images`` and ``labels``.
        method: ``penalties`` and ``sparsity``, see :func:`run_training_cost`; empty for a plain step.
        precision: ``float32`` or ``bfloat16``.
        seed: of the choice of anchors.
    """
    own = set_fused_attention(shared_copy(model), True).train()
    penalties = Penalties({name: penalty_from_mapping(one) for name, one in method.get("penalties", {}).items()})
    if penalties.need_captures:
        prepare_penalties(own, penalties, batch["images"], seed)
    path = sparsity_from_mapping(method["sparsity"]) if method.get("sparsity") else None
    sparse = None if path is None else sparsify(own, path)
    captures = probe(own) if penalties.need_captures else None
    objective = VisionObjective(penalties, captures=captures, sparse=sparse)
    optimizer = torch.optim.AdamW([*own.parameters(), *penalties.parameters()], lr=0.0)
    device = batch["images"].device.type
    counter = iter(range(10**9))

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            loss, _ = objective(own, batch, next(counter))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
