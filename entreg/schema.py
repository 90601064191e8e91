"""What the values of a configuration must be: one sentence with the key and what is expected, before anything runs.

A schema is a mapping from keys to schemas (``*`` stands for all others), a dataclass (a mapping from its fields), a
type hint, a :class:`Rule`, or a list of these, any of which may hold. Keys that a schema does not have are left to
their readers, which know them.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from entreg.errors import ConfigError

_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "names"}


@dataclass(frozen=True)
class Rule:
    """A type whose values must besides lie in a range.

    Attributes:
        hint: the type.
        words: what is expected, for the sentence.
        holds: of a value of the type, whether it is that.
    """

    hint: Any
    words: str
    holds: Callable[[Any], bool]


COUNT = Rule(int, "a whole number of at least 1", lambda value: value >= 1)
SEED = Rule(int, "a whole number of at least 0", lambda value: value >= 0)
POSITIVE = Rule(float, "a number above 0", lambda value: 0 < value < float("inf"))
COUNTS = Rule(
    list[int], "a list of at least one whole number, each at least 1", lambda values: bool(values) and min(values) >= 1
)
SEEDS = Rule(
    list[int], "a list of at least one whole number, each at least 0", lambda values: bool(values) and min(values) >= 0
)
# 1e6 is a number with a point for YAML, and a good number of points.
SIZES = Rule(
    list[float],
    "a list of at least one whole number, each at least 1",
    lambda values: bool(values) and all(value >= 1 and float(value).is_integer() for value in values),
)


def require_fit(value: Any, schema: Any, key: str = "") -> None:
    """Refuse the first value of a configuration that is not what its schema says.

    Args:
        value: plain values, such as a resolved configuration.
        schema: see the module's text.
        key: of the value, with dots; empty for a whole configuration.

    Raises:
        ConfigError: it is not.
    """
    fields = _fields(schema)
    if fields is not None:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} must be a mapping of keys to values, got {_shown(value)}")
        for name, item in value.items():
            require_fit(item, fields.get(name, fields.get("*", Any)), f"{key}.{name}" if key else str(name))
        return
    parts = _fields_of_union(schema)
    if parts is not None and isinstance(value, Mapping):
        require_fit(value, parts, key)
        return
    if not _fits(value, schema):
        raise ConfigError(f"{key} must be {_words(schema)}, got {_shown(value)}")


def require_arguments(function: Callable[..., Any], values: Mapping[str, Any], key: str, given: Sequence[str]) -> None:
    """Refuse keyword arguments that are missing or not of the types that a function's hints say.

    Args:
        function: what is called with them.
        values: from a configuration.
        key: of them in the configuration.
        given: names of the arguments that do not come from there.

    Raises:
        ConfigError: one of them is.
    """
    require_fit(values, typing.get_type_hints(function), key)
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is parameter.empty and name not in values and name not in given:
            raise ConfigError(f"{key}.{name} is missing; give it as +{key}.{name}=...")


def _fields(schema: Any) -> Mapping[str, Any] | None:
    if isinstance(schema, Mapping):
        return schema
    if dataclasses.is_dataclass(schema) and isinstance(schema, type):
        return typing.get_type_hints(schema)
    origin, items = typing.get_origin(schema), typing.get_args(schema)
    return {"*": items[1]} if _is_mapping(origin) and items else None


def _members(schema: Any) -> tuple[Any, ...]:
    """Of a union, its parts; a list of schemas is a union, too."""
    if isinstance(schema, list):
        return tuple(schema)
    if typing.get_origin(schema) in (typing.Union, types.UnionType):
        return typing.get_args(schema)
    return (schema,)


def _fields_of_union(schema: Any) -> Mapping[str, Any] | None:
    found = [fields for member in _members(schema) if (fields := _fields(member)) is not None]
    return found[0] if found else None


def _fits(value: Any, schema: Any) -> bool:
    if isinstance(schema, Rule):
        return _fits(value, schema.hint) and schema.holds(value)
    members = _members(schema)
    if len(members) > 1 or isinstance(schema, list):
        return any(_fits(value, member) for member in members)
    if schema is Any or schema is object:
        return True
    if schema is None or schema is type(None):
        return value is None
    origin = typing.get_origin(schema) or schema
    if origin in (bool, str):
        return isinstance(value, origin)
    if origin in (int, float):
        return isinstance(value, int if origin is int else int | float) and not isinstance(value, bool)
    if _is_list(origin):
        items = [item for item in typing.get_args(schema) if item is not Ellipsis] or [Any]
        return isinstance(value, list | tuple) and all(_fits(one, items[0]) for one in value)
    if _is_mapping(origin):
        return isinstance(value, Mapping)
    # Whatever else a hint names is no value of a configuration.
    return False


def _is_mapping(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _is_list(origin: Any) -> bool:
    return origin in (list, tuple) or origin is Sequence


def _words(schema: Any) -> str:
    if isinstance(schema, Rule):
        return schema.words
    members = _members(schema)
    if len(members) > 1 or isinstance(schema, list):
        # Null last, and what nobody can write in a configuration not at all.
        said = [_words(one) for one in sorted(members, key=lambda one: one in (None, type(None)))]
        return " or ".join(dict.fromkeys(words for words in said if words))
    if schema is None:
        return "null"
    if _fields(schema) is not None:
        return "a mapping of keys to values"
    origin = typing.get_origin(schema) or schema
    if origin in _WORDS:
        return _WORDS[origin]
    if _is_list(origin):
        items = [item for item in typing.get_args(schema) if item is not Ellipsis]
        plural = _PLURALS.get(items[0]) if items else None
        return f"a list of {plural}" if plural else "a list"
    if _is_mapping(origin):
        return "a mapping of keys to values"
    return ""


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
