"""Everything that is measured on a causal language model, dense and under every plan of a configuration.

Perplexity alone does not tell methods apart: a plan that forgets most of the distant text hardly shows in it. So there
are four tasks (contexts and numbers of items are our choice; the paper states none):

* ``perplexity``: loss on windows of running text;
* ``copy``: loss on the second copy of a text that was just read;
* ``needle``: share of sentences hidden in a long text that are repeated exactly, read and written sparsely;
* ``summary``: ROUGE-L of greedy continuations of articles, against references and against the dense model's own.

Besides, where asked for: tasks of lm-eval (:mod:`entreg.experiments.language.harness`).
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from entreg import distributed
from entreg.adapters import sparsify
from entreg.adapters.language_models import require_context
from entreg.data.language_tasks import copy_windows, needle_tasks, summary_tasks, token_windows
from entreg.data.text import Corpus, corpus
from entreg.errors import ConfigError
from entreg.experiments.language.harness import check_harness, harness_measures
from entreg.experiments.language.measures import (
    SparsityMeter,
    greedy_continuation,
    require_plain_output,
    rouge_l,
    row_supports,
    token_losses,
)
from entreg.names import require_known, require_some
from entreg.progress import progress, progress_bar
from entreg.runs.finished import Finished
from entreg.sparse import DecoderSparsity, sparsity_from_mapping

Row = dict[str, Any]

TASKS = ("perplexity", "copy", "needle", "summary")
EVALUATED_SPLITS = ("validation", "test")

# A token that is written takes as long as reading so many, about, for small models on a CPU.
_READ_WHILE_WRITING = 16

_COMMON = ("contexts", "count", "splits", "levels")
_OWN = {"perplexity": ("stride",), "copy": (), "needle": ("depths",), "summary": ("new_tokens",)}


@dataclass(frozen=True)
class Task:
    """One task at one context length on one split, its items ready.

    Attributes:
        name: one of :data:`TASKS`.
        split: ``validation`` or ``test``.
        context: tokens that the model reads at most, those that it writes included.
        items: (count, n) int64 of ``perplexity`` and ``copy``; a list of tasks of :mod:`entreg.data.language_tasks`
            of the others.
        scored: of ``perplexity`` and ``copy``: number of tokens at the end of each item whose loss counts.
        levels: sparsities of plans under which the task is run; None for all.
        new_tokens: of ``summary``: tokens written at most.
    """

    name: str
    split: str
    context: int
    items: Any
    scored: tuple[int, ...] = ()
    levels: tuple[float, ...] | None = None
    new_tokens: int | None = None


def expand_plans(plans: Mapping[str, Mapping[str, Any] | None]) -> list[tuple[str, float, DecoderSparsity]]:
    """What the entries of ``evaluation.plans`` stand for.

    Args:
        plans: name to a sparsity of kind ``decoder``; ``levels``, a list of sparsities, stands for one plan each, and
            ``vary``, fields to lists of their values, for one plan for every combination, named by its values instead.
            None in place of a sparsity leaves the plan out.

    Returns:
        Name, level and plan of each.

    Raises:
        ConfigError: a value that the plan refuses, another kind, no sparsity, or two plans of one name and level.
    """
    expanded: dict[tuple[str, float], DecoderSparsity] = {}
    for name, values in plans.items():
        if values is None:
            continue
        plain = dict(values)
        levels = plain.pop("levels", None)
        varied = plain.pop("vary", {})
        for chosen in itertools.product(*varied.values()):
            own = "_".join(str(value) for value in chosen) if varied else name
            fields = dict(zip(varied, chosen, strict=True))
            for level in [plain.get("sparsity")] if levels is None else levels:
                plan = sparsity_from_mapping({**plain, **fields, "sparsity": level})
                if not isinstance(plan, DecoderSparsity):
                    raise ConfigError(f"evaluation.plans.{name} must be of kind decoder, got {plain['kind']}")
                if (own, float(level)) in expanded:
                    raise ConfigError(f"evaluation.plans holds two plans {own} of sparsity {level}")
                expanded[own, float(level)] = plan
    return [(name, level, plan) for (name, level), plan in expanded.items()]


def check_evaluation(config: Mapping[str, Any]) -> None:
    """Refuse what cannot be evaluated, before a model is loaded for it.

    Args:
        config: the resolved ``evaluation`` part of ``configs/language.yaml``.

    Raises:
        ConfigError: an unknown task or key, an impossible plan, context, number of items, depth or split.
    """
    expand_plans(config["plans"])
    for name, settings in _tasks(config).items():
        require_known([name], TASKS, "task", "evaluation.tasks")
        require_known(settings, (*_COMMON, *_OWN[name]), "key", f"evaluation.tasks.{name}")
        for key in ("contexts", "count", "splits", *_OWN[name]):
            if key not in settings:
                raise ConfigError(f"evaluation.tasks.{name} needs {key}")
        _require_numbers(f"evaluation.tasks.{name}.contexts", settings["contexts"], 16)
        if settings["count"] is not None or name not in ("perplexity", "copy"):
            _require_numbers(f"evaluation.tasks.{name}.count", [settings["count"]], 1)
        require_some(f"evaluation.tasks.{name}.splits", settings["splits"], EVALUATED_SPLITS, "split")
        if settings.get("stride") is not None:
            _require_numbers("evaluation.tasks.perplexity.stride", [settings["stride"]], 1)
            _require_numbers("evaluation.tasks.perplexity.count with a stride", [settings["count"]], 1)
        if "new_tokens" in settings:
            _require_numbers("evaluation.tasks.summary.new_tokens", [settings["new_tokens"]], 1)
        depths = settings.get("depths", [0.5])
        if not depths or not all(isinstance(depth, int | float) and 0 <= depth <= 1 for depth in depths):
            raise ConfigError(f"evaluation.tasks.needle.depths must be numbers in [0, 1], got {depths}")
    if config["harness"] is not None:
        check_harness(config["harness"])
    support = config["effective_support"]
    if support is not None:
        _require_numbers("evaluation.effective_support", [support["context"], support["count"]], 1)


def open_corpora(
    config: Mapping[str, Any], data: Mapping[str, Any], *, training: bool
) -> dict[tuple[str, str], Corpus]:
    """Every corpus that is needed: what is missing or damaged must show before a model is loaded.

    Args:
        config: the resolved ``evaluation`` part.
        data: the resolved ``data`` part: ``text`` and ``summaries``, each ``name`` and ``root`` of a corpus.
        training: whether the split ``train`` of the running text is needed.

    Returns:
        Corpora by kind (``text``, ``summaries``) and split.

    Raises:
        ConfigError, AssetError: see :func:`entreg.data.text.corpus`.
    """
    wanted = [("text", "train")] if training else []
    for name, settings in _tasks(config).items():
        wanted += [("summaries" if name == "summary" else "text", split) for split in settings["splits"]]
    return {
        (kind, split): corpus(data[kind]["name"], data[kind]["root"], split) for kind, split in dict.fromkeys(wanted)
    }


def open_tasks(config: Mapping[str, Any], corpora: Mapping[tuple[str, str], Corpus], tokenizer: Any) -> list[Task]:
    """The items of every task, tokenised; the same for every seed, method and plan, so that losses can be paired.

    Args:
        config: the resolved ``evaluation`` part.
        corpora: from :func:`open_corpora`.
        tokenizer: the model's.

    Raises:
        InputError, AssetError: the corpora hold too little text for what is asked for.
    """
    tasks = []
    for name, settings in _tasks(config).items():
        levels = settings.get("levels")
        for split in settings["splits"]:
            text = corpora["summaries" if name == "summary" else "text", split]
            for context in settings["contexts"]:
                made = _OPEN[name](text, tokenizer, settings, context, config["seed"])
                tasks.append(Task(name, split, context, levels=None if levels is None else tuple(levels), **made))
    return tasks


def _perplexity(text: Corpus, tokenizer: Any, settings: Mapping[str, Any], context: int, seed: int) -> dict[str, Any]:
    """Disjoint windows, or, with a stride, overlapping ones of one stretch whose new tokens count."""
    count, stride = settings["count"], settings["stride"]
    if stride is None or stride >= context:
        windows = token_windows(text, tokenizer, context, count=count, seed=seed)
        return {"items": windows, "scored": (context - 1,) * len(windows)}
    (stretch,) = token_windows(text, tokenizer, context + (count - 1) * stride, count=1, seed=seed)
    windows = stretch.unfold(0, context, stride).contiguous()
    return {"items": windows, "scored": (context - 1, *[stride] * (count - 1))}


def _copies(text: Corpus, tokenizer: Any, settings: Mapping[str, Any], context: int, seed: int) -> dict[str, Any]:
    half = (context - 1) // 2
    halves = token_windows(text, tokenizer, half, count=settings["count"], seed=seed)
    return {"items": copy_windows(halves, tokenizer), "scored": (half,) * len(halves)}


def _needles(text: Corpus, tokenizer: Any, settings: Mapping[str, Any], context: int, seed: int) -> dict[str, Any]:
    chosen = {"depths": settings["depths"], "count": settings["count"]}
    return {"items": needle_tasks(text, tokenizer, length=context, seed=seed, **chosen)}


def _summaries(text: Corpus, tokenizer: Any, settings: Mapping[str, Any], context: int, seed: int) -> dict[str, Any]:
    new = settings["new_tokens"]
    items = summary_tasks(text, tokenizer, count=settings["count"], max_tokens=context - new, seed=seed)
    return {"items": items, "new_tokens": new}


_OPEN: dict[str, Callable[..., dict[str, Any]]] = {
    "perplexity": _perplexity,
    "copy": _copies,
    "needle": _needles,
    "summary": _summaries,
}


def check_model(model: nn.Module, name: str, config: Mapping[str, Any]) -> None:
    """Refuse what the model cannot do, before anything slow is done with it.

    Args:
        model: stock transformers decoder.
        name: its name, for errors.
        config: the resolved ``evaluation`` part.

    Raises:
        InputError: the model is not supported, or a context is longer than the model's.
        ConfigError: a plan does not fit the model.
    """
    contexts = [max(one["contexts"]) for one in _tasks(config).values()]
    support = config["effective_support"]
    require_context(model, max([*contexts, 1 if support is None else support["context"]]), name)
    require_plain_output(model)
    for _, _, plan in expand_plans(config["plans"]):
        sparsify(model, plan).remove()


def evaluate_everything(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[Task],
    config: Mapping[str, Any],
    *,
    finished: Finished | None = None,
) -> tuple[dict[str, Any], list[Row]]:
    """Measure a model in every way that a configuration asks for.

    The processes of a launcher take turns at the items of every task, and every one gets the numbers of all, those of
    one process to the bit. Effective support and the tasks of lm-eval are measured by each process alone.

    Args:
        model: stock transformers decoder in evaluation mode, on its device.
        tokenizer: the model's.
        tasks: from :func:`open_tasks`.
        config: the resolved ``evaluation`` part.
        finished: what was measured before, which is not measured again; gets what is measured now.

    Returns:
        metrics, and one row per task, context, split and plan, the dense ones first.

    Raises:
        InputError, ConfigError: as :func:`check_model`.
    """
    finished = finished or Finished()
    support, harness = config["effective_support"], config["harness"]
    looked_at = 0 if support is None else support["context"] * support["count"]
    metrics: dict[str, Any] = {}
    written: dict[int, list[str]] = {}
    rows: list[Row] = []
    jobs = []
    for name, level, plan in [("dense", 0.0, None), *expand_plans(config["plans"])]:
        wanted = [
            place for place, task in enumerate(tasks) if plan is None or task.levels is None or level in task.levels
        ]
        with_harness = harness is not None and (plan is None or level in (harness.get("levels") or [level]))
        jobs.append((name, level, plan, wanted, with_harness))
    all_tasks = sum(map(_work, tasks))
    total = sum(sum(_work(tasks[place]) for place in wanted) + all_tasks * more for *_, wanted, more in jobs)
    with progress_bar(looked_at + total, "evaluation") as bar:
        if support is not None:
            supports = functools.partial(_effective_support, model, tasks, support, config["seed"])
            metrics["effective_support"] = finished.measure("effective support", supports, bar, looked_at)
        for name, level, plan, wanted, with_harness in jobs:
            names = {"plan": name, "level": level}
            handle = None if plan is None else sparsify(model, plan, record=True)
            try:
                for place in wanted:
                    task = tasks[place]
                    row, texts = finished.measure(
                        f"{name} {level}, {task.name} {place + 1}",
                        functools.partial(_row, model, handle, tokenizer, task, written.get(place)),
                        bar,
                        _work(task),
                    )
                    rows.append({"task": task.name, **names, **row})
                    if plan is None:
                        written[place] = texts
                if with_harness:
                    # How long its tasks are is not known before: as long as all others, say.
                    found = finished.measure(
                        f"{name} {level}, lm-eval",
                        functools.partial(_harness_rows, model, handle, tokenizer, harness),
                        bar,
                        all_tasks,
                    )
                    rows += [{**row, **names} for row in found]
            finally:
                if handle is not None:
                    handle.remove()
    return metrics, rows


def _work(task: Task) -> float:
    """About how long a task takes, in tokens that are read."""
    written = max([task.new_tokens or 0, *(_length(one.answer_ids) for one in task.items if task.name == "needle")])
    return len(task.items) * (task.context + _READ_WHILE_WRITING * written)


def _row(
    model: nn.Module, handle: Any, tokenizer: Any, task: Task, written: Sequence[str] | None
) -> tuple[Row, list[str] | None]:
    """What one task gives under the plan that is in the model, and what the model wrote.

    ``written`` is what the dense model wrote; None for the dense model itself.
    """
    started = time.perf_counter()
    texts = None
    with SparsityMeter(model, handle) as meter:
        if task.name in ("perplexity", "copy"):
            measured = _loss_measures(model, task)
        elif task.name == "needle":
            measured = _needle_measures(model, task)
        else:
            measured, texts = _summary_measures(model, tokenizer, task, written)
    row = {
        "realised_sparsity": meter.prefill,
        "decode_sparsity": meter.decode,
        "context": task.context,
        "split": task.split,
        "items": len(task.items),
        **measured,
        "seconds": time.perf_counter() - started,
    }
    return row, texts


def _harness_rows(model: nn.Module, handle: Any, tokenizer: Any, settings: Mapping[str, Any]) -> list[Row]:
    """Rows of the harness's tasks; sparsity and seconds are those of all of them together."""
    started = time.perf_counter()
    with SparsityMeter(model, handle) as meter:
        rows = harness_measures(model, tokenizer, settings)
    seconds = time.perf_counter() - started
    measured = {"realised_sparsity": meter.prefill, "decode_sparsity": meter.decode, "seconds": seconds}
    return [{**row, **measured} for row in rows]


def _loss_measures(model: nn.Module, task: Task) -> Row:
    device = next(model.parameters()).device
    sums = _shared(
        lambda item, scored: token_losses(model, item[None].to(device), last=scored).double().sum().item(),
        task.items,
        task.scored,
    )
    loss = sum(sums) / sum(task.scored)
    measured = {
        "tokens": sum(task.scored),
        "loss": loss,
        "loss_per_item": [one / scored for one, scored in zip(sums, task.scored, strict=True)],
    }
    return {**measured, "perplexity": math.exp(loss)} if task.name == "perplexity" else measured


def _needle_measures(model: nn.Module, task: Task) -> Row:
    hits = _shared(
        lambda one: torch.equal(
            greedy_continuation(model, one.input_ids, _length(one.answer_ids)), _flat(one.answer_ids)
        ),
        task.items,
    )
    depths = sorted({one.depth for one in task.items})
    return {
        "tokens": sum(_length(one.answer_ids) for one in task.items),
        "accuracy": statistics.fmean(hits),
        "depths": depths,
        "accuracy_per_depth": [
            statistics.fmean(hit for hit, one in zip(hits, task.items, strict=True) if one.depth == depth)
            for depth in depths
        ],
    }


def _summary_measures(
    model: nn.Module, tokenizer: Any, task: Task, written: Sequence[str] | None
) -> tuple[Row, list[str]]:
    outputs = _shared(lambda one: greedy_continuation(model, one.input_ids, task.new_tokens), task.items)
    texts = [tokenizer.decode(output.tolist(), skip_special_tokens=True) for output in outputs]
    scores = rouge_l([one.reference for one in task.items], texts)
    measured = {
        "tokens": sum(len(output) for output in outputs),
        "rouge_l": statistics.fmean(scores),
        "rouge_l_per_item": scores,
    }
    if written is not None:
        measured["rouge_l_to_dense"] = statistics.fmean(rouge_l(written, texts))
    return measured, texts


def _shared(measure: Callable[..., Any], *items: Sequence[Any]) -> list[Any]:
    """What is measured of every item, in order; the processes of a launcher take turns."""
    turns = distributed.my_turns(len(items[0]))
    return distributed.in_order([measure(*(one[turn] for one in items)) for turn in progress(turns, "items")])


def _effective_support(
    model: nn.Module, tasks: Sequence[Task], settings: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """Of the validation windows (those of the test are for results only), cut to the wanted context."""
    context = settings["context"]
    windows = [one.items for one in tasks if one.name == "perplexity" and one.context >= context]
    if not windows:
        raise ConfigError(
            f"evaluation.effective_support needs a context of at least {context} in evaluation.tasks.perplexity"
        )
    chosen: Tensor = windows[0][: settings["count"], :context]
    supports = row_supports(model, chosen, num_sampled_queries=settings["num_sampled_queries"], seed=seed)
    return {"row": supports, "context": context}


def _tasks(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: settings for name, settings in config["tasks"].items() if settings is not None}


def _flat(ids: Any) -> Tensor:
    return torch.as_tensor(ids).reshape(-1)


def _length(ids: Any) -> int:
    return _flat(ids).numel()


def _require_numbers(what: str, values: Sequence[Any], minimum: int) -> None:
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ConfigError(f"{what} must be whole numbers of at least {minimum}, got {value!r}")
    if not values:
        raise ConfigError(f"{what} must not be empty")
