"""Interleaved timing: the one stopwatch of the project.

Shared machines drift, so two methods are only comparable when their runs alternate within one process. Every
round runs each candidate once, in an order that rotates from round to round; the figures to quote are the median
over rounds and the ratio of medians, with the spread beside them.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from entreg.errors import InputError

# A measurement shorter than this is repeated within the round: the clock and one wait for the device cost microseconds.
_SHORTEST = 0.02
_MOST_CALLS = 100
# CUDA graphs are recorded in the second call; a step of seconds is warm after one.
_WARM_CALLS, _WARM_ENOUGH = 4, 1.0


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of one candidate over the counted rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        return min(self.seconds)

    @property
    def maximum(self) -> float:
        return max(self.seconds)

    def as_dict(self) -> dict[str, object]:
        """JSON-ready: every round's seconds, and median, minimum and maximum."""
        return {**asdict(self), "median": self.median, "minimum": self.minimum, "maximum": self.maximum}


def interleaved_timings(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 7,
    warmup: int = 1,
    inner_loops: Mapping[str, int] | int = 1,
    synchronize: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time each candidate ``repeats`` times, all of them in turn in every round.

    Args:
        candidates: name to zero-argument callable. What a method must pay for belongs inside its callable.
        repeats: counted rounds, at least 1.
        warmup: rounds that are run first and not counted (compilation, caches, page faults), at least 0.
        inner_loops: calls per measurement, for callables too short for the clock; seconds are per call. An
            integer for all candidates, or a number for each name.
        synchronize: called before each reading of the clock, e.g. ``torch.cuda.synchronize``.

    Returns:
        name to :class:`Timing`, in the order of ``candidates``.

    Raises:
        InputError: no candidates, or ``repeats``, ``warmup`` or ``inner_loops`` out of range.
    """
    if not candidates:
        raise InputError("interleaved_timings needs at least one candidate")
    loops = {name: inner_loops if isinstance(inner_loops, int) else inner_loops[name] for name in candidates}
    if repeats < 1 or warmup < 0 or min(loops.values()) < 1:
        raise InputError(
            f"repeats and inner_loops must be at least 1 and warmup at least 0, got {repeats}, {loops}, {warmup}"
        )
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    # A full collection walks every object alive, a third of a second with torch loaded. What is alive now cannot
    # become the candidates' garbage, so it is set aside for the while.
    freezes = gc.get_freeze_count() == 0
    if freezes:
        gc.collect()
        gc.freeze()
    try:
        for round_index in range(warmup + repeats):
            offset = round_index % len(names)
            for name in names[offset:] + names[:offset]:
                function, count = candidates[name], loops[name]
                # A collection pause inside one candidate's turn would be charged to that candidate.
                gc.collect()
                gc_was_enabled = gc.isenabled()
                gc.disable()
                try:
                    if synchronize is not None:
                        synchronize()
                    start = time.perf_counter()
                    for _ in range(count):
                        function()
                    if synchronize is not None:
                        synchronize()
                    elapsed = (time.perf_counter() - start) / count
                finally:
                    if gc_was_enabled:
                        gc.enable()
                if round_index >= warmup:
                    seconds[name].append(elapsed)
    finally:
        if freezes:
            gc.unfreeze()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def warm_up(step: Callable[[], object], synchronize: Callable[[], object] | None = None) -> tuple[int, float]:
    """Call a candidate a few times, and find how many calls a measurement needs.

    Args:
        step: the candidate.
        synchronize: as in :func:`interleaved_timings`.

    Returns:
        Calls per measurement so that none is too short for the clock, and the seconds of the fastest call.
    """
    seconds: list[float] = []
    while len(seconds) < _WARM_CALLS and sum(seconds) < _WARM_ENOUGH:
        start = time.perf_counter()
        step()
        if synchronize is not None:
            synchronize()
        seconds.append(time.perf_counter() - start)
    fastest = max(min(seconds), 1e-9)
    return min(_MOST_CALLS, math.ceil(_SHORTEST / fastest)), fastest
