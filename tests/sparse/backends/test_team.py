"""Loops on the threads of PyTorch's OpenMP, and what stands for them where there are none."""

import os
import threading
import time

import pytest
import torch

from entreg.sparse.backends import team
from entreg.sparse.backends.team import run_in_team, team_size

NO_TEAM = team._entry() is None


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[False, True], ids=["team", "pool"])
def either(request, monkeypatch, two_threads):
    """With PyTorch's threads, and without."""
    if request.param:
        monkeypatch.setattr(team, "_entry", lambda: None)


def threads_of_this_process():
    return {int(name) for name in os.listdir("/proc/self/task")}


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_every_range_is_done_once(count):
    done = []
    run_in_team(lambda first, last: done.append((first, last)), [(one, one + 1) for one in range(count)])
    assert sorted(done) == [(one, one + 1) for one in range(count)]


@pytest.mark.usefixtures("either")
def test_the_first_error_is_raised_and_what_was_not_begun_is_dropped():
    begun = []

    def fail(number):
        begun.append(number)
        raise ValueError(f"range {number}")

    with pytest.raises(ValueError, match="range"):
        run_in_team(fail, [(number,) for number in range(100)])
    assert 1 <= len(begun) <= 2
    # The threads are as good as before.
    done = []
    run_in_team(done.append, [(1,), (2,)])
    assert sorted(done) == [1, 2]


@pytest.mark.usefixtures("either")
def test_a_call_within_a_call():
    done = []
    run_in_team(lambda outer: run_in_team(lambda inner: done.append((outer, inner)), [(0,), (1,)]), [(0,), (1,)])
    assert sorted(done) == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.skipif(NO_TEAM, reason="this PyTorch does not use an OpenMP with that entry")
@pytest.mark.usefixtures("two_threads")
def test_it_is_the_threads_of_pytorch_that_work():
    seen = set()

    def note(_):
        seen.add(threading.get_native_id())
        time.sleep(0.05)

    # PyTorch's second thread exists from here on.
    torch.randn(1000, 1000).sum()
    before = threads_of_this_process()
    for _ in range(3):
        run_in_team(note, [(0,), (1,)])
    assert len(seen) == 2
    assert seen <= before
    assert threads_of_this_process() == before


def test_its_size(monkeypatch):
    monkeypatch.setattr(team, "default_threads", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(team, "_entry", lambda: print)
    assert team_size() == 3
    # Threads beside PyTorch's have the cores that those leave.
    monkeypatch.setattr(team, "_entry", lambda: None)
    for busy, size in ((1, 8), (6, 3), (8, 1), (12, 1)):
        monkeypatch.setattr(torch, "get_num_threads", lambda busy=busy: busy)
        assert team_size() == size
