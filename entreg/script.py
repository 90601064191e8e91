"""What a script sets for its process before it loads anything else: ``import entreg.script`` is its first import.

Both settings are for machines that are shared, and neither changes a number that is computed.

*Waiting threads.* A parallel region of PyTorch ends when its last thread is done, and until then the others spin, by
default for milliseconds. Beside a busy process there are fewer cores than threads: the waiting thread then uses up the
time of the one that it waits for. So they sleep (``OMP_WAIT_POLICY=passive``, which the OpenMP library that PyTorch's
wheels bring along reads when it is loaded).

*Large tensors.* By default glibc takes every large block from the system anew and gives it back at once, so that each
layer of a model pays for touching its pages, which are zeroed first. Here freed blocks are kept for the next ones
(``mallopt``; the environment variables of the same meaning are set for processes that this one starts).

A user's own environment wins: a setting of which one of its variables is set already is left alone. Elsewhere than on
Linux with glibc the second does nothing.
"""

from __future__ import annotations

import ctypes
import os
import sys

_WAITING = {"OMP_WAIT_POLICY": "passive"}
_WAITING_KNOWN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")

# Numbers of glibc's malloc.h, by the environment variable of the same meaning, and what they are set to: more than any
# tensor of the offline experiments has, and for releases that know a largest threshold that one.
_KEEPING = {"MALLOC_MMAP_THRESHOLD_": (-3, (2**30, 2**25)), "MALLOC_TRIM_THRESHOLD_": (-1, (2**30,))}
_KEEPING_KNOWN = (*_KEEPING, "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def prepare_process() -> None:
    """Apply both settings to this process, before PyTorch is loaded."""
    if not any(name in os.environ for name in _WAITING_KNOWN):
        os.environ.update(_WAITING)
    if sys.platform == "linux" and not any(name in os.environ for name in _KEEPING_KNOWN):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        # Other C libraries than glibc have none.
        if mallopt is not None:
            for name, (number, values) in _KEEPING.items():
                kept = next((value for value in values if mallopt(number, value)), None)
                if kept is not None:
                    os.environ[name] = str(kept)


prepare_process()
