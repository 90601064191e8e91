"""The stopwatch: first calls never count, rounds fit the time there is, and all candidates take turns."""

import gc
import time

import numpy as np
import pytest

from entreg.errors import InputError
from entreg.experiments.geometry.experiment import measure_methods
from entreg.experiments.geometry.methods import Answer, Method
from entreg.experiments.timing import interleaved_timings

COMPILING = 100.0


class Clock:
    """Time that passes only in the candidates."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.order = []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def candidate(self, name, seconds):
        """A method that compiles in its first call."""

        def call():
            self.now += seconds if name in self.order else COMPILING + seconds
            self.order.append(name)

        return call


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


SECONDS = {"short": 1e-6, "middle": 0.01, "long": 30.0}


@pytest.mark.parametrize("budget", [None, 0.0, 1.0, 1e9, dict.fromkeys(SECONDS, 0.0), dict.fromkeys(SECONDS, 100.0)])
def test_compilation_is_never_measured_whatever_the_budget(clock, budget):
    candidates = {name: clock.candidate(name, seconds) for name, seconds in SECONDS.items()}
    timings = interleaved_timings(candidates, repeats=3, time_budget=budget)
    assert list(timings) == list(SECONDS)
    for name, seconds in SECONDS.items():
        assert timings[name].seconds == pytest.approx([seconds] * timings[name].rounds, rel=1e-6)


def test_the_geometry_experiment_measures_no_compilation(clock):
    calls = {name: clock.candidate(name, seconds) for name, seconds in SECONDS.items()}
    methods = {
        name: Method("baseline", lambda call=call: (call(), Answer(np.arange(3)))[1]) for name, call in calls.items()
    }
    seconds, answers, failures = measure_methods(methods, repeats=5, time_budget=4.0)
    assert {name: len(found) for name, found in seconds.items()} == dict.fromkeys(SECONDS, 1)
    assert {name: found[0] for name, found in seconds.items()} == pytest.approx(SECONDS)
    # A call that warms up, and one that is the measurement.
    assert clock.order.count("long") == 2
    assert (list(answers), failures) == (list(SECONDS), {})


def test_as_many_rounds_as_fit(clock):
    candidates = {"a": clock.candidate("a", 1.0), "b": clock.candidate("b", 3.0)}
    together = interleaved_timings(candidates, repeats=9, time_budget=20.0)
    assert [timing.rounds for timing in together.values()] == [5, 5]
    least = interleaved_timings(candidates, repeats=9, least=3, time_budget=0.0)
    assert [timing.rounds for timing in least.values()] == [3, 3]
    each = interleaved_timings(candidates, repeats=9, time_budget={"a": 6.0, "b": 6.0})
    assert [timing.rounds for timing in each.values()] == [6, 2]


def test_candidates_take_turns_and_none_is_always_first(clock):
    names = ("a", "b", "c")
    interleaved_timings({name: clock.candidate(name, 1.0) for name in names}, repeats=3)
    # One call of a second warms up, one more tells how long a call takes.
    assert "".join(clock.order) == "abcabcabcbcacab"


def test_short_calls_are_repeated_within_a_round(clock):
    timings = interleaved_timings({"a": clock.candidate("a", 1e-3), "b": clock.candidate("b", 1.0)}, repeats=2)
    assert timings["b"].calls == 1
    assert timings["a"].calls * 1e-3 == pytest.approx(0.005)


def test_no_garbage_is_collected_in_a_candidates_turn():
    enabled = []
    interleaved_timings({"a": lambda: enabled.append(gc.isenabled())}, repeats=1)
    assert not any(enabled)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"repeats": 2, "least": 3}, {"least": 0}])
def test_impossible_rounds_are_refused(wrong):
    with pytest.raises(InputError, match="least must be at least 1 and at most repeats"):
        interleaved_timings({"a": dict}, **wrong)
    with pytest.raises(InputError, match="at least one candidate"):
        interleaved_timings({})
