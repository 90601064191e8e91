"""Where table and figure builders and claim measures sign up, and how their modules are found."""

import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from entreg.errors import InputError

T = TypeVar("T", bound=Callable[..., Any])

EXPERIMENTS = "entreg.experiments"
"""The package whose families register what is built from their records."""

# Last words of the names of modules that register something.
_TELLING = ("tables", "figures", "claims")


@dataclass(frozen=True)
class Entry:
    """One registered function and the experiments whose records it is given."""

    name: str
    function: Callable[[list[dict[str, Any]]], Any]
    experiments: tuple[str, ...]

    def select(self, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The records that concern this entry, in their order."""
        return [dict(record) for record in records if record["experiment"].startswith(self.experiments)]


class Registry(Generic[T]):
    """Named functions of one kind.

    Args:
        kind: what is registered, for the errors' sentences.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry] = {}

    def register(self, name: str, experiments: Sequence[str] = ("",)) -> Callable[[T], T]:
        """Decorator that signs a function up under a name.

        Raises:
            InputError: the name is taken by another function, or ``experiments`` is a bare string or empty.
        """
        if isinstance(experiments, str) or not experiments:
            raise InputError(f"experiments of the {self.kind} {name!r} must be a non-empty tuple of name prefixes.")

        def sign_up(function: T) -> T:
            known = self._entries.get(name)
            identity = (function.__module__, function.__qualname__)
            # The same function again is a module being reloaded; anything else would silently hide the first.
            if known is not None and (known.function.__module__, known.function.__qualname__) != identity:
                raise InputError(
                    f"The {self.kind} {name!r} is registered twice: by {known.function.__module__} and {identity[0]}."
                )
            self._entries[name] = Entry(name, function, tuple(experiments))
            return function

        return sign_up

    def remove(self, name: str) -> None:
        """Takes a name out again."""
        self._entries.pop(name, None)

    def get(self, name: str) -> Entry | None:
        """The entry of that name, or None."""
        return self._entries.get(name)

    def entries(self) -> list[Entry]:
        """All entries, ordered by name."""
        return [self._entries[name] for name in sorted(self._entries)]


def telling_modules(package: str = EXPERIMENTS) -> list[str]:
    """Lists the modules of a package, at any depth, that register tables, figures or claim measures.

    Args:
        package: dotted name. A module is one of them when its own name is ``tables``, ``figures`` or ``claims``, or
            ends in one of these words after an underscore.

    Returns:
        dotted names, in alphabetical order.
    """
    found = pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")
    return sorted(module.name for module in found if re.split(r"[._]", module.name)[-1] in _TELLING)


def discover(package: str = EXPERIMENTS) -> None:
    """Imports every module of a package that registers something, see :func:`telling_modules`."""
    for name in telling_modules(package):
        importlib.import_module(name)
