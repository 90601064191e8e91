"""The two ways in which this package compiles: for Python to call, and as a part of other kernels.

Wrappers for Python and files in the cache cost compilation time, so only kernels have them. A part is compiled into
every kernel that uses it; :mod:`entreg.kernel_cache` drops the kernels when the source of a part changes.
"""

from numba import njit

kernel = njit(cache=True, nogil=True)
"""Decorates what Python calls."""

part = njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""Decorates what only kernels and other parts call."""
