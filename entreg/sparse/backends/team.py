"""Compiled loops on the threads of PyTorch's own OpenMP.

PyTorch's threads wait for work by spinning on their cores. A thread of ours beside them gets half of a core and comes
late; so the loops are run by those threads themselves: by the entry of the OpenMP library that PyTorch has loaded, by
which compiled programs run their parallel regions.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from entreg.parallel import default_threads, run_chunks

_Region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def team_size() -> int:
    """How many threads :func:`run_in_team` may keep busy."""
    if _entry() is not None:
        return torch.get_num_threads()
    return 1 + max(0, default_threads() - torch.get_num_threads())


def run_in_team(function: Callable[..., Any], ranges: Sequence[tuple[Any, ...]]) -> None:
    """Call ``function(*r)`` for every ``r`` in ``ranges``; it should release the interpreter lock.

    Where PyTorch's OpenMP has no such entry, threads of :mod:`entreg.parallel` do it, on cores that PyTorch leaves.

    Args:
        function: called once per entry.
        ranges: argument tuples, at most about :func:`team_size`.

    Raises:
        BaseException: the first exception that a call raised.
    """
    enter = _entry()
    if len(ranges) <= 1 or enter is None:
        run_chunks(function, ranges, min(len(ranges), team_size()) or None)
        return
    pending, errors = list(reversed(ranges)), []

    def work(_: Any) -> None:
        while pending and not errors:
            try:
                arguments = pending.pop()
            except IndexError:
                return
            try:
                function(*arguments)
            except BaseException as error:
                errors.append(error)

    # As many as PyTorch's own regions have: for another number the library would end threads and begin new ones.
    enter(_Region(work), None, torch.get_num_threads(), 0)
    if errors:
        raise errors[0]


@functools.cache
def _entry() -> Callable[..., None] | None:
    """``GOMP_parallel(function, data, number of threads, flags)`` of the library that PyTorch brings along."""
    if sys.platform != "linux" or "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*")):
        try:
            # The one that is loaded already, not a second copy.
            entry = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD).GOMP_parallel
        except (OSError, AttributeError):
            continue
        entry.argtypes, entry.restype = (_Region, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
        return entry
    return None
