"""One run of a vision experiment: a dense model, a method that trains it further, and what sparsity then costs.

The dense model of a seed is trained once and shared by all methods (or read from a checkpoint). A method is a
regulariser, a sparse path that is active while training, both, or neither. Afterwards the model is evaluated dense and
under every plan of the configuration, with the overlap of what was kept with semantic masks, and on corrupted images.
One run is one record; a run that has a record is skipped, a killed one goes on from its newest checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from entreg.adapters import probe, sparsify, vision_model
from entreg.atomic import require_writable
from entreg.data.vision_sets import describe_dataset
from entreg.errors import ConfigError
from entreg.evaluation.vision_evaluation import check_evaluation, evaluate_everything, open_datasets
from entreg.records.record import config_hash, new_record
from entreg.records.store import RecordStore
from entreg.sparse import sparsity_from_mapping
from entreg.training.checkpoints import load_model_weights
from entreg.training.curriculum import CellCurriculum, CurriculumSettings
from entreg.training.loop import TrainingSettings, train, training_settings_from_mapping
from entreg.training.penalties import Penalties, penalty_from_mapping
from entreg.training.vision import VisionObjective, frozen_copy, prepare_penalties

# What does not decide a run's result.
_NOT_RECORDED = ("store", "checkpoints", "resume", "force", "study", "profile")

CHECKED = ("data", "model.options", "sparsity", "regularizer.penalties", "evaluation.plans")
"""Parts of the configuration to which the command line may add keys: unknown ones are refused here or by timm."""


@dataclass(frozen=True)
class VisionRun:
    """Everything that decides one record, checked.

    Attributes:
        config: the resolved configuration without what does not decide the result, plus ``scale``; the record's own.
        folder: of the checkpoints of all runs.
        resume: ``auto`` or None.
    """

    config: Mapping[str, Any]
    folder: Path
    resume: str | None

    @property
    def experiment(self) -> str:
        """Name of the experiment in the records."""
        return self.config["name"]

    @property
    def base_config(self) -> dict[str, Any]:
        """What decides the dense model that all methods of a seed share."""
        base = {**self.config["base"], "trainer": _settings(self, "base").deciding()}
        return {**{key: self.config[key] for key in ("data", "model", "seed", "device")}, "base": base}


def plan_run(config: Mapping[str, Any]) -> VisionRun:
    """The run that a configuration asks for, with every part checked that can be before anything slow starts.

    Args:
        config: resolved content of ``configs/train.yaml``.

    Raises:
        ConfigError: an unknown key or an impossible value in any part; a device that is not there.
    """
    profile = config["profile"]
    kept = {key: value for key, value in config.items() if key not in _NOT_RECORDED}
    scale = profile["training_scale"]
    kept["base"] = {**kept["base"], "trainer": _scaled(kept["base"]["trainer"], scale)}
    kept["trainer"] = _scaled(kept["trainer"], scale)
    limit = profile.get("max_images")
    if limit is not None:
        kept["evaluation"] = {**kept["evaluation"], "limit": min(limit, kept["evaluation"]["limit"] or limit)}
    kept["device"] = _device(config["device"])
    kept["scale"] = profile["name"]
    run = VisionRun(kept, Path(config["checkpoints"]), config["resume"])
    _settings(run, "trainer")
    _settings(run, "base")
    _curriculum_settings(run)
    path = sparsity_from_mapping(kept["sparsity"])
    if _penalties(run).needs_gate and getattr(path, "score", None) != "gate":
        raise ConfigError("the penalty l1_gate needs a sparse path with score: gate in training, such as sparsity=gate")
    check_evaluation(kept["evaluation"])
    return run


def study_configs(config: DictConfig, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """The resolved configuration of every method and seed of a study, seeds outermost.

    Each is composed anew with the same overrides, the method's own and the seed, so that a study is nothing but many
    single runs. Hydra must be initialised.

    Args:
        config: composed from ``configs/train.yaml`` with an experiment that has ``study.methods``.
        overrides: those it was composed with.

    Raises:
        ConfigError: the experiment has no methods.
    """
    methods = OmegaConf.to_container(config.study.methods, resolve=True)
    allowed = config.profile.get("methods")
    names = [name for name in methods if allowed is None or name in allowed] or list(methods)[:1]
    if not names:
        raise ConfigError(f"experiment {config.name} has no study.methods; run it with scripts/train.py")
    seeds = config.profile.seeds if config.study.seeds is None else config.study.seeds
    composed = [
        hydra.compose("train", [*overrides, *methods[name], f"method={name}", f"seed={seed}"])
        for seed in seeds
        for name in names
    ]
    return [OmegaConf.to_container(one, resolve=True) for one in composed]


def run_all(runs: list[VisionRun], *, store: str | Path, command: str, force: bool = False) -> list[dict[str, Any]]:
    """Run what has no record yet and save each record as soon as it is there.

    Returns:
        The records in the order of ``runs``, old ones included.

    Raises:
        OutputError: a record or checkpoint cannot be written.
    """
    require_writable(store)
    records = RecordStore(store)
    result = []
    for number, run in enumerate(runs, 1):
        record = None if force else records.find(run.experiment, run.config)
        if record is None:
            print(f"run {number} of {len(runs)}: {run.experiment} {run.config['method']} seed {run.config['seed']}")
            record = run_vision(run, command)
            records.save(record)
        result.append(record)
    return result


def run_vision(run: VisionRun, command: str) -> dict[str, Any]:
    """Train and evaluate one run.

    Args:
        run: from :func:`plan_run`.
        command: goes into the record.

    Returns:
        A run record: one row per split and plan; ``metrics`` hold training times and the numbers of the last step.
    """
    start = time.perf_counter()
    require_writable(run.folder)
    device = torch.device(run.config["device"])
    datasets = open_datasets(run.config["evaluation"], run.config["data"])
    model, base_seconds = dense_model(run, datasets["train"])
    gate, metrics = _train_further(run, model, datasets["train"])
    model.to(device).eval()
    evaluation, rows = evaluate_everything(
        model, datasets, run.config["evaluation"], data=run.config["data"], gate=gate
    )
    return new_record(
        experiment=run.experiment,
        scale=run.config["scale"],
        config=run.config,
        command=command,
        dataset=describe_dataset(run.config["data"]),
        model={
            "name": run.config["model"]["name"],
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        seed=run.config["seed"],
        repeats=1,
        metrics={"base_seconds": base_seconds, **metrics, **evaluation},
        rows=rows,
        wall_seconds=time.perf_counter() - start,
    )


def dense_model(run: VisionRun, dataset: Any) -> tuple[nn.Module, float]:
    """The dense model of the run's seed, from its checkpoint or trained, and the seconds that training took."""
    settings = _settings(run, "base")
    torch.manual_seed(run.config["seed"])
    spec = run.config["model"]
    model = vision_model(
        spec["name"],
        pretrained=spec["pretrained"],
        checkpoint=spec["checkpoint"],
        fused_attention=spec["fused_attention"],
        **spec["options"],
    )
    checkpoint = run.config["base"]["checkpoint"]
    if checkpoint is not None:
        load_model_weights(model, checkpoint)
        return model, 0.0
    if settings.steps == 0:
        return model, 0.0
    curriculum, cells = None, _curriculum_settings(run)
    if cells is not None:
        curriculum = CellCurriculum(cells, model)
        curriculum.mark(model, run.config["seed"])
    objective = VisionObjective(Penalties({}), curriculum=curriculum)
    folder = run.folder / f"{run.experiment.replace('/', '-')}-dense-{config_hash(run.base_config)}"
    result = train(model, objective, dataset, settings, folder, resume=run.resume, device=run.config["device"])
    return model, result.seconds


def _train_further(run: VisionRun, model: nn.Module, dataset: Any) -> tuple[nn.ModuleDict | None, dict[str, Any]]:
    """The method's training of the dense model, in place, every handle removed again; its gate, if it has one."""
    settings = _settings(run, "trainer")
    if settings.steps == 0:
        return None, {"training_seconds": 0.0}
    regularizer = run.config["regularizer"]
    penalties = _penalties(run)
    teacher = frozen_copy(model).to(run.config["device"]) if regularizer["distillation"] > 0 else None
    if penalties.need_captures:
        first = [dataset[index] for index in range(min(16, len(dataset)))]
        images = torch.stack([item["images"] for item in first]).to(next(model.parameters()).device)
        prepare_penalties(model, penalties, images, run.config["seed"])
    path = sparsity_from_mapping(run.config["sparsity"])
    sparse = sparsify(model, path, record=True) if path is not None else None
    captures = probe(model) if penalties.need_captures else None
    objective = VisionObjective(
        penalties,
        captures=captures,
        sparse=sparse,
        label_smoothing=regularizer["label_smoothing"],
        teacher=teacher,
        distillation=regularizer["distillation"],
        temperature=regularizer["temperature"],
    )
    extra = [*penalties.parameters(), *(sparse.gate.parameters() if sparse is not None and sparse.gate else ())]
    folder = run.folder / f"{run.experiment.replace('/', '-')}-{run.config['method']}-{config_hash(run.config)}"
    try:
        result = train(
            model,
            objective,
            dataset,
            settings,
            folder,
            resume=run.resume,
            extra_parameters=extra,
            device=run.config["device"],
        )
    finally:
        for handle in (captures, sparse):
            if handle is not None:
                handle.remove()
    gate = None if sparse is None else sparse.gate
    return gate, {"training_seconds": result.seconds, "training_steps": result.steps, **_last(result.history)}


def _last(history: list[Mapping[str, Any]]) -> dict[str, Any]:
    return {"last_step": dict(history[-1])} if history else {}


def _penalties(run: VisionRun) -> Penalties:
    values = run.config["regularizer"]["penalties"]
    return Penalties({name: penalty_from_mapping(one) for name, one in values.items()})


def _curriculum_settings(run: VisionRun) -> CurriculumSettings | None:
    values = run.config["base"]["curriculum"]
    if values is None:
        return None
    known = [field.name for field in fields(CurriculumSettings)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"unknown key '{unknown[0]}' of base.curriculum, known are {', '.join(known)}")
    return CurriculumSettings(**values)


def _settings(run: VisionRun, which: str) -> TrainingSettings:
    values = run.config["trainer"] if which == "trainer" else run.config["base"]["trainer"]
    return training_settings_from_mapping({**values, "seed": run.config["seed"]})


def _scaled(trainer: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """The same training with its steps multiplied by the profile's factor."""
    scaled = dict(trainer)
    for key in ("steps", "warmup_steps"):
        scaled[key] = round(trainer[key] * factor)
    if trainer["steps"] > 0:
        scaled["steps"] = max(1, scaled["steps"])
    return scaled


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda, got '{name}'")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no CUDA device")
    return name
