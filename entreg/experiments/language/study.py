"""Access to the records of the language experiments: quality of a model by training method, plan, level and context.

Nothing is averaged over scales, models or data sets: :func:`quality_studies` and :func:`training_studies` make one
study of each. Losses are in nats per token; ROUGE-L is F1 from 0 to 100. Numbers are those of the test split; the
validation split only chooses (:meth:`LanguageStudy.best_plan`).
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from entreg.experiments.method_names import label as training_label
from entreg.records.record import SCALES
from entreg.records.statistics import (
    DifferenceTest,
    Estimate,
    exponential,
    mean_and_interval,
    paired_difference,
    paired_test,
)

LANGUAGE = ("llm/",)
SPEED = "llm/speed"
TRAINING = "llm/training"
OTHER_MODEL = "llm/other"
"""The experiment of a model that is neither the offline one nor one of the paper's."""

PAPER_MODELS = ("llama_2_7b", "mistral_7b", "phi_2")
"""The paper's models; the experiments on them are called ``llm/<model>``."""

DENSE, OURS, WINDOW = "dense", "ours", "window"
"""Names of plans: nothing sparse, the project's default plan, and the rival that sees the sink and the latest keys."""

ORACLES = ("topk", "oracle")
"""Plans that know the exact scores: bounds on what choosing well can bring, no rivals."""

PLAIN = "plain"
"""The training method with cross-entropy only."""

UNTRAINED = ("none", "untrained", "stock", DENSE, PLAIN)
"""Names of the method that leaves a model as it is, the first one that is there counts."""

WANTED_SPARSITY = 0.75
CLAIMED_SPARSITY = (0.70, 0.75)
# A whole number of blocks cannot hit a sparsity exactly: at 2,048 keys one block of 64 more per row is 5 points.
SPARSITY_TOLERANCE = 0.02

REFERENCE_CONTEXT = 2048
"""Context length at which quality is told where only one is told (our choice; the paper names none)."""

MODEL_LABELS = {
    "smollm2": "SmolLM2-135M",
    "smollm2_135m": "SmolLM2-135M",
    "llama_2_7b": "LLaMA-2 7B",
    "mistral_7b": "Mistral-7B",
    "phi_2": "Phi-2",
    "Llama-2-7b-hf": "LLaMA-2 7B",
    "Mistral-7B-v0.1": "Mistral-7B",
    "phi-2": "Phi-2",
}

_METHOD_LABELS = {
    **dict.fromkeys(UNTRAINED, "no further training"),
    PLAIN: "plain steps (cross-entropy only)",
    "block_entropy": "block entropy",
    "l1_logits": "L1 on scores",
}

_PLAN_LABELS = {
    "ours_fine": "ours, fine blocks",
    "window": "sink + window (StreamingLLM)",
    "topk": "best keys per row (oracle)",
    "oracle": "best blocks (oracle)",
    "pooled": "mean-pooled",
    "sampled": "sampled queries",
}

# Numbers in plans' names are block sizes or sparsities in per cent.
_BLOCK_SIZES = (8, 16, 32, 64, 128, 256)

Key = tuple[str, str, float, int, str]


def model_label(model: str) -> str:
    """What tables call a model, which may be given by its name on the hub or by a folder."""
    name = model.rstrip("/").rpartition("/")[2]
    return MODEL_LABELS.get(name, name.replace("_", " "))


def method_label(method: str) -> str:
    """What tables call a training method."""
    return _METHOD_LABELS.get(method) or training_label(method)


def plan_label(plan: str) -> str:
    """What tables call a plan: ``ours_90`` is ``ours, 90 %``, ``pooled_32`` is ``mean-pooled, blocks of 32``."""
    beginning = max((one for one in _PLAN_LABELS if plan == one or plan.startswith(f"{one}_")), key=len, default=None)
    first, *rest = plan.split("_") if beginning is None else [beginning, *plan[len(beginning) + 1 :].split("_")]
    return ", ".join([_PLAN_LABELS.get(first, first), *(_word(one) for one in rest if one)])


def _word(text: str) -> str:
    if not text.isdigit():
        return f"{text} budget" if text in ("entropy", "mass") else text
    return f"blocks of {text}" if int(text) in _BLOCK_SIZES else f"{text} %"


def is_default(method: str) -> bool:
    """Whether a plan's name is that of the default plan, at whatever sparsity: ``ours`` or ``ours_75``."""
    return re.fullmatch(rf"{OURS}(_\d+)?", method) is not None


def setting(record: Mapping[str, Any], name: str) -> Any:
    """A setting of a run, at the top of its configuration or of its model; None where it has none."""
    places = (record["config"], record["config"].get("model"))
    found = (place.get(name) for place in places if isinstance(place, Mapping))
    return next((value for value in found if value is not None), None)


def where(record: Mapping[str, Any]) -> str:
    """The device in words: the GPU's name, or the number of CPU threads."""
    device = record["device"]
    kind = setting(record, "device")
    if device["gpu"] is not None and (kind is None or str(kind).startswith("cuda")):
        return device["gpu"]
    threads = record["metrics"].get("threads") or setting(record, "threads") or device["threads"]
    return f"CPU, {threads} thread(s)"


def random_weights(record: Mapping[str, Any]) -> bool:
    """Whether a record's model has random weights, which decide quality and not speed."""
    model = record["model"] or {}
    return any("random weights" in str(model.get(field)) for field in ("weights", "revision"))


class LanguageStudy:
    """Rows of ``llm/...`` records of one experiment, model and scale.

    Args:
        records: at least one; where a method and seed has several (another commit or setting), the newest counts.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        self.records: dict[tuple[str, int], Mapping[str, Any]] = {}
        for record in sorted(records, key=lambda one: (one["utc"], one["id"])):
            self.records[record["config"]["method"], record["seed"]] = record
        self._rows: dict[tuple[str, int], dict[Key, Mapping[str, Any]]] = {
            one: {_key(row): row for row in record["rows"] if "task" in row} for one, record in self.records.items()
        }
        self.methods = sorted(dict.fromkeys(method for method, _ in self.records), key=_place)

    @property
    def record_ids(self) -> list[str]:
        """Identifiers of the records that are used."""
        return sorted(record["id"] for record in self.records.values())

    def ids_of(self, *methods: str) -> list[str]:
        """Identifiers of the records of some training methods; those that were not run add nothing."""
        return [record["id"] for (method, _), record in self.records.items() if method in methods]

    @property
    def scale(self) -> str:
        return self._any["scale"]

    @property
    def experiment(self) -> str:
        return self._any["experiment"]

    @property
    def model(self) -> str:
        """The model in words."""
        name = (self._any["model"] or {"name": "model"})["name"]
        if self.experiment != OTHER_MODEL and not self.experiment.startswith(TRAINING):
            name = self.experiment.removeprefix(LANGUAGE[0])
        return model_label(name) + (", random weights" if self.random_weights else "")

    @property
    def random_weights(self) -> bool:
        """Whether the model has random weights, so that its quality means nothing."""
        return random_weights(self._any)

    @property
    def title(self) -> str:
        """Model and scale, which no number may be read without."""
        return f"{self.model}, {self.scale}"

    @property
    def circumstances(self) -> str:
        """Data, precision and device in words."""
        dataset = self._any["dataset"]
        data = dataset.get("text", dataset["name"])
        if self.contexts("summary") and dataset.get("summaries", data) != data:
            data = f"{data}, articles of {dataset['summaries']}"
        parts = [data, setting(self._any, "dtype"), where(self._any)]
        return ", ".join(str(part) for part in parts if part)

    @property
    def base(self) -> str:
        """The method that stands for the model as it is: see :data:`UNTRAINED`, else the first."""
        return next((name for name in UNTRAINED if name in self.methods), self.methods[0])

    @property
    def _any(self) -> Mapping[str, Any]:
        return next(iter(self.records.values()))

    def seeds(self, method: str) -> list[int]:
        """Seeds that the method was run with."""
        return sorted(seed for name, seed in self.records if name == method)

    def plans(self) -> list[str]:
        """Names of the sparse plans, the default one first, then in the order of the rows."""
        found = dict.fromkeys(plan for rows in self._rows.values() for _, plan, *_ in rows if plan != DENSE)
        return sorted(found, key=lambda plan: plan != OURS)

    def levels(self, plan: str) -> list[float]:
        """Levels of sparsity at which a plan was evaluated, ascending."""
        return sorted({level for rows in self._rows.values() for _, name, level, *_ in rows if name == plan})

    def nearest_level(self, plan: str, wanted: float = WANTED_SPARSITY) -> float | None:
        """The level nearest to a wanted one, the sparser of two; None for a plan that was not evaluated."""
        return min(self.levels(plan), key=lambda level: (abs(level - wanted), -level), default=None)

    def contexts(self, task: str) -> list[int]:
        """Context lengths at which a task was tested, ascending."""
        rows = (key for found in self._rows.values() for key in found)
        return sorted({context for name, _, _, context, split in rows if name == task and split == "test"})

    def reference_context(self, task: str) -> int | None:
        """The context nearest to :data:`REFERENCE_CONTEXT`, the longer of two; None for a task that was not run."""
        return min(self.contexts(task), key=lambda context: (abs(context - REFERENCE_CONTEXT), -context), default=None)

    def rows(
        self,
        method: str,
        task: str,
        plan: str,
        level: float | None = 0.0,
        *,
        context: int | None = None,
        split: str = "test",
    ) -> dict[int, Mapping[str, Any]]:
        """Seed to row of one method, task, plan and level, by default at the task's reference context."""
        place = self.reference_context(task) if context is None else context
        if place is None or level is None:
            return {}
        key = (task, plan, _rounded(level), place, split)
        found = {seed: self._rows[method, seed].get(key) for seed in self.seeds(method)}
        return {seed: row for seed, row in found.items() if row is not None}

    def mean(self, method: str, task: str, plan: str, level: float | None, field: str, **chosen: Any) -> float | None:
        """Mean of a field over the seeds, or None where it was not measured."""
        values = _values(self.rows(method, task, plan, level, **chosen), field)
        return statistics.fmean(values.values()) if values else None

    def increase(
        self, method: str, task: str, plan: str, level: float | None, field: str, **chosen: Any
    ) -> Estimate | None:
        """A plan's value minus dense, mean over shared seeds, with the 95 % interval paired by item.

        Items are windows, or articles. One that several seeds saw counts once, with the seeds' mean: its text is one
        sample. Without the values of single items there is no interval.
        """
        dense = self.rows(method, task, DENSE, **chosen)
        sparse = self.rows(method, task, plan, level, **chosen)
        pairs = [(sparse[seed], dense[seed]) for seed in sparse if seed in dense]
        pairs = [pair for pair in pairs if all(row.get(field) is not None for row in pair)]
        if not pairs:
            return None
        # Of the rows' own values, which weigh items by their tokens; so ratios of a table's numbers are the table's.
        mean = statistics.fmean(a[field] - b[field] for a, b in pairs)
        items = [[row.get(f"{field}_per_item") or [] for row in pair] for pair in pairs]
        lengths = {len(values) for pair in items for values in pair}
        if len(lengths) > 1 or lengths == {0}:
            return Estimate(mean, None, None, len(pairs))
        by_seed = [[a - b for a, b in zip(*pair, strict=True)] for pair in items]
        found = mean_and_interval([statistics.fmean(values) for values in zip(*by_seed, strict=True)])
        ends = [None if end is None else mean + end - found.mean for end in (found.low, found.high)]
        return Estimate(mean, *ends, found.count)

    def minus_ours(self, method: str, task: str, plan: str, level: float | None, field: str) -> DifferenceTest | None:
        """A plan's value minus the default plan's at its nearest level, tested in pairs over items; see `increase`.

        None for the default plan itself, and where the values of single items are missing.
        """
        if plan == OURS:
            return None
        ours = self.rows(method, task, OURS, self.nearest_level(OURS))
        theirs = self.rows(method, task, plan, level)
        items = [
            (theirs[seed].get(f"{field}_per_item"), ours[seed].get(f"{field}_per_item"))
            for seed in theirs
            if seed in ours
        ]
        lengths = {len(values or ()) for pair in items for values in pair}
        if len(lengths) != 1 or lengths == {0}:
            return None
        sides = [[statistics.fmean(values) for values in zip(*side, strict=True)] for side in zip(*items, strict=True)]
        return paired_test(*sides)

    def drop(
        self, method: str, task: str, plan: str, level: float | None, field: str, **chosen: Any
    ) -> Estimate | None:
        """Dense minus a plan's value, of a field of which more is better; see :meth:`increase`."""
        found = self.increase(method, task, plan, level, field, **chosen)
        if found is None:
            return None
        low, high = (None if end is None else -end for end in (found.high, found.low))
        return Estimate(-found.mean, low, high, found.count)

    def perplexity_ratio(self, method: str, plan: str, level: float | None, **chosen: Any) -> Estimate | None:
        """Perplexity of a plan over dense, with the 95 % interval paired over windows."""
        found = self.increase(method, "perplexity", plan, level, "loss", **chosen)
        return None if found is None else exponential(found)

    def gaps(self, method: str, plan: str, level: float | None, **chosen: Any) -> dict[int, float]:
        """Seed to perplexity of a plan over the same model's dense one, minus one, in per cent."""
        dense = _values(self.rows(method, "perplexity", DENSE, **chosen), "loss")
        sparse = _values(self.rows(method, "perplexity", plan, level, **chosen), "loss")
        return {seed: 100.0 * math.expm1(sparse[seed] - dense[seed]) for seed in sparse if seed in dense}

    def perplexity_over(self, first: str, second: str, plan: str, level: float | None) -> Estimate | None:
        """Perplexity of a plan on one method's models over that on another's, paired by seed with a 95 % interval."""
        ours, theirs = (self.losses(method, plan, level) for method in (first, second))
        seeds = [seed for seed in ours if seed in theirs]
        if not seeds:
            return None
        return exponential(paired_difference([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]))

    def losses(self, method: str, plan: str, level: float | None = 0.0, **chosen: Any) -> dict[int, float]:
        """Seed to loss on plain text, nats per token."""
        return _values(self.rows(method, "perplexity", plan, level, **chosen), "loss")

    def realised(
        self, method: str, plan: str, level: float | None, tasks: Sequence[str], field: str = "realised_sparsity"
    ) -> tuple[float, float] | None:
        """Least and largest realised sparsity over tasks (at their reference contexts) and seeds."""
        values = [value for task in tasks for value in _values(self.rows(method, task, plan, level), field).values()]
        return (min(values), max(values)) if values else None

    def best_plan(self, method: str, plans: Sequence[str], wanted: float = WANTED_SPARSITY) -> str | None:
        """The plan of the lowest validation loss on plain text, each at its level nearest to the wanted sparsity."""
        means = {
            plan: self.mean(method, "perplexity", plan, self.nearest_level(plan, wanted), "loss", split="validation")
            for plan in plans
        }
        means = {plan: mean for plan, mean in means.items() if mean is not None}
        return min(means, key=means.get) if means else None

    def effective_support(self, method: str) -> tuple[list[list[float]], int] | None:
        """Effective support of the dense model's rows per layer and head, mean over the seeds, and its context."""
        found = [self.records[method, seed]["metrics"].get("effective_support") for seed in self.seeds(method)]
        found = [one for one in found if one and one.get("row")]
        if not found or len({(one["context"], *map(len, one["row"])) for one in found}) > 1:
            return None
        layers = zip(*(one["row"] for one in found), strict=True)
        means = [[statistics.fmean(head) for head in zip(*layer, strict=True)] for layer in layers]
        return means, found[0]["context"]


def quality_studies(records: Iterable[Mapping[str, Any]]) -> list[LanguageStudy]:
    """One study per scale and experiment ``llm/<model>``, the largest scale first."""
    return _studies(record for record in records if not record["experiment"].startswith((SPEED, TRAINING)))


def training_studies(records: Iterable[Mapping[str, Any]]) -> list[LanguageStudy]:
    """One study per scale and model of the experiment ``llm/training``, the largest scale first."""
    return _studies(record for record in records if record["experiment"].startswith(TRAINING))


def _studies(records: Iterable[Mapping[str, Any]]) -> list[LanguageStudy]:
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        if record["experiment"].startswith(LANGUAGE) and "method" in record["config"]:
            model = (record["model"] or {}).get("name", "")
            key = (-SCALES.index(record["scale"]), record["experiment"], model, record["dataset"]["name"])
            groups.setdefault(key, []).append(record)
    return [LanguageStudy(groups[key]) for key in sorted(groups)]


def _key(row: Mapping[str, Any]) -> Key:
    return (row["task"], row["plan"], _rounded(row["level"]), row["context"], row["split"])


def _rounded(level: float | None) -> float:
    return round(level or 0.0, 6)


def _values(rows: Mapping[int, Mapping[str, Any]], field: str) -> dict[int, float]:
    return {seed: row[field] for seed, row in rows.items() if row.get(field) is not None}


def _place(method: str) -> tuple[int, int, str]:
    first = UNTRAINED.index(method) if method in UNTRAINED else len(UNTRAINED)
    return (first, method.startswith(OURS), method)
