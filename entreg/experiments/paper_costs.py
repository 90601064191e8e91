"""What the paper-scale experiments cost: GPU hours, memory and storage on any number of GPUs, from measured times.

An experiment is taken apart into pieces of equal units of work, as its configuration says: training steps on images,
evaluation of batches of images, reading of windows and writing of tokens. What a unit takes on one GPU comes from run
records alone (:class:`Measured`); a unit that no record has is not measured, and so is then the experiment. With
several GPUs a run is shared between them as :mod:`entreg.distributed` does it, or each run has one to itself.

Left out, because nothing has measured them: communication between GPUs, reading and decoding of images, loading of
models. Plans and methods that have no measured time of their own count like dense evaluation and plain training.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import hydra
import torch
from omegaconf import OmegaConf

from entreg.adapters.language_models import ARCHITECTURES
from entreg.data.corruptions import CORRUPTIONS, EXTRA_CORRUPTIONS
from entreg.experiments.chosen_plans import chosen_plans
from entreg.experiments.language import evaluation as language_evaluation
from entreg.experiments.vision import evaluation as vision_evaluation
from entreg.records.formatting import number
from entreg.records.tables import Table, device_text

GPUS = (1, 8, 64)
"""Numbers of GPUs that the tables show."""

EXPERIMENTS = {
    "vit/imagenet": "vision",
    "cifar/cifar100": "vision",
    "llm/llama_2_7b": "language",
    "llm/mistral_7b": "language",
    "llm/phi_2": "language",
}
"""The paper-scale experiments and the entry configurations that they belong to."""

IMAGES = {"imagenet": {"train": 1_281_167, "test": 50_000}, "cifar100": {"train": 50_000, "test": 10_000}}
"""Sizes of the data sets, as they are published."""

WINDOW_TOKENS = 350_000
"""Tokens of one split of WikiText-2, validation or test, for a tokenizer of 32,000 words: a round number of ours."""

COMMANDS = {
    "train": "python scripts/benchmark.py benchmark=training_cost benchmark.device=cuda benchmark.precision=bfloat16 "
    "benchmark.batch=64 profile=paper store=results/runs",
    "evaluate": "python scripts/benchmark.py benchmark=vision_speed_gpu profile=paper store=results/runs",
    "read": "python scripts/benchmark.py benchmark=language_speed_gpu profile=paper store=results/runs",
    "write": "python scripts/benchmark.py benchmark=language_speed_gpu profile=paper store=results/runs",
}
"""What measures the units of each kind."""

OPTIMIZER_BYTES = {"weight": 4, "gradient": 4, "moments": 8}
"""Of float32 training with AdamW, per trained weight; a checkpoint holds all but the gradient."""


@dataclass(frozen=True)
class Piece:
    """Equal work of one run.

    Attributes:
        kind: ``train`` (images of a training step), ``evaluate`` (images), ``read`` (windows) or ``write`` (tokens).
        model: as the records of the kind's benchmark call it.
        variant: method of ``train``; context in tokens of ``read`` and ``write``.
        units: in all.
        together: units that one GPU does at once and that are not divided between GPUs: 1, or a batch of an evaluation.
        rounds: how often the GPUs wait for each other: the steps of a training, otherwise 1.
    """

    kind: str
    model: str
    variant: str | int | None
    units: int
    together: int = 1
    rounds: int = 1

    def longest_share(self, gpus: int) -> int:
        """Units that the GPU with the most work does when they share the piece."""
        if self.together == 1:
            return self.rounds * -(-self.units // (self.rounds * gpus))
        batches = -(-self.units // self.together)
        turns = -(-batches // gpus)
        # The last batch may be smaller, which helps only where nobody has as many batches as the GPU that has it.
        alone = batches - 1 == (turns - 1) * gpus
        return turns * self.together - (batches * self.together - self.units if alone else 0)


@dataclass(frozen=True)
class Experiment:
    """A study at the paper's scale.

    Attributes:
        name: of the experiment.
        runs: the pieces of each of its runs.
        trained: weights of its model that are trained; 0 for none.
        checkpoints: that stay of each run.
    """

    name: str
    runs: Sequence[Sequence[Piece]]
    trained: int
    checkpoints: int

    def seconds(self, unit: Callable[[Piece], float | None], gpus: int) -> float | None:
        """Of the whole study, every run shared between the GPUs; None where a unit is not measured."""
        times = [self.run_seconds(run, unit, gpus) for run in self.runs]
        return None if None in times else sum(times)

    def spread_seconds(self, unit: Callable[[Piece], float | None], gpus: int) -> float | None:
        """Of the whole study, each run on one GPU, begun in order as soon as one is free."""
        times = [self.run_seconds(run, unit, 1) for run in self.runs]
        return None if None in times else _queued(times, gpus)

    @staticmethod
    def run_seconds(run: Sequence[Piece], unit: Callable[[Piece], float | None], gpus: int) -> float | None:
        """Of one run."""
        times = [(piece.longest_share(gpus), unit(piece)) for piece in run]
        return None if any(time is None for _, time in times) else sum(share * time for share, time in times)

    @property
    def checkpoint_bytes(self) -> int:
        """On disk when all runs have ended."""
        kept = OPTIMIZER_BYTES["weight"] + OPTIMIZER_BYTES["moments"]
        return len(self.runs) * self.checkpoints * kept * self.trained


def _queued(times: Sequence[float], gpus: int) -> float:
    """When the last run ends if each has one GPU, begun in order as soon as one is free."""
    busy = [0.0] * gpus
    for time in times:
        first = busy.index(min(busy))
        busy[first] += time
    return max(busy)


class Measured:
    """Seconds of one unit on one GPU, from the records of the benchmarks.

    Args:
        records: any; those of a GPU at the scale ``paper`` or ``offline`` count.

    Attributes:
        used: identifiers of the records that were asked for, to their devices.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]]) -> None:
        usable = [one for one in records if one["device"]["gpu"] is not None and one["scale"] != "smoke"]
        self._records = {
            name: [one for one in usable if one["experiment"] == name]
            for name in ("benchmark/training_cost", "vit/speed", "llm/speed")
        }
        self.used: dict[str, Mapping[str, Any]] = {}

    def __call__(self, piece: Piece) -> float | None:
        """Seconds of one unit of a piece, or None."""
        found = {"train": self._train, "evaluate": self._evaluate, "read": self._read, "write": self._write}
        best = min(found[piece.kind](piece), key=lambda pair: pair[0], default=None)
        if best is None:
            return None
        seconds, record = best
        self.used[record["id"]] = record["device"]
        return seconds

    def _train(self, piece: Piece) -> list[tuple[float, Mapping[str, Any]]]:
        matching = [one for one in self._records["benchmark/training_cost"] if one["config"]["model"] == piece.model]
        rows = [(row["method"], row["seconds_per_image"], one) for one in matching for row in one["rows"]]
        own = [(seconds, one) for method, seconds, one in rows if method == piece.variant]
        return own or [(seconds, one) for method, seconds, one in rows if method == "plain"]

    def _evaluate(self, piece: Piece) -> list[tuple[float, Mapping[str, Any]]]:
        return [
            (row["seconds"] / row["batch"], one)
            for one in self._records["vit/speed"]
            if one["model"]["name"] == piece.model
            for row in one["rows"]
            if row["method"] == "dense" and row["batch"] <= piece.together
        ]

    def _read(self, piece: Piece) -> list[tuple[float, Mapping[str, Any]]]:
        return [(row["seconds"], one) for row, one in self._language(piece, "prefill")]

    def _write(self, piece: Piece) -> list[tuple[float, Mapping[str, Any]]]:
        return [(row["milliseconds_per_token"] / 1000, one) for row, one in self._language(piece, "decode")]

    def _language(self, piece: Piece, phase: str) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        """Rows of the dense model with the shortest context that is at least the piece's."""
        rows = [
            (row, one)
            for one in self._records["llm/speed"]
            if one["model"]["name"] == piece.model
            for row in one["rows"]
            if (row["method"], row["phase"], row["batch"]) == ("dense", phase, 1) and row["context"] >= piece.variant
        ]
        shortest = min((row["context"] for row, _ in rows), default=None)
        return [(row, one) for row, one in rows if row["context"] == shortest]


def paper_experiment(name: str) -> Experiment:
    """The study of a name of :data:`EXPERIMENTS`, taken apart. Hydra must be initialised.

    Raises:
        ConfigError: a configuration that is not possible.
    """
    entry = EXPERIMENTS[name]
    # What has to be named at the paper's scale does not decide the costs.
    overrides = [f"experiment={name}", "profile=paper"]
    config = OmegaConf.to_container(hydra.compose(entry, overrides), resolve=True)
    methods = config["study"]["methods"]
    seeds = config["profile"]["seeds"] if config["study"]["seeds"] is None else config["study"]["seeds"]
    runs = []
    for words in methods.values():
        one = OmegaConf.to_container(hydra.compose(entry, [*overrides, *words]), resolve=True)
        one["evaluation"]["plans"] = chosen_plans(one)
        runs += [(_vision_pieces if entry == "vision" else _language_pieces)(name, one)] * len(seeds)
    trained = 0
    if config["trainer"]["steps"] > 0:
        vision = entry == "vision"
        trained = parameters(_empty_vision_model(config["model"]) if vision else empty_decoder(name.split("/")[1]))
    kept = config["trainer"]["keep_checkpoints"]
    if entry == "vision" and config["base"]["trainer"]["steps"] > 0:
        # The dense model of a seed is trained once, and shared by its methods.
        base = _training(config["base"]["trainer"], config["model"]["name"], "plain")
        runs += [[base]] * len(seeds)
    return Experiment(name, runs, trained, kept)


def _vision_pieces(name: str, config: Mapping[str, Any]) -> list[Piece]:
    model, evaluation = config["model"]["name"], config["evaluation"]
    pieces = [_training(config["trainer"], model, _method(config))] if config["trainer"]["steps"] > 0 else []
    sizes = IMAGES[config["data"]["name"]]
    held_out = round(config["data"]["validation_fraction"] * sizes["train"])
    plans = 1 + len(vision_evaluation.expand_plans(evaluation["plans"]))
    passes = {"validation": plans, "test": plans}
    if evaluation["localisation"] is not None:
        passes = {split: count + 1 for split, count in passes.items()}
    robustness = evaluation["robustness"]
    if robustness is not None:
        corruptions = len(CORRUPTIONS) + (len(EXTRA_CORRUPTIONS) if robustness["extra"] else 0)
        passes["test"] += 2 * corruptions * len(robustness["severities"])
    images = {"validation": held_out, "test": sizes["test"]}
    for split in evaluation["splits"]:
        one = Piece("evaluate", model, None, images[split], together=evaluation["batch_size"])
        pieces += [one] * passes[split]
    return pieces


def _training(trainer: Mapping[str, Any], model: str, method: str) -> Piece:
    units = trainer["steps"] * trainer["batch_size"]
    return Piece("train", model, method, units, rounds=trainer["steps"])


def _method(config: Mapping[str, Any]) -> str:
    """What the benchmark of the training cost calls a method."""
    sparsity = config["sparsity"]
    if sparsity is not None and sparsity.get("kind") == "tokens":
        return "partition_loop" if sparsity.get("reduction") == "partition" else "sparse_loop"
    return next(iter(config["regularizer"]["penalties"]), "plain")


def _language_pieces(name: str, config: Mapping[str, Any]) -> list[Piece]:
    model, evaluation = name.split("/")[1], config["evaluation"]
    levels = [0.0, *[level for _, level, _ in language_evaluation.expand_plans(evaluation["plans"])]]
    pieces = []
    for task, settings in evaluation["tasks"].items():
        if settings is None:
            continue
        allowed = settings.get("levels")
        times = sum(1 for level in levels if level == 0 or allowed is None or level in allowed)
        for context in settings["contexts"]:
            items = settings["count"] or WINDOW_TOKENS // context
            if task == "needle":
                items *= len(settings["depths"])
            written = {"summary": settings.get("new_tokens"), "needle": _NEEDLE_TOKENS}.get(task)
            for _ in range(times * len(settings["splits"])):
                pieces.append(Piece("read", model, context, items))
                if written is not None:
                    pieces.append(Piece("write", model, context, items * written, together=written))
    return pieces


_NEEDLE_TOKENS = 16
"""Tokens of a hidden sentence, roughly."""


def parameters(model: torch.nn.Module) -> int:
    """Weights of a model."""
    return sum(one.numel() for one in model.parameters())


def empty_decoder(architecture: str) -> torch.nn.Module:
    """A published architecture of :data:`entreg.adapters.language_models.ARCHITECTURES` without memory for weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, published = ARCHITECTURES[architecture]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **published), dtype=torch.float32)


def _empty_vision_model(model: Mapping[str, Any]) -> torch.nn.Module:
    import timm

    with torch.device("meta"):
        return timm.create_model(model["name"], **model["options"])


def state_bytes(model: torch.nn.Module, gpus: int) -> int:
    """Weights, gradients and moments on one GPU when all weights of a decoder are trained in float32.

    Fully sharded between several GPUs each has its part of every weight, split along the first dimension, and whole
    weights besides of what belongs to no layer and of one layer at a time, see :mod:`entreg.training.sharding` (the
    next layer's, which may come while that one computes, and activations are not counted).
    """
    own = sum(-(-len(one) // gpus) * (one.numel() // len(one)) for one in model.parameters())
    state = sum(OPTIMIZER_BYTES.values()) * own
    if gpus == 1:
        return state
    layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    sizes = [parameters(layer) for layer in layers]
    return state + OPTIMIZER_BYTES["weight"] * (max(sizes) + parameters(model) - sum(sizes))


def cost_tables(experiments: Sequence[Experiment], records: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The tables of :file:`docs/scale_out_costs.md`.

    Args:
        experiments: from :func:`paper_experiment`.
        records: any run records.
    """
    unit = Measured(records)
    rows = []
    missing: dict[str, None] = {}
    for one in experiments:
        kinds = dict.fromkeys(piece.kind for run in one.runs for piece in run if unit(piece) is None)
        missing.update({COMMANDS[kind]: None for kind in kinds})
        times = [one.seconds(unit, gpus) for gpus in GPUS]
        spread = one.spread_seconds(unit, GPUS[-1])
        cells = ["not measured" if time is None else _hours(time) for time in (*times, spread)]
        images = sum(piece.units for run in one.runs for piece in run if piece.kind == "train")
        rows.append([one.name, len(one.runs), images, *cells, _gigabytes(one.checkpoint_bytes)])
    devices = sorted({device_text(device) for device in unit.used.values()})
    notes = [f"Measured on {', '.join(devices)}."] if devices else []
    notes += [f"Not measured yet: `{command}`." for command in missing]
    hours = [f"hours on {gpus}" for gpus in GPUS]
    studies = Table(
        name="scale-out-costs",
        title="Studies at the paper's scale",
        columns=["study", "runs", "images trained on", *hours, f"hours on {GPUS[-1]}, one run each", "checkpoints"],
        rows=rows,
        notes=[
            "GPU hours are hours times GPUs. Nothing is counted but the work of the GPUs: communication between them, "
            "reading and decoding of images and loading of models are left out, sparse plans count as dense ones.",
            *notes,
        ],
    )
    finished = _finished(records)
    memory = []
    for name in ("llama_2_7b", "mistral_7b", "phi_2"):
        model = empty_decoder(name)
        memory.append([name, parameters(model), *[_gigabytes(state_bytes(model, gpus)) for gpus in GPUS]])
    states = Table(
        name="scale-out-memory",
        title="Memory of one GPU when all weights are trained",
        columns=["model", "weights", *[f"of {gpus}" if gpus > 1 else "of one" for gpus in GPUS]],
        rows=memory,
        notes=[
            "Weights, gradients and AdamW's moments in float32, and with several GPUs the whole weights of one layer "
            "and of what belongs to none; activations come on top, few with `trainer.gradient_checkpointing=true`."
        ],
    )
    return [studies, *([] if finished is None else [finished]), states]


def _finished(records: Sequence[Mapping[str, Any]]) -> Table | None:
    """What the runs that have records of a GPU took, as a whole and per item of training."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for one in sorted(records, key=lambda one: one["id"]):
        if one["device"]["gpu"] is not None and one["scale"] != "smoke" and "trainer" in one["config"]:
            groups.setdefault((one["experiment"], one["device"]["gpu"]), []).append(one)
    rows = []
    for (experiment, gpu), runs in sorted(groups.items()):
        times = [one["wall_seconds"] for one in runs]
        paces = [
            one["metrics"]["training_steps"]
            * one["config"]["trainer"]["batch_size"]
            / one["metrics"]["training_seconds"]
            for one in runs
            if one["metrics"].get("training_steps")
        ]
        hours = [_hours(_queued(times, gpus)) for gpus in GPUS]
        rows.append([experiment, gpu, len(runs), statistics.median(paces) if paces else None, *hours])
    if not rows:
        return None
    hours = [f"hours on {gpus}" for gpus in GPUS]
    return Table(
        name="scale-out-finished",
        title="Studies with records of a GPU",
        columns=["study", "GPU", "runs", "images or windows per second", *hours],
        rows=rows,
        notes=[
            "Of the records' own clocks, evaluation and loading of the model included; the pace is the median of the "
            "runs' training. On several GPUs each run has one to itself."
        ],
    )


def _hours(seconds: float) -> str:
    return number(seconds / 3600)


def _gigabytes(size: int) -> str:
    return f"{number(size / 1e9)} GB"


def cost_page(experiments: Sequence[Experiment], records: Sequence[Mapping[str, Any]]) -> str:
    """The page of :func:`cost_tables`, Markdown."""
    parts = [
        "# Costs at the paper's scale",
        "Written by `make costs`; the arithmetic is in [scale_out.md](scale_out.md).",
    ]
    for table in cost_tables(experiments, records):
        parts += [f"## {table.title}", table.body_markdown().strip(), "\n".join(f"- {note}" for note in table.notes)]
    return "\n\n".join(parts) + "\n"
