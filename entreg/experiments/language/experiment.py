"""One run of a language experiment: a decoder as published or fine-tuned by a method, and what sparsity then costs.

A method is a regulariser (an entropy or a rival of it), a sparse path that is active while training, plain further
training, or none (no steps). Fine-tuning is full or low-rank. Afterwards the model is evaluated dense and under every
plan of the configuration. One run is one record; a run that has a record is skipped, a killed one goes on from its
newest checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entreg.adapters import probe, sparsify
from entreg.adapters.language_models import (
    DTYPES,
    LanguageModel,
    load_language_model,
    random_language_model,
    require_language_model,
    require_named,
)
from entreg.atomic import require_writable
from entreg.data.language_tasks import token_windows
from entreg.data.text import Corpus, require_corpus
from entreg.errors import ConfigError
from entreg.experiments.chosen_plans import chosen_plans
from entreg.experiments.config_schemas import LANGUAGE
from entreg.experiments.language.evaluation import (
    check_evaluation,
    check_model,
    evaluate_everything,
    open_corpora,
    open_tasks,
)
from entreg.experiments.studies import NOT_RECORDED, chosen_device, last_step, scaled_trainer
from entreg.experiments.tracked_runs import tracked_run
from entreg.names import require_choice
from entreg.records.record import config_hash, new_record
from entreg.runs.directory import RunDirectory
from entreg.runs.finished import Finished, identity_of
from entreg.schema import require_fit
from entreg.sparse import DecoderSparsity, sparsity_from_mapping
from entreg.tracking import Tracker, TrackerSettings, track_record, tracker_settings_from_mapping
from entreg.tracking.attention import AttentionWatch
from entreg.training.checkpoints import load_model_weights
from entreg.training.language import (
    LanguageObjective,
    TokenWindows,
    check_adaptation,
    merge_low_rank,
    prepare_language_training,
)
from entreg.training.loop import TrainingResult, TrainingSettings, train, training_settings_from_mapping
from entreg.training.penalties import Penalties, penalty_from_mapping, prepare_penalties
from entreg.training.state import require_optimizer
from entreg.weights import frozen_copy

CHECKED = ("data", "model.options", "training.adaptation", "regularizer.penalties", "sparsity", "evaluation.plans")
"""Parts of the configuration to which the command line may add keys: unknown ones are refused by their readers."""

PAPER_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "meta-llama/Llama-2-7b-hf": (
        "llm/llama_2_7b",
        {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "max_position_embeddings": 4096},
    ),
    "mistralai/Mistral-7B-v0.1": (
        "llm/mistral_7b",
        {"model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32, "sliding_window": 4096},
    ),
    "microsoft/phi-2": (
        "llm/phi_2",
        {"model_type": "phi", "hidden_size": 2560, "num_hidden_layers": 32, "max_position_embeddings": 2048},
    ),
}
"""The paper's models: their names on the hub to the experiment and what tells a folder with one of them."""

OTHER_MODEL = "llm/other"
"""The experiment of a model that is not the paper's: it gives no verdict on the paper's claims."""


@dataclass(frozen=True)
class LanguageRun:
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
    def inputs(self) -> dict[str, Any]:
        """What decides which texts and models are needed."""
        training = _settings(self).steps > 0
        return {**{key: self.config[key] for key in ("data", "model", "evaluation")}, "training": training}

    def require_inputs(self) -> None:
        """Look at the texts and the model: first what is on disk, then what the hub has.

        Raises:
            ConfigError, AssetError: what is missing or damaged.
        """
        spec = self.config["model"]
        if spec["architecture"] is None:
            require_named(spec["name"])
        open_corpora(self.config["evaluation"], self.config["data"], training=self.inputs["training"])
        if spec["architecture"] is None:
            require_language_model(spec["name"])

    def make_record(self, command: str, directory: RunDirectory) -> dict[str, Any]:
        """See :func:`run_language`.

        Raises:
            ConfigError: besides, the device has too little memory.
        """
        try:
            return run_language(self, command, directory.measures)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"{self.config['model']['name']} in {self.config['model']['dtype']} does not fit into the memory of "
                "the device: take shorter contexts (evaluation.tasks.<task>.contexts), bfloat16 (model.dtype), or in "
                "training a smaller trainer.batch_size / more trainer.gradient_accumulation"
            ) from error


def plan_run(config: Mapping[str, Any]) -> LanguageRun:
    """The run that a configuration asks for, with every part checked that can be before anything slow starts.

    Args:
        config: resolved content of ``configs/language.yaml``.

    Raises:
        ConfigError: an unknown key or an impossible value in any part; no model; a device that is not there.
    """
    require_fit(config, LANGUAGE)
    profile = config["profile"]
    kept = {key: value for key, value in config.items() if key not in NOT_RECORDED}
    limits = profile["language"]
    if limits["model"] is not None:
        kept["model"] = {**kept["model"], **limits["model"]}
    kept["evaluation"] = limited_evaluation({**kept["evaluation"], "plans": chosen_plans(config)}, limits)
    kept["trainer"] = scaled_trainer(kept["trainer"], limits["step_scale"])
    kept["device"] = chosen_device(config["device"])
    kept["scale"] = profile["name"]
    kept["name"] = _experiment(config["name"], kept["model"])
    tracker = tracker_settings_from_mapping(config["tracker"])
    run = LanguageRun(kept, Path(config["checkpoints"]), config["resume"], tracker)
    require_choice("model.dtype", kept["model"]["dtype"], DTYPES)
    for corpus in ("text", "summaries"):
        require_corpus(kept["data"][corpus]["name"])
    _check_training(run)
    check_evaluation(kept["evaluation"])
    return run


def limited_evaluation(config: Mapping[str, Any], limits: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluation as far as a profile runs it.

    Args:
        config: the resolved ``evaluation`` part.
        limits: ``language`` of a profile: ``max_count`` items of each task, ``max_context`` tokens (longer contexts
            are left out, or cut where all are longer), ``plans`` and ``levels`` that are run. All may be missing or
            None.
    """
    count, context = limits.get("max_count"), limits.get("max_context")
    plans, levels = limits.get("plans"), limits.get("levels")
    tasks = {}
    for name, settings in config["tasks"].items():
        if settings is None:
            continue
        tasks[name] = dict(settings)
        if count is not None:
            tasks[name]["count"] = min(count, settings["count"] or count)
        if context is not None:
            tasks[name]["contexts"] = [one for one in settings["contexts"] if one <= context] or [context]
        if context is not None and settings.get("new_tokens") is not None:
            # Most of the context is for the article.
            tasks[name]["new_tokens"] = min(settings["new_tokens"], context // 4)
    support = config["effective_support"]
    if support is not None and context is not None:
        support = {**support, "context": min(context, support["context"])}
    chosen = {}
    for name, plan in config["plans"].items():
        if plan is None or (plans is not None and name not in plans):
            continue
        chosen[name] = dict(plan)
        if levels is not None and "levels" in plan:
            chosen[name]["levels"] = [one for one in plan["levels"] if one in levels] or plan["levels"][:1]
    return {**config, "tasks": tasks, "plans": chosen, "effective_support": support}


def run_language(run: LanguageRun, command: str, measures: Path | None = None) -> dict[str, Any]:
    """Load, fine-tune and evaluate one model.

    Args:
        run: from :func:`plan_run`.
        command: goes into the record.
        measures: file that keeps what was measured, see :mod:`entreg.runs.finished`; None: nothing is kept.

    Returns:
        A run record: one row per task, context, split and plan; ``metrics`` hold training times, the numbers of the
        last step and the effective support of the dense model's attention.

    Raises:
        ConfigError, InputError, AssetError: what is missing, damaged or does not fit, before anything slow.
    """
    start = time.perf_counter()
    require_writable(run.folder)
    settings, evaluation = _settings(run), run.config["evaluation"]
    corpora = open_corpora(evaluation, run.config["data"], training=settings.steps > 0)
    language = _load(run)
    check_model(language.model, language.name, evaluation)
    tasks = open_tasks(evaluation, corpora, language.tokenizer)
    with tracked_run(run) as tracker:
        metrics, trained = _train_further(run, language, corpora.get(("text", "train")), tracker)
        if trained is not None and trained.sharded:
            # Every process evaluates by itself, with all weights: the same model once more, and its checkpoint.
            language = _load(run)
            prepare_language_training(language.model, run.config["training"]["adaptation"])
            load_model_weights(language.model, trained.checkpoint)
        language.model.to(run.config["device"], getattr(torch, run.config["model"]["dtype"])).eval()
        finished = Finished(None if run.resume is None else measures, lambda: identity_of(run.config, language.model))
        measured, rows = evaluate_everything(language.model, language.tokenizer, tasks, evaluation, finished=finished)
        metrics = {**metrics, **measured}
        record = _record(run, command, language, corpora, metrics, rows, time.perf_counter() - start)
        track_record(tracker, record)
    return record


def _record(
    run: LanguageRun,
    command: str,
    language: LanguageModel,
    corpora: Mapping[tuple[str, str], Corpus],
    metrics: dict[str, Any],
    rows: list[dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    return new_record(
        experiment=run.experiment,
        scale=run.config["scale"],
        config=run.config,
        command=command,
        dataset=_describe(run, corpora),
        model={
            "name": language.name,
            "revision": language.revision,
            "parameters": sum(p.numel() for p in language.model.parameters()),
        },
        seed=run.config["seed"],
        repeats=1,
        metrics=metrics,
        rows=rows,
        wall_seconds=seconds,
    )


def _load(run: LanguageRun) -> LanguageModel:
    """The model on its device, in the dtype that it is trained in, or evaluated in where it is not trained."""
    spec = run.config["model"]
    trained = _settings(run).steps > 0
    options = {
        "dtype": run.config["training"]["dtype"] if trained else spec["dtype"],
        "device": run.config["device"],
        "attention": spec["attention"],
    }
    if spec["architecture"] is None:
        return load_language_model(spec["name"], **options)
    language = random_language_model(spec["architecture"], spec["options"], seed=run.config["seed"], **options)
    # Text in, noise out: bytes will do for tokens.
    from transformers import ByT5Tokenizer

    return replace(language, tokenizer=ByT5Tokenizer())


def _train_further(
    run: LanguageRun, language: LanguageModel, text: Corpus | None, tracker: Tracker
) -> tuple[dict[str, Any], TrainingResult | None]:
    """The method's training, in place, its metrics and what it left; low-rank weights are merged at its end."""
    settings = _settings(run)
    if settings.steps == 0:
        return {"training_seconds": 0.0, "training_steps": 0}, None
    model, training, regularizer = language.model, run.config["training"], run.config["regularizer"]
    windows = token_windows(text, language.tokenizer, training["context"], count=None, seed=settings.seed)
    penalties = _penalties(run)
    teacher = frozen_copy(model) if regularizer["distillation"] > 0 else None
    adaptation = dict(training["adaptation"])
    if adaptation["kind"] == "lora":
        adaptation.setdefault("seed", settings.seed)
    prepare_language_training(model, adaptation)
    if penalties.need_captures:
        prepare_penalties(model, penalties, windows[:2].to(run.config["device"]), settings.seed)
    path = sparsity_from_mapping(run.config["sparsity"])
    sparse = None if path is None else sparsify(model, path, record=True)
    captures = probe(model) if penalties.need_captures else None
    objective = LanguageObjective(
        penalties,
        captures=captures,
        sparse=sparse,
        teacher=teacher,
        distillation=regularizer["distillation"],
        temperature=regularizer["temperature"],
    )
    folder = run.folder / f"{run.experiment.replace('/', '-')}-{run.config['method']}-{config_hash(run.config)}"
    try:
        result = train(
            model,
            objective,
            TokenWindows(windows),
            settings,
            folder,
            resume=run.resume,
            extra_parameters=penalties.parameters(),
            device=run.config["device"],
            tracker=tracker,
            watch=_watch(run, windows, tracker),
        )
    finally:
        for handle in (captures, sparse):
            if handle is not None:
                handle.remove()
    if run.tracker.checkpoints:
        tracker.artifact(result.checkpoint, folder.name)
    merge_low_rank(model)
    return (
        {"training_seconds": result.seconds, "training_steps": result.steps, **last_step(result.history)},
        result,
    )


def _watch(run: LanguageRun, windows: Tensor, tracker: Tracker) -> AttentionWatch | None:
    """A look at the attention on the first windows."""
    if not run.tracker.active or run.tracker.attention_every is None:
        return None
    looked_at = windows[: run.tracker.attention_items].to(run.config["device"])
    return AttentionWatch(
        # The logits of whole windows would not fit.
        tracker,
        run.tracker,
        lambda model: model(input_ids=looked_at, use_cache=False, logits_to_keep=1),
    )


def _describe(run: LanguageRun, corpora: Mapping[tuple[str, str], Corpus]) -> dict[str, Any]:
    data = run.config["data"]
    revisions = {f"{kind}/{split}": one.revision for (kind, split), one in corpora.items()}
    documents = {f"{kind}/{split}": len(one.documents) for (kind, split), one in corpora.items()}
    return {
        "name": data["name"],
        "text": data["text"]["name"],
        "summaries": data["summaries"]["name"],
        "revisions": revisions,
        "documents": documents,
    }


def _experiment(name: str | None, model: Mapping[str, Any]) -> str:
    """The experiment's name, by what the model is where the configuration leaves it open."""
    if model["architecture"] is not None:
        return name or OTHER_MODEL
    if model["name"] is None:
        known = ", ".join(PAPER_MODELS)
        raise ConfigError(f"name a model, as MODEL=... of make or model.name=...: {known}, or a local folder")
    found = PAPER_MODELS.get(model["name"], (_experiment_of_folder(Path(model["name"]).expanduser()),))[0]
    if name is None:
        return found or OTHER_MODEL
    if name in (own for own, _ in PAPER_MODELS.values()) and found != name:
        raise ConfigError(f"{model['name']} is not the model of {name}; take experiment=llm/other")
    return name


def _experiment_of_folder(folder: Path) -> str | None:
    """Which of the paper's models a local folder holds, by its config.json; None for another or none."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # What is wrong with the folder is said where it is loaded.
        return None
    for name, wanted in PAPER_MODELS.values():
        if all(found.get(key) == value for key, value in wanted.items()):
            return name
    return None


def _check_training(run: LanguageRun) -> None:
    """What the training's own parts would refuse only once the model is there."""
    training, regularizer = run.config["training"], run.config["regularizer"]
    require_choice("training.dtype", training["dtype"], DTYPES)
    require_optimizer(_settings(run).optimizer)
    if regularizer["label_smoothing"] != 0:
        raise ConfigError("language models are trained without label smoothing: regularizer.label_smoothing must be 0")
    _penalties(run).require_decoder()
    check_adaptation(training["adaptation"])
    path = sparsity_from_mapping(run.config["sparsity"])
    if path is not None and not isinstance(path, DecoderSparsity):
        raise ConfigError(f"a language model is trained with a sparsity of kind decoder, got {type(path).__name__}")


def _penalties(run: LanguageRun) -> Penalties:
    values = run.config["regularizer"]["penalties"]
    return Penalties({name: penalty_from_mapping(one) for name, one in values.items()})


def _settings(run: LanguageRun) -> TrainingSettings:
    return training_settings_from_mapping({**run.config["trainer"], "seed": run.config["seed"]})
