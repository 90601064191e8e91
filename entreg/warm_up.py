"""Compiles kernels ahead of their first use, into Numba's cache: ``python -m entreg.warm_up``, part of ``make setup``.

A package whose kernels are worth it has a module with a function ``warm_up()`` that calls each of them once, with the
types that its users' calls lead to; its name stands in :data:`PACKAGES`. What is in the cache already is only loaded.
"""

import importlib
import time

PACKAGES = ("entreg.geometry.warm_up", "entreg.entropy.warm_up")
"""Modules with a function ``warm_up()``, in the order in which they are called."""


def warm_up() -> None:
    """Compile the kernels of all :data:`PACKAGES`, or load them where they are compiled already."""
    for name in PACKAGES:
        importlib.import_module(name).warm_up()


def main() -> None:
    """Entry point of ``python -m entreg.warm_up``."""
    start = time.perf_counter()
    warm_up()
    print(
        f"The kernels of geometry and hull entropy are compiled for this machine ({time.perf_counter() - start:.0f} s)."
    )


if __name__ == "__main__":
    main()
