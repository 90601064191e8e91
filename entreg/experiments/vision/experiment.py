"""One run of a vision experiment: a dense model, a method that trains it further, and what sparsity then costs.

The dense model of a seed is trained once and shared by all methods (or read from a checkpoint). A method is a
regulariser, a sparse path that is active while training, both, or neither. Afterwards the model is evaluated dense and
under every plan of the configuration, with the overlap of what was kept with semantic masks, and on corrupted images.
One run is one record; a run that has a record is skipped, a killed one goes on from its newest checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from entreg.adapters import probe, sparsify, vision_model
from entreg.adapters.timm_models import require_architecture
from entreg.atomic import require_writable
from entreg.data.vision_sets import check_vision_dataset, describe_dataset
from entreg.errors import ConfigError
from entreg.experiments.chosen_plans import chosen_plans
from entreg.experiments.config_schemas import VISION
from entreg.experiments.studies import NOT_RECORDED, chosen_device, last_step, scaled_trainer
from entreg.experiments.tracked_runs import tracked_run
from entreg.experiments.vision.evaluation import check_evaluation, evaluate_everything, open_datasets
from entreg.experiments.vision.tracked_overlays import track_overlays
from entreg.names import require_known
from entreg.records.record import config_hash, new_record
from entreg.runs.directory import RunDirectory
from entreg.runs.finished import Finished, identity_of
from entreg.schema import require_fit
from entreg.sparse import sparsity_from_mapping
from entreg.tracking import Tracker, TrackerSettings, track_record, tracker_settings_from_mapping
from entreg.tracking.attention import AttentionWatch
from entreg.training.batches import kept_random_state
from entreg.training.checkpoints import load_model_weights
from entreg.training.curriculum import CellCurriculum, CurriculumSettings
from entreg.training.loop import TrainingSettings, train, training_settings_from_mapping
from entreg.training.penalties import Penalties, penalty_from_mapping, prepare_penalties
from entreg.training.state import require_optimizer
from entreg.training.vision import VisionObjective
from entreg.weights import frozen_copy

CHECKED = ("data", "model.options", "sparsity", "regularizer.penalties", "evaluation.plans")
"""Parts of the configuration to which the command line may add keys: unknown ones are refused here or by timm."""


@dataclass(frozen=True)
class VisionRun:
    """Everything that decides one record, checked.

    Attributes:
        config: the resolved configuration without what does not decide the result, plus ``scale``; the record's own.
        folder: of the checkpoints of all runs.
        resume: ``auto`` or None.
        tracker: who is told of the run.
    """

    config: Mapping[str, Any]
    folder: Path
    resume: str | None
    tracker: TrackerSettings = field(default_factory=TrackerSettings)

    @property
    def experiment(self) -> str:
        """Name of the experiment in the records."""
        return self.config["name"]

    @property
    def label(self) -> str:
        """Method and seed."""
        return f"{self.config['method']} seed {self.config['seed']}"

    @property
    def base_config(self) -> dict[str, Any]:
        """What decides the dense model that all methods of a seed share."""
        base = {**self.config["base"], "trainer": _settings(self, "base").deciding()}
        return {**{key: self.config[key] for key in ("data", "model", "seed", "device")}, "base": base}

    @property
    def inputs(self) -> dict[str, Any]:
        """What decides which data and models are needed."""
        evaluation = {key: self.config["evaluation"][key] for key in ("splits", "limit", "localisation", "robustness")}
        weights = {"checkpoint": self.config["base"]["checkpoint"]}
        return {"data": self.config["data"], "model": self.config["model"], "base": weights, "evaluation": evaluation}

    def require_inputs(self) -> None:
        """Look at the data, the model and its weights.

        Raises:
            ConfigError, InputError, AssetError: what is missing, damaged or does not fit.
        """
        open_datasets(self.config["evaluation"], self.config["data"])
        with kept_random_state():
            model = _stock_model(self)
        if self.config["base"]["checkpoint"] is not None:
            load_model_weights(model, self.config["base"]["checkpoint"])

    def make_record(self, command: str, directory: RunDirectory) -> dict[str, Any]:
        """See :func:`run_vision`."""
        return run_vision(self, command, directory.measures)


def plan_run(config: Mapping[str, Any]) -> VisionRun:
    """The run that a configuration asks for, with every part checked that can be before anything slow starts.

    Args:
        config: resolved content of ``configs/vision.yaml``.

    Raises:
        ConfigError: an unknown key or an impossible value in any part; a device that is not there.
    """
    require_fit(config, VISION)
    profile = config["profile"]
    kept = {key: value for key, value in config.items() if key not in NOT_RECORDED}
    scale = profile["vision"]["step_scale"]
    kept["base"] = {**kept["base"], "trainer": scaled_trainer(kept["base"]["trainer"], scale)}
    kept["trainer"] = scaled_trainer(kept["trainer"], scale)
    kept["evaluation"] = {**kept["evaluation"], "plans": chosen_plans(config)}
    limit = profile["vision"]["max_images"]
    if limit is not None:
        kept["evaluation"] = {**kept["evaluation"], "limit": min(limit, kept["evaluation"]["limit"] or limit)}
    kept["device"] = chosen_device(config["device"])
    kept["scale"] = profile["name"]
    tracker = tracker_settings_from_mapping(config["tracker"])
    run = VisionRun(kept, Path(config["checkpoints"]), config["resume"], tracker)
    check_vision_dataset(kept["data"])
    require_architecture(kept["model"]["name"])
    require_optimizer(_settings(run, "trainer").optimizer)
    require_optimizer(_settings(run, "base").optimizer)
    _curriculum_settings(run)
    path = sparsity_from_mapping(kept["sparsity"])
    if _penalties(run).needs_gate and getattr(path, "score", None) != "gate":
        raise ConfigError("the penalty l1_gate needs a sparse path with score: gate in training, such as sparsity=gate")
    check_evaluation(kept["evaluation"])
    return run


def run_vision(run: VisionRun, command: str, measures: Path | None = None) -> dict[str, Any]:
    """Train and evaluate one run.

    Args:
        run: from :func:`plan_run`.
        command: goes into the record.
        measures: file that keeps what was measured, see :mod:`entreg.runs.finished`; None: nothing is kept.

    Returns:
        A run record: one row per split and plan; ``metrics`` hold training times and the numbers of the last step.
    """
    start = time.perf_counter()
    require_writable(run.folder)
    device = torch.device(run.config["device"])
    datasets = open_datasets(run.config["evaluation"], run.config["data"])
    model, base_seconds = dense_model(run, datasets["train"])
    with tracked_run(run) as tracker:
        gate, metrics = _train_further(run, model, datasets, tracker)
        model.to(device).eval()
        finished = Finished(None if run.resume is None else measures, lambda: identity_of(run.config, model, gate))
        evaluation, rows = evaluate_everything(
            model, datasets, run.config["evaluation"], data=run.config["data"], gate=gate, finished=finished
        )
        metrics = {"base_seconds": base_seconds, **metrics, **evaluation}
        record = _record(run, command, model, metrics, rows, time.perf_counter() - start)
        track_record(tracker, record)
        track_overlays(
            tracker,
            model,
            datasets[run.config["evaluation"]["splits"][-1]],
            run.config["evaluation"],
            count=run.tracker.overlays,
            gate=gate,
            step=metrics.get("training_steps", 0),
        )
    return record


def _record(
    run: VisionRun, command: str, model: nn.Module, metrics: dict[str, Any], rows: list[dict[str, Any]], seconds: float
) -> dict[str, Any]:
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
        metrics=metrics,
        rows=rows,
        wall_seconds=seconds,
    )


def dense_model(run: VisionRun, dataset: Any) -> tuple[nn.Module, float]:
    """The dense model of the run's seed, from its checkpoint or trained, and the seconds that training took."""
    settings = _settings(run, "base")
    torch.manual_seed(run.config["seed"])
    model = _stock_model(run)
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
    name = f"dense seed {run.config['seed']}"
    with tracked_run(run, config={**run.base_config, "scale": run.config["scale"]}, name=name) as tracker:
        result = train(
            model,
            objective,
            dataset,
            settings,
            folder,
            resume=run.resume,
            device=run.config["device"],
            tracker=tracker,
            watch=_watch(run, dataset, tracker),
        )
    return model, result.seconds


def _stock_model(run: VisionRun) -> nn.Module:
    spec = run.config["model"]
    return vision_model(
        spec["name"],
        pretrained=spec["pretrained"],
        checkpoint=spec["checkpoint"],
        fused_attention=spec["fused_attention"],
        **spec["options"],
    )


def _watch(run: VisionRun, dataset: Any, tracker: Tracker) -> AttentionWatch | None:
    """A look at the attention on the first images of a split."""
    if not run.tracker.active or run.tracker.attention_every is None:
        return None
    count = min(run.tracker.attention_items, len(dataset))
    # Training images are augmented with global random numbers, of which none may be missing later.
    with kept_random_state():
        images = torch.stack([dataset[index]["images"] for index in range(count)])
    return AttentionWatch(tracker, run.tracker, lambda model: model(images.to(next(model.parameters()).device)))


def _train_further(
    run: VisionRun, model: nn.Module, datasets: Mapping[str, Any], tracker: Tracker
) -> tuple[nn.ModuleDict | None, dict[str, Any]]:
    """The method's training of the dense model, in place, every handle removed again; its gate, if it has one."""
    settings = _settings(run, "trainer")
    if settings.steps == 0:
        return None, {"training_seconds": 0.0}
    dataset = datasets["train"]
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
            tracker=tracker,
            watch=_watch(run, datasets[run.config["evaluation"]["splits"][0]], tracker),
        )
    finally:
        for handle in (captures, sparse):
            if handle is not None:
                handle.remove()
    if run.tracker.checkpoints:
        tracker.artifact(result.checkpoint, folder.name)
    gate = None if sparse is None else sparse.gate
    return gate, {"training_seconds": result.seconds, "training_steps": result.steps, **last_step(result.history)}


def _penalties(run: VisionRun) -> Penalties:
    values = run.config["regularizer"]["penalties"]
    return Penalties({name: penalty_from_mapping(one) for name, one in values.items()})


def _curriculum_settings(run: VisionRun) -> CurriculumSettings | None:
    values = run.config["base"]["curriculum"]
    if values is None:
        return None
    require_known(values, [field.name for field in fields(CurriculumSettings)], "key", "base.curriculum")
    return CurriculumSettings(**values)


def _settings(run: VisionRun, which: str) -> TrainingSettings:
    values = run.config["trainer"] if which == "trainer" else run.config["base"]["trainer"]
    return training_settings_from_mapping({**values, "seed": run.config["seed"]})
