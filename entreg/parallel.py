"""Running kernels that release the interpreter lock on chunks of their input, in threads.

One thread pool is shared by the whole process. The calling thread works too, so that a call made from inside a
chunk, or while the pool is busy with somebody else's chunks, still makes progress and cannot deadlock.
"""

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from entreg.errors import InputError

_MAX_THREADS = 64


def default_threads() -> int:
    """Number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), _MAX_THREADS)
    return min(os.cpu_count() or 1, _MAX_THREADS)


def resolve_threads(threads: int | None) -> int:
    """Validate a ``threads`` argument: a positive integer, or None for :func:`default_threads`.

    Raises:
        InputError: For anything else.
    """
    if threads is None:
        return default_threads()
    if isinstance(threads, bool) or not hasattr(threads, "__index__") or threads.__index__() < 1:
        raise InputError(f"threads must be a positive integer or None, but is {threads!r}.")
    return min(threads.__index__(), _MAX_THREADS)


def chunk_ranges(n: int, parts: int) -> list[tuple[int, int]]:
    """Split ``range(n)`` into at most ``parts`` non-empty, nearly equal ranges ``(start, stop)``."""
    parts = max(1, min(parts, n))
    bounds = [n * part // parts for part in range(parts + 1)]
    return [(start, stop) for start, stop in itertools.pairwise(bounds) if stop > start]


def run_chunks(
    function: Callable[..., Any], ranges: Sequence[tuple[Any, ...]], threads: int | None = None
) -> list[Any]:
    """Call ``function(*r)`` for every ``r`` in ``ranges``, on up to ``threads`` threads.

    Args:
        function: Called once per entry; should release the interpreter lock.
        ranges: Argument tuples, handed out to the threads in order.
        threads: Positive integer, or None for :func:`default_threads`.

    Returns:
        The results in the order of ``ranges``.

    Raises:
        InputError: If ``threads`` is not a positive integer.
        BaseException: The first exception that a call raised; entries not yet begun are then dropped.
    """
    workers = min(resolve_threads(threads), len(ranges))
    if workers <= 1:
        return [function(*arguments) for arguments in ranges]
    results: list[Any] = [None] * len(ranges)
    pending = list(range(len(ranges) - 1, -1, -1))

    def work() -> None:
        while True:
            try:
                position = pending.pop()
            except IndexError:
                return
            try:
                results[position] = function(*ranges[position])
            except BaseException:
                pending.clear()
                raise

    futures = [_pool().submit(work) for _ in range(workers - 1)]
    try:
        work()
    finally:
        # A helper that has not begun is not needed: every entry has been handed out.
        started = [future for future in futures if not future.cancel()]
        errors = [error for error in (future.exception() for future in started) if error is not None]
    if errors:
        raise errors[0]
    return results


_shared_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def _pool() -> ThreadPoolExecutor:
    global _shared_pool
    if _shared_pool is None:
        with _pool_lock:
            if _shared_pool is None:
                _shared_pool = ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="entreg")
    return _shared_pool


def _forget_pool() -> None:
    # A forked child inherits the pool object but none of its threads.
    global _shared_pool, _pool_lock
    _shared_pool = None
    _pool_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
