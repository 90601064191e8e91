"""What the language models' speed benchmark may be asked for, checked before any model is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from entreg.adapters.language_models import ARCHITECTURES
from entreg.errors import ConfigError
from entreg.experiments.language.speed.candidates import Cell
from entreg.names import require_known
from entreg.sparse import DecoderSparsity, sparsity_from_mapping

PHASES = ("prefill", "decode")


def phases_within(
    phases: Mapping[str, Mapping[str, Sequence[int]] | None], max_context: int | None, tokens_per_call: int
) -> dict[str, dict[str, list[int]]]:
    """The phases that are measured, contexts above a limit cut to it.

    Raises:
        ConfigError: an unknown phase, none, or contexts, batches or tokens per call that are impossible.
    """
    found = {}
    for phase, sizes in phases.items():
        require_known([phase], PHASES, "phase", "the speed benchmark")
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


def cells_of(phases: Mapping[str, Mapping[str, Sequence[int]]]) -> Iterator[Cell]:
    for phase, sizes in phases.items():
        for context in sizes["contexts"]:
            for batch in sizes["batches"]:
                yield Cell(phase, context, batch)


def checked_models(models: Mapping[str, Mapping[str, Any]], limits: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
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


def require_possible_architecture(config: Mapping[str, Any]) -> None:
    """What a random model's configuration says is found before any model is made."""
    source = config["source"]
    if "architecture" not in source:
        return
    fields = {**ARCHITECTURES[source["architecture"]][1], **source["options"]}
    longest = max(cell.context for cell in cells_of(config["phases"]))
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
