"""Tasks of EleutherAI's evaluation harness (package lm-eval) on a model that is in memory, dense or sparse.

The harness is optional and brings its own data from the Hugging Face hub; nothing here is imported without it. Most of
its tasks have short prompts, on which a plan of long contexts leaves nothing out: the row's realised sparsity tells.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from entreg.adapters.language_models import max_context
from entreg.errors import AssetError, ConfigError
from entreg.names import require_known

KEYS = ("tasks", "limit", "num_fewshot", "levels", "include_path")


def check_harness(settings: Mapping[str, Any]) -> None:
    """Refuse what the harness cannot do, before a model is loaded.

    Args:
        settings: ``tasks``, names of the harness's; ``limit``, examples of each (None: all); ``num_fewshot`` (None:
            the task's own); ``levels`` of sparsity under which they are run (None: all); ``include_path``, a folder of
            more tasks (None: none).

    Raises:
        ConfigError: an unknown key, no task, or the package is missing.
    """
    require_known(settings, KEYS, "key", "evaluation.harness")
    if not settings.get("tasks"):
        raise ConfigError("evaluation.harness needs tasks, names of lm-eval's such as [hellaswag, arc_easy]")
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("evaluation.harness needs the package lm-eval: pip install lm-eval")


def harness_measures(model: nn.Module, tokenizer: Any, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Run the harness's tasks on a model.

    Args:
        model: transformers decoder in evaluation mode.
        tokenizer: the model's.
        settings: see :func:`check_harness`.

    Returns:
        One row per task: ``task`` (``lm_eval/`` and its name), ``context`` (the model's longest), ``split``,
        ``items``, and the task's metrics under the harness's names, such as ``acc`` and ``acc_norm``.

    Raises:
        ConfigError: the harness has no such task.
        AssetError: its data cannot be had.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # Whole configurations of tasks, otherwise.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=settings.get("include_path"))
    missing = [name for name in settings["tasks"] if name not in manager.all_tasks]
    if missing:
        raise ConfigError(f"lm-eval has no task '{missing[0]}'; `lm_eval ls tasks` lists those that it has")
    longest = max_context(model)
    try:
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=longest),
            tasks=list(settings["tasks"]),
            num_fewshot=settings.get("num_fewshot"),
            limit=settings.get("limit"),
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=False,
        )
    # Without a network the data end in errors of four libraries.
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise AssetError(f"lm-eval cannot run {', '.join(settings['tasks'])}: {reason}") from error
    return [
        {
            "task": f"lm_eval/{name}",
            "context": longest,
            "split": "test",
            "items": found["n-samples"][name]["effective"],
            **{key.partition(",")[0]: value for key, value in values.items() if _is_metric(key, value)},
        }
        for name, values in found["results"].items()
        if name in found["n-samples"]
    ]


def _is_metric(key: str, value: Any) -> bool:
    return "," in key and "_stderr" not in key and isinstance(value, int | float)
