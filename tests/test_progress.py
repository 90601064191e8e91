"""The progress bar: estimates, one line for loops inside loops, plain lines where there is no terminal."""

import io
import re
import sys
import time

import pytest

from entreg import progress as module
from entreg.progress import LINE_EVERY, duration, progress, progress_bar
from entreg.runs import multirun


class Stream(io.StringIO):
    encoding = "utf-8"

    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def screen(monkeypatch):
    def use(terminal):
        stream = Stream(terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return use


def states(stream):
    return [state.rstrip() for state in re.split(r"[\r\n]", stream.getvalue()) if state.strip()]


def test_a_terminal_shows_share_time_and_what_is_left(screen, clock):
    stream = screen(terminal=True)
    with progress_bar(4, "loop") as bar:
        bar.describe("first")
        clock[0] += 60
        bar.advance()
        assert re.fullmatch(r"loop  25% \|.*\| 01:00, 03:00 left, first", states(stream)[-1])
    # One line, left as it was.
    assert stream.getvalue().count("\n") == 1
    assert len({len(state) for state in stream.getvalue().rstrip("\n").split("\r")[1:]}) == 1


def test_elsewhere_there_is_a_line_now_and_then(screen, clock):
    stream = screen(terminal=False)
    for _ in progress(range(100), "loop"):
        clock[0] += 1
    assert states(stream) == [
        "loop: 30 % in 30 s, about 70 s left",
        "loop: 60 % in 60 s, about 40 s left",
        "loop: 90 % in 90 s, about 10 s left",
    ]
    assert "\r" not in stream.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_over_at_once_says_nothing(screen, clock, terminal):
    stream = screen(terminal)
    for _ in progress(range(100), "loop"):
        clock[0] += 1e-4
    assert stream.getvalue() == ""


def test_jobs_that_share_a_terminal_draw_no_bars(screen, clock, monkeypatch):
    monkeypatch.setattr(multirun, "is_parallel", lambda: True)
    stream = screen(terminal=True)
    with progress_bar(2, "loop") as bar:
        clock[0] += LINE_EVERY
        bar.advance()
    assert stream.getvalue() == "loop: 50 % in 30 s, about 30 s left\n"


def test_a_loop_within_a_loop_counts_as_a_part_of_its_unit(screen, clock):
    stream = screen(terminal=True)
    with progress_bar(10, "outer") as bar:
        bar.advance(2)
        with bar.unit("long one", 4):
            with progress_bar(2, "inner") as inner:
                clock[0] += 10
                inner.advance()
                # Two and half of four of ten.
                assert states(stream)[-1].startswith("outer  40%")
                assert states(stream)[-1].endswith("long one")
                clock[0] += 10
                inner.advance()
            assert states(stream)[-1].startswith("outer  60%")
        assert bar.done == 6
        clock[0] += 1
        bar.expect(2)
        assert bar.share == 0.75
    assert all(state.startswith("outer") for state in states(stream))


def test_what_was_finished_before_tells_nothing_of_the_time_left(screen, clock):
    stream = screen(terminal=False)
    with progress_bar(100, "loop", done=20) as bar:
        bar.skip(30)
        clock[0] += LINE_EVERY
        bar.advance(10)
    assert states(stream) == ["loop: 60 % in 30 s, about 2 min left"]


def test_after_an_error_the_next_bar_is_its_own(screen, clock):
    screen(terminal=False)
    with pytest.raises(RuntimeError), progress_bar(1, "broken"):
        raise RuntimeError
    assert module._current is None


def test_durations():
    assert [duration(seconds) for seconds in (0.4, 99, 101, 5990, 9000)] == ["0 s", "99 s", "2 min", "100 min", "2.5 h"]
