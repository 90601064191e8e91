"""Writing files so that a reader sees the old content or the new one, never half of either.

The text goes to a temporary file in the same folder, is forced to disk, and replaces the target in one step of the
file system. Whatever goes wrong on the way, the target stays as it was and no temporary file is left.
"""

import contextlib
import errno
import fcntl
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

    Several processes may do this to one path at once: the folder is then one of theirs, whole.

    Args:
        path: target folder; one that exists is replaced. (A reader may find neither for a moment: file systems cannot
            replace a folder in one step.)

    Yields:
        An empty folder beside the target.

    Raises:
        OutputError: something cannot be written, also by the block itself. No temporary folder is left.
    """
    target = Path(path)
    temporary = lock = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name[:80]}.", suffix=".new", dir=target.parent))
        # Tells remove_abandoned that this process is alive; the system takes it away when the process dies.
        lock = _lock(temporary)
        temporary = temporary.rename(temporary.with_suffix(".tmp"))
        yield temporary
        for file in temporary.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        os.chmod(temporary, 0o777 & ~_umask())
        _sync_folder(temporary)
        _put_in_place(temporary, target)
        temporary = None
        _sync_folder(target.parent)
    except OSError as error:
        raise OutputError(_sentence(target, error)) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _put_in_place(temporary: Path, target: Path) -> None:
    """Gives a folder its name, whatever has it now; what has it stays when that fails."""
    old = temporary.with_suffix(".old.tmp")
    while True:
        with contextlib.suppress(FileNotFoundError):
            os.replace(target, old)
        try:
            os.replace(temporary, target)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                with contextlib.suppress(OSError):
                    os.replace(old, target)
                raise
            # Another process has put its own there since.
        else:
            return
        finally:
            shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Removes a folder; its name goes first, so that a process killed meanwhile leaves no half of it under its name."""
    going = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        os.replace(path, going)
        shutil.rmtree(going, ignore_errors=True)


def remove_abandoned(parent: Path, name: str) -> None:
    """Removes what killed processes have left of folders that they wrote or removed, not what others write now.

    Args:
        parent: of these folders.
        name: pattern of the names that the folders were to have or had.
    """
    for path in parent.glob(f".{name}.tmp"):
        lock = _lock(path) if path.is_dir() else None
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def require_writable(folder: str | os.PathLike[str]) -> None:
    """Makes sure that results can be written to ``folder``, to be called before anything slow starts.

    Raises:
        OutputError: the folder cannot be made or written to, or the disk is full.
    """
    probe = write_bytes_atomic(Path(folder) / f".writable-{os.getpid()}", b"?")
    probe.unlink(missing_ok=True)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock; None if another process has it or the file system knows none."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


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
