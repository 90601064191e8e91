"""Chunks, threads, errors and forks."""

import multiprocessing
import os
import threading
import time

import pytest

from entreg.errors import InputError
from entreg.parallel import chunk_ranges, default_threads, resolve_threads, run_chunks


@pytest.mark.parametrize(("n", "parts"), [(1, 1), (1, 5), (10, 3), (100, 7), (7, 7), (0, 4)])
def test_chunk_ranges_cover_everything_once(n, parts):
    ranges = chunk_ranges(n, parts)
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(n))
    assert len(ranges) == min(n, parts)
    lengths = [stop - start for start, stop in ranges]
    assert max(lengths, default=0) - min(lengths, default=0) <= 1


@pytest.mark.parametrize("threads", [None, 1, 2, 5, 200])
def test_results_keep_their_order(threads):
    assert run_chunks(lambda a, b: a * b, [(k, k + 1) for k in range(50)], threads) == [k * (k + 1) for k in range(50)]
    assert run_chunks(lambda: 1, [], threads) == []


def test_work_is_shared_between_threads():
    seen = set()

    def work(_):
        seen.add(threading.get_ident())
        time.sleep(0.01)

    run_chunks(work, [(k,) for k in range(10)], 3)
    assert len(seen) == 3


@pytest.mark.parametrize("threads", [1, 3])
def test_errors_reach_the_caller_and_stop_the_rest(threads):
    done = []

    def work(k):
        if k == 3:
            raise KeyError("three")
        time.sleep(0.002)
        done.append(k)

    with pytest.raises(KeyError, match="three"):
        run_chunks(work, [(k,) for k in range(100)], threads)
    assert len(done) < 50


def test_nested_calls_do_not_deadlock():
    def outer(k):
        return sum(run_chunks(lambda j: j, [(j,) for j in range(20)], 8)) + k

    assert run_chunks(outer, [(k,) for k in range(100)], 64) == [190 + k for k in range(100)]


def test_threads_argument():
    assert 1 <= default_threads() <= (os.cpu_count() or 1)
    assert resolve_threads(None) == default_threads()
    assert resolve_threads(3) == 3
    for threads in (0, -2, 1.0, True, "3"):
        with pytest.raises(InputError, match="threads must be a positive integer or None"):
            resolve_threads(threads)


def _in_child(queue):
    queue.put(run_chunks(lambda k: k, [(k,) for k in range(10)], 2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_gets_its_own_threads():
    run_chunks(lambda k: time.sleep(0.001), [(k,) for k in range(10)], 2)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=30) == list(range(10))
    child.join(timeout=30)
    assert child.exitcode == 0
