"""How far a loop is and how long the rest will take: the one progress bar of the project.

On a terminal it is a bar on one line. Elsewhere (a log file, a pipe, a notebook) and in jobs that share a terminal with
others, it is a plain line on standard error every half minute, so that nothing is printed by what is over before.

A loop inside another one draws no second bar: what it has done counts as a part of the outer loop's current unit.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

from entreg import distributed

T = TypeVar("T")

_REDRAWN = 0.2
"""Seconds between two states of a bar."""

LINE_EVERY = 30.0
"""Seconds between two lines where there is no bar."""

_FORMAT = "{desc} {percentage:3.0f}% |{bar:24}| {elapsed}, {remaining} left{postfix}"


class Progress:
    """One loop's progress; made by :func:`progress_bar`.

    Attributes:
        total: units of the whole loop.
        done: units that are finished; units may be of any size, and fractions of one.
    """

    def __init__(self, total: float, title: str, done: float, outer: Progress | None) -> None:
        self.total, self.title, self.done, self.outer = total, title, done, outer
        self._began, self._at_start = time.monotonic(), done
        self._inner, self._unit, self._words = 0.0, 1.0, ""
        self._seen = self._began
        self._drawn = False
        self._shown = outer is None and distributed.is_first()

    def advance(self, units: float = 1.0) -> None:
        """So many more units are finished."""
        self.done += units
        self._inner = 0.0
        self._changed()

    def skip(self, units: float) -> None:
        """So many units were finished before, it has turned out: they tell nothing of the time left."""
        self._at_start += units
        self.advance(units)

    @contextmanager
    def unit(self, words: str, units: float = 1.0) -> Iterator[None]:
        """What is done in the block is so many units, and called so behind the bar."""
        self._unit = units
        self.describe(words)
        yield
        self._unit = 1.0
        self.advance(units)

    def describe(self, words: str) -> None:
        """What is being done now, behind the bar."""
        self._words = words
        self._changed()

    def expect(self, units: float) -> None:
        """So many units are left to do, it has turned out."""
        self.total = self.done + units
        self._changed()

    @property
    def share(self) -> float:
        """Of the loop that is done, in [0, 1]."""
        return min((self.done + self._inner) / self.total, 1.0) if self.total > 0 else 1.0

    def _changed(self) -> None:
        if self.outer is not None:
            self.outer._inner = self.share * self.outer._unit
            if self._words:
                self.outer._words = self._words
            self.outer._changed()
            return
        if not self._shown:
            return
        now = time.monotonic()
        if draws_bars():
            if now - self._seen >= _REDRAWN:
                self._seen = now
                self._draw(now - self._began)
        elif now - self._seen >= LINE_EVERY:
            self._seen = now
            self._print(now - self._began)

    def _draw(self, elapsed: float) -> None:
        columns = shutil.get_terminal_size().columns
        text = tqdm.format_meter(
            self.done + self._inner,
            self.total,
            elapsed,
            initial=self._at_start,
            prefix=self.title,
            postfix=self._words,
            bar_format=_FORMAT,
            ncols=columns - 1,
            ascii=not (getattr(sys.stderr, "encoding", None) or "").lower().startswith("utf"),
        )
        sys.stderr.write(f"\r{text[: columns - 1]:<{columns - 1}}")
        sys.stderr.flush()
        self._drawn = True

    def _print(self, elapsed: float) -> None:
        worked = self.done + self._inner - self._at_start
        left = ""
        if worked > 0:
            left = f", about {duration(elapsed * (self.total - self.done - self._inner) / worked)} left"
        words = f" ({self._words})" if self._words else ""
        print(
            f"{self.title}: {100 * self.share:.0f} % in {duration(elapsed)}{left}{words}", file=sys.stderr, flush=True
        )

    def _close(self) -> None:
        if self._drawn:
            self._draw(time.monotonic() - self._began)
            print(file=sys.stderr, flush=True)


_current: Progress | None = None


@contextmanager
def progress_bar(total: float, title: str, *, done: float = 0.0) -> Iterator[Progress]:
    """A bar for the length of a block, which calls :meth:`Progress.advance`.

    Of the processes of a launcher, the first one draws it for all.

    Args:
        total: units of the loop, those that are done included. They need not be equally long, but the time left is
            estimated as if they were.
        title: in front of the bar.
        done: units that were finished before.
    """
    global _current
    outer = _current
    bar = Progress(total, title, done, outer)
    _current = bar
    try:
        yield bar
    finally:
        _current = outer
        bar._close()


def progress(items: Collection[T], title: str) -> Iterator[T]:
    """The items one by one, with a bar."""
    with progress_bar(len(items), title) as bar:
        for item in items:
            yield item
            bar.advance()


def draws_bars() -> bool:
    """Whether standard error is a terminal that no other job writes to."""
    # What has not loaded it is no job of a multirun.
    multirun = sys.modules.get("entreg.runs.multirun")
    return sys.stderr.isatty() and not (multirun is not None and multirun.is_parallel())


def duration(seconds: float) -> str:
    """``41 s``, ``3 min`` or ``2.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
