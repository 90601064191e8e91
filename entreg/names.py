"""Names that a configuration chooses among: one sentence for what does not exist, with the nearest name that does."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from entreg.errors import ConfigError

T = TypeVar("T")


def suggestion(name: Any, known: Iterable[Any]) -> str:
    """``; did you mean 'x'?`` with the most similar known name; empty when none is similar.

    Names with slashes are also found by their last part.
    """
    names = sorted({str(one) for one in known})
    whole = {name.rpartition("/")[2]: name for name in names} | {name: name for name in names}
    close = difflib.get_close_matches(str(name), whole, n=1, cutoff=0.5)
    return f"; did you mean {whole[close[0]]!r}?" if close else ""


def listed_files(folder: Path, most: int = 5) -> str:
    """What a folder holds instead, for the end of a sentence: ``it holds a, b``, or ``it is empty``."""
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return "it is empty"
    return f"it holds {', '.join(names[:most])}{f' and {len(names) - most:,} more' if len(names) > most else ''}"


def nearest(name: str, known: Iterable[str]) -> str:
    """As :func:`suggestion`; when no name is similar the list of names, if it is short, and a full stop."""
    names = sorted(set(known))
    listed = f"; there are {', '.join(names)}." if names and len(names) <= 20 else "."
    return suggestion(name, names) or listed


def require_known(
    names: Iterable[Any], known: Collection[Any], what: str, of: str = "", error: type[Exception] = ConfigError
) -> None:
    """Refuse the first name that does not exist.

    Args:
        names: what was asked for.
        known: all that there are, in the order in which they are to be listed.
        what: a word for one of them, such as ``distribution`` or ``key``.
        of: what they belong to, such as the key that holds the list.
        error: class of what is raised.

    Raises:
        ConfigError: or ``error``; one sentence with the names that exist and the nearest of them.
    """
    listed = list(known)
    for name in names:
        if name not in listed:
            place = f" of {of}" if of else ""
            raise error(
                f"unknown {what} '{name}'{place}, known are {', '.join(map(str, listed)) or 'none'}"
                f"{suggestion(name, listed)}"
            )


def require_choice(key: str, value: Any, known: Collection[str], error: type[Exception] = ConfigError) -> None:
    """Refuse a value that is none of those known.

    Args:
        key: what has the value.
        value: what was asked for.
        known: all that there are, in the order in which they are to be listed.
        error: class of what is raised.

    Raises:
        ConfigError: or ``error``; one sentence with the names that exist and the nearest of them.
    """
    if value not in known:
        raise error(f"{key} must be one of {', '.join(known)}, got {value!r}{suggestion(value, known)}")


def require_some(
    key: str, values: Any, known: Collection[Any], what: str, error: type[Exception] = ConfigError
) -> None:
    """Refuse what is no list of at least one known name.

    Args:
        key: what has the list.
        values: what was asked for.
        known: all that there are, in the order in which they are to be listed.
        what: a word for one of them, such as ``distribution``.
        error: class of what is raised.

    Raises:
        ConfigError: or ``error``; one sentence with the names that exist and the nearest of them.
    """
    if not isinstance(values, list | tuple) or not values:
        raise error(f"{key} must be a list of at least one {what} out of {', '.join(map(str, known))}, got {values!r}")
    require_known(values, known, what, key, error)


class Registry(Mapping[str, T]):
    """Things of one kind by name, in the order in which they were registered; a configuration chooses among them.

    Args:
        kind: a word for one of them, for the errors' sentences.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._things: dict[str, T] = {}

    def register(self, name: str, thing: T) -> T:
        """Add a thing under a name, and return it.

        Raises:
            ConfigError: a name that is not a word, or one that is taken.
        """
        if not isinstance(name, str) or not name.isidentifier():
            raise ConfigError(f"the name of a {self.kind} must be a word of letters, digits and _, got {name!r}")
        if name in self._things:
            raise ConfigError(f"there is a {self.kind} {name!r} already; take another name, or remove() that one first")
        self._things[name] = thing
        return thing

    def remove(self, name: str) -> None:
        """Take a name out again; nothing happens if it is not there."""
        self._things.pop(name, None)

    def __getitem__(self, name: str) -> T:
        return self._things[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def __len__(self) -> int:
        return len(self._things)

    def __contains__(self, name: object) -> bool:
        # Of a configuration may come anything, lists included.
        return isinstance(name, str) and name in self._things


def import_modules(package: str) -> None:
    """Import every module of a package, so that what they register is there."""
    path = importlib.import_module(package).__path__
    for module in sorted(pkgutil.iter_modules(path), key=lambda module: module.name):
        importlib.import_module(f"{package}.{module.name}")
