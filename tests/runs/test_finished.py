"""Finished measures of a killed run: used when nothing has changed, and never otherwise."""

import json

import pytest
import torch
from torch import nn

from entreg.errors import InputError
from entreg.progress import Progress
from entreg.runs import finished
from entreg.runs.finished import Finished, identity_of


@pytest.fixture
def bar():
    return Progress(10, "evaluation", 0.0, None)


class WithSettings(nn.Linear):
    """A layer whose state is not tensors alone."""

    def get_extra_state(self):
        return {"width": 3}

    def set_extra_state(self, state):
        pass


class Counted:
    """A measurement that counts how often it is made."""

    def __init__(self, value):
        self.value, self.made = value, 0

    def __call__(self):
        self.made += 1
        return self.value


def model(seed=0):
    torch.manual_seed(seed)
    return WithSettings(3, 2)


def begun(path, bar, config=None, weights=None):
    """A run that measures one thing."""
    measured = Counted({"loss": 0.1 + 0.2, "tokens": (1, 2)})
    kept = Finished(path, lambda: identity_of(config or {"seed": 0}, weights or model(), None))
    return kept.measure("dense", measured, bar), measured.made


def test_what_is_finished_is_not_measured_again_and_is_the_same_to_the_bit(tmp_path, bar):
    path = tmp_path / "run" / "measures.json"
    first, made = begun(path, bar)
    assert (first, made) == ({"loss": 0.1 + 0.2, "tokens": [1, 2]}, 1)
    assert begun(path, bar) == (first, 0)


@pytest.mark.parametrize("change", ["configuration", "one weight", "code", "library", "damage"])
def test_what_has_changed_is_measured_anew(tmp_path, bar, monkeypatch, change):
    path = tmp_path / "measures.json"
    begun(path, bar)
    changed = model()
    if change == "one weight":
        with torch.no_grad():
            changed.weight[1, 2] = torch.nextafter(changed.weight[1, 2], torch.tensor(9.0))
    elif change == "code":
        monkeypatch.setattr(finished, "_code", lambda: "0" * 64)
    elif change == "library":
        monkeypatch.setattr(finished, "library_versions", lambda: {"torch": "0.1"})
    elif change == "damage":
        path.write_text(path.read_text()[:-5])
    config = {"seed": 1} if change == "configuration" else {"seed": 0}
    assert begun(path, bar, config, changed)[1] == 1
    # What is kept now is what was measured now.
    assert begun(path, bar, config, changed)[1] == 0


def test_a_measure_that_fails_leaves_the_others(tmp_path, bar):
    path = tmp_path / "measures.json"
    kept = Finished(path)
    kept.measure("a", Counted(1), bar)
    with pytest.raises(ZeroDivisionError):
        kept.measure("b", lambda: 1 / 0, bar)
    with pytest.raises(InputError, match="c is nan"):
        kept.measure("c", Counted(float("nan")), bar)
    assert json.loads(path.read_text())["measures"] == {"a": 1}
    again = Finished(path)
    assert [again.measure(name, Counted(2), bar) for name in ("a", "b")] == [1, 2]


def test_without_a_file_nothing_is_kept(bar):
    measured = Counted((1, 2))
    kept = Finished()
    assert kept.measure("a", measured, bar) == kept.measure("a", measured, bar) == (1, 2)
    assert measured.made == 2
