"""Interleaved timing: the one stopwatch of the project.

Shared machines drift, so two methods are only comparable when their runs alternate within one process. Every
round runs each candidate once, in an order that rotates from round to round; the figures to quote are the median
over rounds and the ratio of medians, with the spread beside them.

No candidate's first call is ever counted, however little time there is: it compiles, loads libraries and touches its
memory for the first time.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from entreg.errors import InputError
from entreg.progress import progress_bar

# A measurement shorter than this is repeated within the round: the clock and one wait for the device cost microseconds.
_SHORTEST = 0.005
_MOST_CALLS = 500
# CUDA graphs are recorded in the second call; a step of seconds is warm after one.
_WARM_CALLS, _WARM_ENOUGH = 4, 1.0


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of one candidate over the counted rounds.

    Attributes:
        seconds: of one call, round by round.
        calls: of which a round takes the mean.
    """

    seconds: tuple[float, ...]
    calls: int = 1

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        return min(self.seconds)

    @property
    def maximum(self) -> float:
        return max(self.seconds)

    @property
    def rounds(self) -> int:
        return len(self.seconds)


def interleaved_timings(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 7,
    least: int = 1,
    time_budget: float | Mapping[str, float] | None = None,
    synchronize: Callable[[], object] | None = None,
    title: str = "timing",
) -> dict[str, Timing]:
    """Time each candidate ``repeats`` times, all of them in turn in every round.

    Every candidate is first called without being counted, and then once more to see how long it takes. Where that
    second call has used up the time already, it is the measurement; the first call never is.

    Args:
        candidates: name to zero-argument callable. What a method must pay for belongs inside its callable.
        repeats: counted rounds, at least 1.
        least: rounds that are counted whatever they take, from 1 to ``repeats``.
        time_budget: seconds for the counted rounds. A number is for all candidates together; a mapping has one for
            each, and a candidate that has used up its own drops out of the later rounds. None: no limit.
        synchronize: called before each reading of the clock, e.g. ``torch.cuda.synchronize``.
        title: of the progress bar.

    Returns:
        name to :class:`Timing`, in the order of ``candidates``.

    Raises:
        InputError: no candidates, or ``repeats`` or ``least`` out of range.
    """
    if not candidates:
        raise InputError("interleaved_timings needs at least one candidate")
    if not 1 <= least <= repeats:
        raise InputError(f"least must be at least 1 and at most repeats, got {least} and {repeats}")
    with _without_collections(), progress_bar(len(candidates) * (repeats + 2), title) as bar:
        for name, function in candidates.items():
            bar.describe(f"{name}, warm-up")
            _warm_up(function, synchronize)
            bar.advance()
        first = {}
        for name, function in candidates.items():
            first[name] = _seconds_per_call(function, 1, synchronize)
            bar.advance()
        rounds = _affordable_rounds(first, repeats, least, time_budget)
        calls = {name: _calls_per_round(seconds) for name, seconds in first.items()}
        if time_budget is not None and max(rounds.values()) == 1:
            # There is no time for more than what those calls were, but for the shortest ones.
            for name, count in calls.items():
                if count > 1:
                    first[name] = _seconds_per_call(candidates[name], count, synchronize)
            return {name: Timing((seconds,), calls[name]) for name, seconds in first.items()}
        bar.expect(sum(rounds.values()))
        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        for number in range(max(rounds.values())):
            names = [name for name in candidates if rounds[name] > number]
            offset = number % len(names)
            for name in names[offset:] + names[:offset]:
                bar.describe(name)
                seconds[name].append(_seconds_per_call(candidates[name], calls[name], synchronize))
                bar.advance()
    return {name: Timing(tuple(values), calls[name]) for name, values in seconds.items()}


def _warm_up(function: Callable[[], object], synchronize: Callable[[], object] | None) -> None:
    began, calls = time.perf_counter(), 0
    while calls == 0 or (calls < _WARM_CALLS and time.perf_counter() - began < _WARM_ENOUGH):
        function()
        if synchronize is not None:
            synchronize()
        calls += 1


def _calls_per_round(seconds: float) -> int:
    return min(_MOST_CALLS, math.ceil(_SHORTEST / max(seconds, 1e-9)))


def _affordable_rounds(
    seconds: Mapping[str, float], repeats: int, least: int, time_budget: float | Mapping[str, float] | None
) -> dict[str, int]:
    """Rounds of each candidate that fit the budget; ``seconds`` are those of one call."""
    round_seconds = {name: one * _calls_per_round(one) for name, one in seconds.items()}
    if time_budget is None:
        return dict.fromkeys(seconds, repeats)
    if isinstance(time_budget, Mapping):
        affordable = {name: time_budget[name] / max(one, 1e-9) for name, one in round_seconds.items()}
    else:
        affordable = dict.fromkeys(seconds, time_budget / max(sum(round_seconds.values()), 1e-9))
    return {name: int(min(max(count, least), repeats)) for name, count in affordable.items()}


def _seconds_per_call(function: Callable[[], object], calls: int, synchronize: Callable[[], object] | None) -> float:
    # A collection pause inside one candidate's turn would be charged to that candidate.
    gc.collect()
    if synchronize is not None:
        synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if synchronize is not None:
        synchronize()
    return (time.perf_counter() - start) / calls


@contextmanager
def _without_collections() -> Iterator[None]:
    """No garbage is collected inside the block but on request, and then only what was made in it.

    A full collection walks every object alive, a third of a second with torch loaded. What is alive now cannot become
    the candidates' garbage, so it is set aside for the while.
    """
    freezes, enabled = gc.get_freeze_count() == 0, gc.isenabled()
    if freezes:
        gc.collect()
        gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        if freezes:
            gc.unfreeze()
