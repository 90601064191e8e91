"""One process at a time does a piece of work, also when the processes are on machines that share a file system.

The lock is a folder of attempts, ``0001.json``, ``0002.json`` and so on. An attempt is made in one step of the file
system, carries who makes it, and is never removed; whoever makes number n + 1 has the lock, which may be done only
when attempt n has ended or its process is dead. As numbers are not used again, two processes that find the same dead
attempt cannot both take it over. Whether a process is dead is seen at once on its own machine (its number and the time
it began, since the last boot), and elsewhere by its heartbeat: the attempt's time of change, which it renews.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import platform
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from entreg.atomic import require_writable, write_text_atomic
from entreg.errors import OutputError

HEARTBEAT = 10.0
"""Seconds between two signs of life of whoever has a lock."""

_SILENCE = 9
"""Heartbeats without a sign of life after which a process on another machine is suspected to be dead."""

_WATCHED = 3
"""Heartbeats that a suspect is then watched for: clocks of machines and file servers are not to be trusted."""

_NAME = re.compile(r"(\d{4,})\.json")
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}


class Attempt:
    """A lock that is held, from :meth:`Lock.acquire`; as a context it ends with the block.

    Attributes:
        path: its file.
        number: counts from 1.
        dead: what is known of the process whose unfinished attempt was taken over, or None.
    """

    def __init__(self, path: Path, content: Mapping[str, Any], dead: Mapping[str, Any] | None, beat: float) -> None:
        self.path = path
        self.number = int(path.stem)
        self.dead = dead
        self._content = dict(content)
        self._began = time.monotonic()
        self._over = threading.Event()
        threading.Thread(target=self._live, args=(beat,), daemon=True).start()

    def is_mine(self) -> bool:
        """Whether nobody took the lock over, as can happen to a process that was suspended for minutes."""
        return _newest(self.path.parent) == self.path

    def end(self, outcome: str) -> None:
        """Give the lock back.

        Args:
            outcome: a word for the history.
        """
        self._over.set()
        seconds = round(time.monotonic() - self._began, 3)
        try:
            write_text_atomic(self.path, json.dumps({**self._content, "outcome": outcome, "seconds": seconds}) + "\n")
        except OutputError as error:
            # What was done is done; the attempt counts as dead once this process has ended.
            print(error, file=sys.stderr)

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self._over.is_set():
            self.end("done" if error is None else "interrupted" if not isinstance(error, Exception) else "failed")

    def _live(self, beat: float) -> None:
        while not self._over.wait(beat):
            with contextlib.suppress(OSError):
                os.utime(self.path)


class Lock:
    """The right to do one piece of work.

    Args:
        folder: of the attempts; made at the first one.
        beat: seconds between two heartbeats, the same for all who want the lock.
    """

    def __init__(self, folder: str | os.PathLike[str], *, beat: float = HEARTBEAT) -> None:
        self.folder = Path(folder)
        self.beat = beat

    def acquire(self) -> Attempt | None:
        """Take the lock if it is free or its holder is dead.

        Returns:
            The attempt, or None: another process, or this one, has the lock.

        Raises:
            OutputError: the folder cannot be written.
        """
        newest = _newest(self.folder)
        dead = None
        if newest is not None:
            if self._is_held(newest):
                return None
            dead = _unfinished(newest)
        path = self.folder / f"{int(newest.stem) + 1 if newest is not None else 1:04d}.json"
        content = {**_myself(), "utc": _utc(), "outcome": None, "seconds": None}
        require_writable(self.folder)
        try:
            if not _make(path, json.dumps(content) + "\n"):
                return None
        except OSError as error:
            raise OutputError(f"Cannot write {path}: {error.strerror or error}; check the output folder.") from error
        if dead is not None:
            # For the history; the dead do not write it themselves.
            write_text_atomic(newest, json.dumps({**dead, "outcome": "died"}) + "\n")
        return Attempt(path, content, dead, self.beat)

    def wait(self, what: str, poll: float = 1.0) -> Attempt:
        """Take the lock as soon as it is free; if it is not, say so.

        Args:
            what: the piece of work, for people.
            poll: seconds between two looks.

        Raises:
            OutputError: the folder cannot be written.
        """
        attempt = self.acquire()
        if attempt is None:
            print(f"{what} is in the hands of {told(self.holder())}; waiting.", file=sys.stderr)
        while attempt is None:
            time.sleep(poll)
            attempt = self.acquire()
        return attempt

    def holder(self) -> dict[str, Any] | None:
        """The attempt that is going on: ``host``, ``pid``, ``utc`` and so on; None when it has ended or looks dead."""
        newest = _newest(self.folder)
        return _read(newest) if newest is not None and self._is_held(newest, watched=0) else None

    def history(self) -> list[dict[str, Any]]:
        """All attempts, oldest first; ``outcome`` is None for one that goes on or whose process is dead."""
        return [_read(path) for path in _attempts(self.folder)]

    def _is_held(self, path: Path, watched: float = _WATCHED) -> bool:
        content = _read(path)
        if content.get("outcome") is not None:
            return False
        me = _myself()
        if all(content.get(key) == me[key] for key in ("host", "boot", "pid_namespace")):
            return _is_alive(content["pid"], content["started"])
        return self._beats(path, watched)

    def _beats(self, path: Path, watched: float) -> bool:
        """Whether the attempt shows a sign of life. Both times compared are the file system's own."""
        before = _changed(path)
        try:
            with tempfile.NamedTemporaryFile(prefix=".now-", dir=self.folder) as probe:
                silent = _changed(Path(probe.name)) - before
        except OSError:
            silent = -1.0
        if 0 <= silent <= _SILENCE * self.beat:
            return True
        deadline = time.monotonic() + watched * self.beat
        while time.monotonic() < deadline:
            time.sleep(self.beat / 4)
            if _changed(path) != before:
                return True
        return False


@contextlib.contextmanager
def exclusive(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Only one process at a time is inside the block, for one folder; others wait, and say so.

    Args:
        folder: whose content the block changes; attempts are kept in its ``attempts``.

    Raises:
        OutputError: the folder cannot be written.
    """
    attempt = Lock(Path(folder) / "attempts").wait(str(folder))
    if attempt.dead is not None:
        print(taken_over(attempt.dead), file=sys.stderr)
    with attempt:
        yield


def taken_over(dead: Mapping[str, Any]) -> str:
    """The sentence on an attempt whose process is dead."""
    return f"Taken over from {told(dead)}, which is no more."


def told(holder: Mapping[str, Any] | None) -> str:
    """An attempt's process in words."""
    if not holder or "pid" not in holder:
        return "another process"
    return f"process {holder['pid']} on {holder['host']} since {holder['utc']}"


def _attempts(folder: Path) -> list[Path]:
    try:
        return sorted(
            (folder / name for name in os.listdir(folder) if _NAME.fullmatch(name)), key=lambda p: int(p.stem)
        )
    except (FileNotFoundError, NotADirectoryError):
        return []


def _newest(folder: Path) -> Path | None:
    return (_attempts(folder) or [None])[-1]


def _unfinished(path: Path) -> dict[str, Any] | None:
    content = _read(path)
    return content if content.get("outcome") is None else None


def _read(path: Path) -> dict[str, Any]:
    """What an attempt says; nothing for one that is damaged, of which only the heartbeat tells."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _make(path: Path, text: str) -> bool:
    """Makes a file with its content in one step; False if it exists already."""
    descriptor, temporary = tempfile.mkstemp(prefix=".attempt-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            # A file server may answer so to a request that it got twice.
            return os.stat(temporary).st_nlink == 2
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _make_without_links(path, text)
        return True
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _make_without_links(path: Path, text: str) -> bool:
    """On file systems without hard links: whoever opens it first; others see it empty for a moment, but alive."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    return True


def _myself() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "boot": _first_line("/proc/sys/kernel/random/boot_id"),
        # Containers on one machine may share its name, but not their process numbers.
        "pid_namespace": _link("/proc/self/ns/pid"),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _is_alive(pid: int, started: int | None) -> bool:
    if _started(pid) is not None or started is not None:
        return _started(pid) == started
    # No /proc: a number that is used again cannot be told from the process that had it.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _started(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process; None if it is dead, also when nobody has asked for its end."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _first_line(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _utc() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
