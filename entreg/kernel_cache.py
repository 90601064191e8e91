"""Keeps compiled kernels in step with their sources.

Numba's on-disk cache notices a change of the file in which a function stands, but not of the functions it has
inlined from other files: after an update of the package an old predicate could live on inside a new hull. So the
sources are compared with those of the last import, and when any of them differs every compiled kernel is dropped.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from entreg.atomic import write_text_atomic
from entreg.errors import OutputError

_STAMP = "kernels.stamp"


def drop_stale_kernels(package: Path) -> bool:
    """Remove the compiled kernels below ``package`` when its sources are not those they were compiled from.

    A folder that cannot be read or written is left alone: there Numba caches elsewhere, or not at all.

    Args:
        package: folder of a package whose Numba functions use ``cache=True``.

    Returns:
        True when kernels were dropped or the sources are seen for the first time.
    """
    stamp = package / "__pycache__" / _STAMP
    try:
        signature = _signature(package)
    except OSError:
        return False  # Not a folder, such as a zip archive, or one that cannot be read.
    try:
        if stamp.read_text(encoding="utf-8") == signature:
            return False
    except (OSError, UnicodeDecodeError):
        pass  # No stamp, or not a stamp: the kernels' origin is unknown.
    try:
        for pattern in ("*.nbi", "*.nbc"):
            for compiled in package.rglob(f"__pycache__/{pattern}"):
                compiled.unlink(missing_ok=True)
        write_text_atomic(stamp, signature)
    except (OSError, OutputError):
        return False
    return True


def _signature(package: Path) -> str:
    digest = hashlib.sha256()
    for name, status in sorted(_sources(str(package), "")):
        digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _sources(folder: str, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
    # Every import of the package waits for this; pathlib takes twice as long.
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".py"):
                yield prefix + entry.name, entry.stat()
            elif entry.is_dir(follow_symlinks=False) and entry.name != "__pycache__":
                yield from _sources(entry.path, f"{prefix}{entry.name}/")
