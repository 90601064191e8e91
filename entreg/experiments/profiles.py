"""What a profile may do to a configuration, checked before anything runs.

A profile says how much of every experiment is run: it leaves out, cuts and replaces what the configurations say. Never
what was typed: an option that would not be served is refused, in a sentence that names the profile's key. And its lists
of names are checked: names that were typed against those of the experiment, names of a profile's file, which serves all
experiments, against those of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from entreg.cli import CONFIGS, FAMILIES
from entreg.data.points import POINT_SETS
from entreg.errors import ConfigError
from entreg.experiments.chosen_plans import chosen_plans, require_typed_plans
from entreg.experiments.config_schemas import SCHEMAS
from entreg.names import require_known
from entreg.schema import require_arguments, require_fit

_GIVEN_TO_BENCHMARKS = ("profile", "store", "command", "force")


@dataclass(frozen=True)
class _Limit:
    """What a key of the profile does to a key of the configuration.

    Attributes:
        key: of the configuration, ``*`` for any name.
        limit: key of the profile.
        serves: of the configuration's value and the profile's, whether the first is kept as it is.
        does: what happens to it otherwise.
        entry: the configuration that it is for; None for all.
        beside: a key of the configuration without which it is not for it; None for none.
        chosen: whether choosing the group that the key belongs to counts as having typed it.
    """

    key: str
    limit: str
    serves: Callable[[Any, Any], bool]
    does: str
    entry: str | None = None
    beside: str | None = None
    chosen: bool = False


def _at_most(value: Any, limit: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    # Null stands for all that there are.
    return all((math.inf if one is None else one) <= limit for one in values)


def _only(values: Any, allowed: Any) -> bool:
    # Where none is allowed, the first is run all the same.
    return all(value in allowed for value in values) or len(values) == 1


def _same(value: Any, replacement: Any) -> bool:
    return value == replacement


def _never(value: Any, replacement: Any) -> bool:
    return False


_LIMITS = (
    _Limit("study", "geometry.experiments", _only, "leaves a part of it out", "geometry"),
    _Limit("distributions", "geometry.distributions", _only, "leaves a part of it out", "geometry"),
    _Limit("sizes", "geometry.max_points", _at_most, "cuts it"),
    _Limit("sizes_of.*", "geometry.max_points", _at_most, "cuts it"),
    _Limit("evaluation.limit", "vision.max_images", _at_most, "cuts it"),
    _Limit("evaluation.tasks.*.count", "language.max_count", _at_most, "cuts it"),
    _Limit("evaluation.tasks.*.contexts", "language.max_context", _at_most, "cuts it"),
    _Limit(
        "evaluation.tasks.*.new_tokens",
        "language.max_context",
        lambda tokens, context: tokens <= context // 4,
        "cuts it to a quarter",
    ),
    _Limit("evaluation.effective_support.context", "language.max_context", _at_most, "cuts it"),
    _Limit("evaluation.plans.*.levels", "language.levels", _only, "leaves a part of it out", "language"),
    _Limit("model.name", "language.model.architecture", _never, "replaces it", "language", chosen=True),
    *(
        _Limit(f"model.{key}", f"language.model.{key}", _same, "replaces it", "language")
        for key in ("architecture", "options", "dtype")
    ),
    _Limit("benchmark.sizes", "geometry.max_points", _at_most, "leaves a part of it out"),
    _Limit("benchmark.*.sizes", "geometry.max_points", _at_most, "leaves a part of it out"),
    _Limit("benchmark.batches", "vision.speed.max_batch", _at_most, "leaves a part of it out"),
    _Limit("benchmark.batch", "vision.speed.max_batch", _at_most, "cuts it"),
    _Limit("benchmark.options", "vision.speed.model_options", _same, "replaces a part of it"),
    _Limit("benchmark.models.*.options", "vision.speed.model_options", _same, "replaces a part of it"),
    _Limit("benchmark.models.*.source", "language.model", _same, "replaces it"),
    _Limit("benchmark.phases.*.contexts", "language.speed.max_context", _at_most, "cuts it"),
    _Limit("benchmark.cell_seconds", "language.speed.cell_seconds", _same, "replaces it"),
    _Limit("benchmark.dtypes", "language.speed.dtypes", _same, "replaces it", beside="benchmark.phases"),
)


def checked_config(config: DictConfig, overrides: Sequence[str], entry: str) -> dict[str, Any]:
    """The plain, resolved values of a composed configuration, once all that can be said of them at once is said.

    Args:
        config: composed from an entry configuration.
        overrides: those it was composed with.
        entry: name of the entry configuration.

    Raises:
        ConfigError: a value of the wrong type or out of range, a name in a profile's list that does not exist, or an
            option that was typed and would not be served under the profile.
    """
    plain = OmegaConf.to_container(config, resolve=True)
    check_values(plain, overrides, entry)
    return plain


def check_values(config: Mapping[str, Any], overrides: Sequence[str], entry: str) -> None:
    """The checks of :func:`checked_config` on plain values."""
    require_fit(config, SCHEMAS[entry])
    if entry == "benchmark":
        for key, benchmark in _benchmarks(config):
            _require_arguments(key, benchmark)
    typed = _typed_keys(overrides)
    _refuse_other_families(typed, entry)
    if entry in ("vision", "language"):
        require_typed_plans(config, typed)
    _check_lists(config, typed, entry)
    _check_limits(config, typed, entry)


def _typed_keys(overrides: Sequence[str]) -> list[str]:
    """The keys that were typed; of a mapping its own keys, because Hydra leaves the others as they are."""
    return [
        key
        for override in OverridesParser.create().parse_overrides(list(overrides))
        for key in _leaves(override.key_or_group, None if override.is_delete() else override.value())
    ]


def _refuse_other_families(typed: Sequence[str], entry: str) -> None:
    """Refuse typed keys of the profile that only another family reads; benchmarks are of several."""
    families = set(FAMILIES.values())
    for key in typed:
        first, _, rest = key.partition(".")
        family = rest.partition(".")[0]
        if first == "profile" and entry in families and family in families - {entry}:
            raise ConfigError(f"{key} is for the experiments of {family}, these are of {entry}; it would not be read")


def _leaves(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(f"{key}.{name}", item)
    else:
        yield key


def _benchmarks(config: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    chosen = config["benchmark"]
    if "_target_" in chosen:
        return [("benchmark", chosen)]
    return [(f"benchmark.{name}", one) for name, one in chosen.items()]


def _require_arguments(key: str, benchmark: Mapping[str, Any]) -> None:
    from hydra.utils import get_method

    values = {name: value for name, value in benchmark.items() if name != "_target_"}
    require_arguments(get_method(benchmark["_target_"]), values, key, _GIVEN_TO_BENCHMARKS)


def _check_lists(config: Mapping[str, Any], typed: Collection[str], entry: str) -> None:
    """The names in the profile's lists."""
    for key, what, own in (
        (f"{entry}.methods", "method", _methods(config)),
        ("geometry.experiments", "experiment", config.get("study") if entry == "geometry" else None),
        ("geometry.distributions", "distribution", config.get("distributions")),
        ("language.plans", "plan", _plans(config, entry)),
        ("language.levels", "level", _levels(config, entry)),
    ):
        wanted = _value(config["profile"], key)
        if wanted is None or own is None:
            continue
        known = list(own)
        if f"profile.{key}" not in typed and not all(name in known for name in wanted):
            known = [*known, *(name for name in _everywhere(key, entry, wanted) if name not in known)]
        require_known(wanted, known, what, f"profile.{key}")


def _methods(config: Mapping[str, Any]) -> Collection[str] | None:
    study = config.get("study")
    return study["methods"] if isinstance(study, Mapping) and study["methods"] else None


def _plans(config: Mapping[str, Any], entry: str) -> Collection[str] | None:
    if entry == "language":
        return [name for name, plan in chosen_plans(config).items() if plan is not None]
    models = [one.get("models") for _, one in _benchmarks(config)] if entry == "benchmark" else []
    # The plans of the vision benchmark are no business of language.plans.
    found = [model for some in models if some for model in some.values() if "source" in model]
    return [name for model in found for role in ("plans", "rivals") for name in model[role]] or None


def _levels(config: Mapping[str, Any], entry: str) -> Collection[float] | None:
    if entry != "language":
        return None
    plans = [plan for plan in chosen_plans(config).values() if plan is not None]
    return list(dict.fromkeys(level for plan in plans for level in plan.get("levels") or []))


def _everywhere(key: str, entry: str, wanted: Collection[Any]) -> Collection[Any]:
    """What a list of a profile's file may name beside what the configuration at hand has."""
    if key == "geometry.distributions":
        return POINT_SETS
    if key == "language.levels":
        return [level for level in wanted if 0 <= level < 1]
    return _names_in_files(key)


@lru_cache
def _names_in_files(key: str) -> tuple[str, ...]:
    """The methods, experiments or plans that any of the family's files in ``configs`` has."""
    family = key.partition(".")[0]
    experiments = [
        path
        for folder, entry in FAMILIES.items()
        if entry == family
        for path in sorted((CONFIGS / "experiment" / folder).glob("*.yaml"))
    ]
    if key == "geometry.experiments":
        return tuple(path.stem for path in experiments)
    files = [CONFIGS / f"{family}.yaml", *experiments, *(CONFIGS / "benchmark").glob("*.yaml")]
    # OmegaConf takes a second for all of them, where libyaml's loader does not; both make plain values only.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    contents = [loader(path.read_text(encoding="utf-8")).get_single_data() for path in files]
    names: list[str] = []
    for content in contents:
        if key.endswith(".methods"):
            found = content["study"].get("methods") if isinstance(content.get("study"), dict) else None
            names += found or []
        else:
            names += (content.get("evaluation") or {}).get("plans") or []
            for model in (content.get("models") or {}).values():
                names += [*model.get("plans", []), *model.get("rivals", [])]
    return tuple(dict.fromkeys(names))


def _check_limits(config: Mapping[str, Any], typed: Collection[str], entry: str) -> None:
    """What was typed is served."""
    profile = config["profile"]
    for limit in _LIMITS:
        bound = _value(profile, limit.limit)
        if bound is None or limit.entry not in (None, entry):
            continue
        if limit.beside is not None and _value(config, limit.beside) is None:
            continue
        for key, value in _matching(config, limit.key):
            said = _typed(key, typed, chosen=limit.chosen)
            if said is not None and value != {} and not limit.serves(value, bound):
                raise ConfigError(
                    f"{said} would not be served: profile.{limit.limit}={bound} of the profile {profile['name']} "
                    f"{limit.does}; leave out {said}, or change profile.{limit.limit}"
                )


def _value(values: Mapping[str, Any], key: str) -> Any:
    """The value of a key with dots; None where there is none."""
    for part in key.split("."):
        if not isinstance(values, Mapping):
            return None
        values = values.get(part)
    return values


def _matching(values: Any, pattern: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys that match a pattern, with their values."""
    first, _, rest = pattern.partition(".")
    if not isinstance(values, Mapping):
        return
    for name in values if first == "*" else [first] if first in values else []:
        if rest:
            yield from _matching(values[name], rest, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", values[name]


def _typed(key: str, typed: Collection[str], *, chosen: bool) -> str | None:
    """What was typed of a key: itself, a part of it or, if that counts, the choice of the group that it belongs to."""
    for one in typed:
        if one == key or one.startswith(f"{key}.") or (chosen and key.startswith(f"{one}.")):
            return one
    return None
