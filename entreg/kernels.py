"""The two ways in which this package compiles with Numba: kernels for Python to call, and parts of kernels.

Wrappers for Python and files in the cache cost compilation time, so only kernels have them. A part is compiled into
every kernel that uses it; :mod:`entreg.kernel_cache` drops the kernels when the source of a part changes.

Kernels are compiled when they are first called, once for a machine: ``python -m entreg.warm_up`` does it beforehand.
To keep that short, nothing here is compiled for more than one list of types. Numba would do so for every literal among
the arguments of a call from compiled code, hence ``np.int64(0)`` in such places.
"""

import sys
import threading
from collections.abc import Callable
from typing import Any

from numba import njit
from numba.core import event
from numba.core.registry import CPUDispatcher

kernel = njit(cache=True, nogil=True)
"""Decorates what Python calls."""


class _Part(CPUDispatcher):
    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        # Without a wrapper Numba's own call would end the process.
        raise TypeError(f"{self.py_func.__name__} is part of kernels and cannot be called from Python")


def part(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate what only kernels and other parts call."""
    dispatcher = njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)
    dispatcher.__class__ = _Part
    return dispatcher


_PATIENCE = 1.0
_NOTICE = (
    "Compiling kernels for this machine, once; it may take some seconds "
    "(python -m entreg.warm_up compiles all of geometry beforehand)."
)


class _Notice(event.Listener):
    """Says once in a process, to a person at a terminal or prompt, that compilation is what they wait for."""

    def __init__(self) -> None:
        self._depth = 0
        self._timer: threading.Timer | None = None
        self._said = False

    def on_start(self, event: event.Event) -> None:
        self._depth += 1
        function = getattr(event.data["dispatcher"], "py_func", None)
        ours = getattr(function, "__module__", "").startswith("entreg.")
        if self._depth == 1 and ours and not self._said and (sys.stderr.isatty() or hasattr(sys, "ps1")):
            self._timer = threading.Timer(_PATIENCE, self._say)
            self._timer.daemon = True
            self._timer.start()

    def on_end(self, event: event.Event) -> None:
        self._depth -= 1
        if self._depth == 0 and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _say(self) -> None:
        self._said = True
        print(_NOTICE, file=sys.stderr, flush=True)


event.register("numba:compile", _Notice())
