"""Exact stages of predicates that compiled kernels call through a pointer, and that are compiled when called often.

Numba copies whatever a kernel calls into the kernel's own module and optimises it there again, at every level of
nesting. The exact stages are large, rarely reached, and called from nearly every kernel: copied, they were more than
half of all compilation. Here a kernel holds a call through a pointer, which this module owns. At first the pointer
leads to Python, where rational numbers give the answer; the many hard cases of degenerate input have the stage
compiled, and from then on the pointer leads to that.

An answer is the sign plus two. 0 stands for none: no exception, such as an interrupt by the user, can pass through
compiled code, so it is put off and the kernel asks again.
"""

import _thread
import ctypes
import sys
import threading
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

# Answers in Python, at some ten microseconds each, after which compilation or its cache are worth their time.
PATIENCE = 200


def called_late(symbol: str, rational: Callable[..., Fraction]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Make an exact stage one that kernels call through a pointer.

    Args:
        symbol: Name by which compiled code, also from Numba's cache, finds the pointer; unique in the process.
        rational: The determinant whose sign the stage returns, for as many rational numbers.

    Returns:
        A decorator of a function of finite float64 numbers, for Numba to compile, that gives the sign of the
        determinant plus two. What it returns is for kernels only: it takes the numbers as one tuple, and gives the same
        or 0, which means that it has to be called again.
    """

    def decorate(stage: Callable[..., int]) -> Callable[..., int]:
        count = stage.__code__.co_argcount
        pointer = _Pointer(stage, rational, count)
        llvmlite.binding.add_symbol(symbol, ctypes.addressof(pointer.target))

        @intrinsic
        def ask(typing_context, coordinates):
            def generate(context, builder, signature, arguments):
                function = ir.FunctionType(ir.IntType(64), [ir.DoubleType()] * count)
                target = context.get_c_value(builder, function.as_pointer(), symbol)
                numbers = [builder.extract_value(arguments[0], k) for k in range(count)]
                return builder.call(builder.load(target), numbers)

            return types.int64(types.UniTuple(types.float64, count)), generate

        # Compiled code needs it as long as the process lives.
        ask.pointer = pointer
        return ask

    return decorate


class _Pointer:
    """The pointer ``target``, and what it leads to while the stage is not compiled."""

    def __init__(self, stage: Callable[..., int], rational: Callable[..., Fraction], count: int):
        self.stage = stage
        self.rational = rational
        self.asked = 0
        self.compiled: Any = None
        self._signature = types.int64(*[types.float64] * count)
        self._compiling = threading.Lock()
        self._callback = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_double] * count)(self.answer_in_python)
        self.uncompiled = ctypes.cast(self._callback, ctypes.c_void_p).value
        self.target = ctypes.c_void_p(self.uncompiled)

    def answer_in_python(self, *coordinates: float) -> int:
        """The stage's answer by rational numbers, 0 after an interrupt; what is asked often is compiled on the way."""
        try:
            self.asked += 1
            if self.asked > PATIENCE:
                self.compile()
            determinant = self.rational(*map(Fraction, coordinates))
            return 2 + (determinant > 0) - (determinant < 0)
        except (OverflowError, ValueError):
            # Not finite: the predicates promise nothing.
            return 2
        except KeyboardInterrupt:
            _thread.interrupt_main()
            return 0

    def compile(self) -> None:
        """Have the stage compiled, or loaded from the cache, once; other threads meanwhile go on in Python."""
        if self._compiling.acquire(blocking=False):
            try:
                if self.compiled is None:
                    self.compiled = cfunc(self._signature, cache=True)(self.stage)
                    self.target.value = self.compiled.address
            except Exception:
                # A full disk, for one, where the cache is to be written. Python's answers are as good, and no second
                # attempt slows them down.
                self.asked = -sys.maxsize
            finally:
                self._compiling.release()
