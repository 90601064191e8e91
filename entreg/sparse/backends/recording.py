"""Who is told which kernel runs, where PyTorch does not see it."""

from __future__ import annotations

RECORDERS: list[list[str]] = []
"""Lists that are being filled, see :func:`entreg.sparse.kernels.recorded_kernels`."""


def record_kernel(name: str) -> None:
    """Tell all that listen that a kernel runs."""
    for names in RECORDERS:
        names.append(name)
