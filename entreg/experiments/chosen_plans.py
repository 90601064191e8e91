"""Which of an experiment's plans a run evaluates: a study or one of its methods names them, or all are evaluated."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from entreg.errors import ConfigError
from entreg.names import require_known


def chosen_plans(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``evaluation.plans`` with null in place of those that ``study.plans`` does not name, if it names any.

    Args:
        config: resolved content of ``configs/vision.yaml`` or ``configs/language.yaml``.

    Raises:
        ConfigError: there is no plan of a name.
    """
    plans, chosen = config["evaluation"]["plans"], config["study"]["plans"]
    if chosen is None:
        return plans
    require_known(chosen, plans, "plan", "study.plans")
    return {name: plan if name in chosen else None for name, plan in plans.items()}


def require_typed_plans(config: Mapping[str, Any], typed: Collection[str]) -> None:
    """Refuse what was typed of a plan that is not evaluated.

    Args:
        config: as in :func:`chosen_plans`.
        typed: keys that were typed.

    Raises:
        ConfigError: something was.
    """
    for name, plan in chosen_plans(config).items():
        key = f"evaluation.plans.{name}"
        said = [one for one in typed if one == key or one.startswith(f"{key}.")]
        if plan is None and config["evaluation"]["plans"][name] is not None and said:
            raise ConfigError(
                f"{said[0]} would not be served: the plan is not among those of study.plans; name it there"
            )
