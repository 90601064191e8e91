"""Writing files so that a reader sees the old content or the new one, never half of either.

The text goes to a temporary file in the same folder, is forced to disk, and replaces the target in one step of the
file system. Whatever goes wrong on the way, the target stays as it was and no temporary file is left.
"""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from entreg.errors import OutputError

_NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes) -> Path:
    """Writes ``data`` to ``path``, making its folder first when that is missing.

    Args:
        path: target file; replaced when it exists.
        data: the whole content.

    Returns:
        The path written.

    Raises:
        OutputError: the folder is read-only, the disk is full, or a file or folder stands in the way.
            The target is unchanged.
    """
    target = Path(path)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder", str(target))
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name[:80]}.", suffix=".tmp", dir=target.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only the owner can read; results are meant to be shared.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
        temporary = None
        _sync_folder(target.parent)
    except OSError as error:
        raise OutputError(_sentence(target, error)) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
    return target


def write_text_atomic(path: str | os.PathLike[str], text: str) -> Path:
    """Writes ``text`` as UTF-8 with the newlines it has; see :func:`write_bytes_atomic`."""
    return write_bytes_atomic(path, text.encode("utf-8"))


@contextlib.contextmanager
def folder_atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to be filled that takes the name ``path`` only when the block ends without an exception.

    Args:
        path: target folder; one that exists is replaced.

    Yields:
        An empty folder beside the target.

    Raises:
        OutputError: something cannot be written, also by the block itself. No temporary folder is left.
    """
    target = Path(path)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name[:80]}.", suffix=".tmp", dir=target.parent))
        yield temporary
        for file in temporary.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        os.chmod(temporary, 0o777 & ~_umask())
        _sync_folder(temporary)
        # A folder cannot be replaced in one step unless it is empty.
        old = temporary.with_suffix(".old.tmp")
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
        temporary = None
        _sync_folder(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise OutputError(_sentence(target, error)) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def require_writable(folder: str | os.PathLike[str]) -> None:
    """Makes sure that results can be written to ``folder``, to be called before anything slow starts.

    Raises:
        OutputError: the folder cannot be made or written to, or the disk is full.
    """
    probe = write_bytes_atomic(Path(folder) / f".writable-{os.getpid()}", b"?")
    probe.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Forces the new folder entry to disk, where the file system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sentence(target: Path, error: OSError) -> str:
    if error.errno in _NO_PERMISSION:
        return f"Cannot write {target}: no permission to write in {target.parent}; choose another output folder."
    if error.errno in _NO_SPACE:
        return f"Cannot write {target}: the disk is full; free some space and run the same command again."
    if error.errno == errno.EISDIR:
        return f"Cannot write {target}: a folder stands where the file should go; move it away."
    if error.errno in {errno.ENOTDIR, errno.EEXIST}:
        return f"Cannot write {target}: a file stands where the folder {target.parent} is needed; move it away."
    return f"Cannot write {target}: {error.strerror or error}; check the output folder and run again."
