"""Where table and figure builders and claim measures sign up, and how their modules are found."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from entreg.errors import InputError

T = TypeVar("T", bound=Callable[..., Any])

_MODULE_ENDINGS = ("_tables", "_figures", "_claims")


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


def discover() -> None:
    """Imports every module of this package that registers something."""
    package = importlib.import_module("entreg.records")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.endswith(_MODULE_ENDINGS):
            importlib.import_module(f"entreg.records.{module.name}")
