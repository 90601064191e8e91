"""Names that do not exist, and values that are not what they should be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from entreg import names
from entreg.errors import ConfigError, InputError
from entreg.schema import COUNT, COUNTS, SIZES, require_arguments, require_fit


def test_nearest():
    assert names.nearest("gemoetry", ["geometry", "vit"]) == "; did you mean 'geometry'?"
    assert names.nearest("x", ["geometry", "vit"]) == "; there are geometry, vit."
    assert names.nearest("x", []) == "."
    assert names.nearest("0", [f"name{'abcdefghijklmnopqrstuvwxyz'[i]}" for i in range(26)]) == "."


def test_names_with_slashes_are_found_by_their_last_part():
    known = ["vit/digit_scenes", "geometry/hull"]
    assert names.suggestion("digt_scenes", known) == "; did you mean 'vit/digit_scenes'?"
    assert names.suggestion("geometry/hul", known) == "; did you mean 'geometry/hull'?"
    assert names.suggestion("zzz", known) == ""


def test_unknown_names_are_refused_with_all_that_exist():
    names.require_known(["disk", "square"], ["square", "disk"], "distribution")
    with pytest.raises(ConfigError) as caught:
        names.require_known(["square", "dsik"], ["square", "disk"], "distribution", "the study")
    assert str(caught.value) == "unknown distribution 'dsik' of the study, known are square, disk; did you mean 'disk'?"
    with pytest.raises(InputError, match=r"^unknown key '5', known are none$"):
        names.require_known([5], [], "key", error=InputError)
    with pytest.raises(ConfigError, match=r"^kind must be one of full, lora, got 'lroa'; did you mean 'lora'"):
        names.require_choice("kind", "lroa", ["full", "lora"])
    for wrong in ("test", [], None):
        with pytest.raises(ConfigError, match=r"^splits must be a list of at least one split out of train, test, got"):
            names.require_some("splits", wrong, ["train", "test"], "split")
    with pytest.raises(ConfigError, match=r"^unknown split 'tset' of splits, known are train, test; did you mean"):
        names.require_some("splits", ["tset"], ["train", "test"], "split")


@dataclass
class Settings:
    steps: int
    rate: float = 0.1
    layers: tuple[int, ...] | None = None


SCHEMA = {
    "settings": Settings,
    "maybe": Settings | None,
    "sizes": SIZES,
    "counts": [COUNTS, None],
    "models": {"*": {"batches": Sequence[int], "options": Mapping[str, Any]}},
    "count": COUNT,
    "name": str,
    "flag": bool | None,
}


@pytest.mark.parametrize(
    "values",
    [
        {"settings": {"steps": 3, "rate": 1, "layers": [0, 1], "unknown": "left to its reader"}},
        {"settings": {"layers": None}, "maybe": None, "unknown": object()},
        {"sizes": [10, 1e6], "counts": None, "flag": None, "name": "5"},
        {"models": {"a": {"batches": [], "options": {}}, "b": {}}},
    ],
)
def test_what_fits(values):
    require_fit(values, SCHEMA)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"settings": 3}, "settings must be a mapping of keys to values, got 3"),
        ({"settings": {"steps": 1.0}}, "settings.steps must be a whole number, got 1.0"),
        ({"settings": {"steps": True}}, "settings.steps must be a whole number, got True"),
        ({"settings": {"rate": None}}, "settings.rate must be a number, got null"),
        ({"settings": {"layers": ["a"]}}, "settings.layers must be a list of whole numbers or null, got ['a']"),
        ({"maybe": {"rate": "fast"}}, "maybe.rate must be a number, got 'fast'"),
        ({"maybe": []}, "maybe must be a mapping of keys to values or null, got []"),
        ({"sizes": [1.5]}, "sizes must be a list of at least one whole number, each at least 1, got [1.5]"),
        ({"counts": [0]}, "counts must be a list of at least one whole number, each at least 1 or null, got [0]"),
        ({"models": {"a": {"batches": "8"}}}, "models.a.batches must be a list of whole numbers, got '8'"),
        ({"models": {"a": {"options": 3}}}, "models.a.options must be a mapping of keys to values, got 3"),
        ({"count": 0}, "count must be a whole number of at least 1, got 0"),
        ({"name": 5}, "name must be text, got 5"),
        ({"flag": "yes"}, "flag must be true or false or null, got 'yes'"),
        ({"name": ["x" * 100]}, f"name must be text, got ['{'x' * 75}..."),
    ],
)
def test_what_does_not_fit_is_one_sentence_with_its_key(values, sentence):
    with pytest.raises(ConfigError) as caught:
        require_fit(values, SCHEMA)
    assert str(caught.value) == sentence


def test_arguments_fit_a_function():
    def run(*, batch: int, names: Sequence[str], store: str, threads: int | None = None) -> None: ...

    require_arguments(run, {"batch": 1, "names": ["a"]}, "benchmark", ["store"])
    with pytest.raises(ConfigError, match=r"^benchmark\.threads must be a whole number or null, got 'two'$"):
        require_arguments(run, {"batch": 1, "names": [], "threads": "two"}, "benchmark", ["store"])
    with pytest.raises(ConfigError, match=r"^benchmark\.names is missing; give it as \+benchmark\.names=\.\.\.$"):
        require_arguments(run, {"batch": 1}, "benchmark", ["store"])
