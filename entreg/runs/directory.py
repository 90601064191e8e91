"""What a run leaves beside its record: what it said, who tried it when, and how it ended.

``<store>/<experiment>-<hash of the configuration>/`` holds ``config.json``, ``log.txt`` (everything the run printed,
and the traceback of what ended it, attempt after attempt), ``attempts/`` (see :mod:`entreg.runs.lock`),
``measures.json`` (see :mod:`entreg.runs.finished`) and ``DONE`` or ``FAILED``. The record itself is what counts: a run
is done if and only if its record is in the store.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from entreg.atomic import write_text_atomic
from entreg.errors import BusyError, EntregError, OutputError
from entreg.records.record import config_hash, to_plain
from entreg.runs.lock import Attempt, Lock, taken_over

DONE, FAILED, LOG, CONFIG, MEASURES = "DONE", "FAILED", "log.txt", "config.json", "measures.json"
DEFECT = "defect: "
"""Begins what is said of an exception that no user can act on."""


class RunDirectory:
    """The directory of one run.

    Args:
        path: made at the first attempt.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.lock = Lock(self.path / "attempts")

    @classmethod
    def of(cls, store: str | os.PathLike[str], experiment: str, config: Mapping[str, Any]) -> RunDirectory:
        """The directory of an experiment's run with that configuration, in a folder of records."""
        return cls(Path(store) / f"{experiment.replace('/', '-')}-{config_hash(config)}")

    @property
    def log(self) -> Path:
        """Everything that the run printed."""
        return self.path / LOG

    @property
    def measures(self) -> Path:
        """What the run has measured so far, while it is not done; see :mod:`entreg.runs.finished`."""
        return self.path / MEASURES

    def failure(self, since: float | None = None) -> str | None:
        """What ended the newest attempt, see :func:`described`, or None if it did not fail.

        Args:
            since: seconds since the epoch; a failure before does not count.
        """
        path = self.path / FAILED
        try:
            if since is not None and path.stat().st_mtime < since:
                return None
            return path.read_text(encoding="utf-8").partition("\n")[0]
        except (FileNotFoundError, NotADirectoryError):
            return None

    def mark_done(self, record: Path) -> None:
        """Write ``DONE``, with the record's path.

        Raises:
            OutputError: it cannot be written.
        """
        write_text_atomic(self.path / DONE, f"{record}\n")
        for path in (self.path / FAILED, self.measures):
            path.unlink(missing_ok=True)

    def confirm_done(self, record: Path) -> None:
        """Write ``DONE`` where whoever saved the record was killed before.

        Raises:
            OutputError: it cannot be written.
        """
        if self.path.is_dir() and not (self.path / DONE).exists():
            self.mark_done(record)

    @contextlib.contextmanager
    def attempting(self, attempt: Attempt, config: Mapping[str, Any], command: str) -> Iterator[None]:
        """One attempt at the run: the block does it, and calls :meth:`mark_done` at its end.

        What the block prints goes to the log as well. An exception is written there with its traceback, leaves
        ``FAILED`` and goes on; an interruption leaves the run as one that is to be gone on with.

        Args:
            attempt: from :meth:`~entreg.runs.lock.Lock.acquire` of this directory's lock.
            config: of the run.
            command: what to type to repeat it.

        Raises:
            OutputError: the directory cannot be written.
        """
        with attempt:
            for marker in (DONE, FAILED):
                (self.path / marker).unlink(missing_ok=True)
            write_text_atomic(self.path / CONFIG, json.dumps(to_plain(config, "config"), indent=1) + "\n")
            with logged(self.log, f"attempt {attempt.number}: {command}"):
                if attempt.dead is not None:
                    print(taken_over(attempt.dead), file=sys.stderr)
                try:
                    yield
                except BusyError:
                    # What is in the directory now is another process's.
                    raise
                except Exception as error:
                    with contextlib.suppress(OutputError):
                        write_text_atomic(self.path / FAILED, f"{described(error)}\nSee {self.log}.\n")
                    raise


def described(error: BaseException) -> str:
    """An exception on one line: the sentence of what the user can act on, ``defect: <class>: ...`` for all else."""
    sentence = " ".join(str(error).split())
    return sentence if isinstance(error, EntregError) else f"{DEFECT}{type(error).__name__}: {sentence}"


@contextlib.contextmanager
def logged(path: Path, title: str) -> Iterator[None]:
    """What is printed inside the block, and the traceback of what ends it, goes to a file as well, as it comes.

    Args:
        path: of the file, appended to.
        title: of this part of it.

    Raises:
        OutputError: the file cannot be opened. A disk that is full later on costs lines of the log, nothing else.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without a buffer, nothing is left to be written, or to fail, when the file is closed.
        file = path.open("ab", buffering=0)
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error.strerror or error}; check the output folder.") from error
    with file:
        lines = _Lines(file)
        lines.write(f"=== {datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ} {title}\n")
        with (
            contextlib.redirect_stdout(_Both(sys.stdout, lines)),
            contextlib.redirect_stderr(_Both(sys.stderr, lines)),
        ):
            try:
                yield
            except BaseException:
                lines.finish()
                lines.write(traceback.format_exc())
                raise
            finally:
                lines.finish()


class _Lines:
    """Whole lines to a file; of a line that was drawn again and again, as progress bars are, its last state."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.rest = file, ""

    def write(self, text: str) -> None:
        *lines, self.rest = (self.rest + text).split("\n")
        # A bar begins each of its states with a carriage return.
        self.rest = self.rest[max(self.rest.rfind("\r"), 0) :]
        # What holds on to the stream beyond the block, such as a logger, finds the file closed.
        with contextlib.suppress(OSError, ValueError):
            for line in lines:
                self.file.write((line.rpartition("\r")[2] + "\n").encode("utf-8", errors="replace"))

    def finish(self) -> None:
        if self.rest:
            self.write("\n")


class _Both:
    """A stream of the process whose text goes to a log as well; in all else the stream itself."""

    def __init__(self, stream: TextIO, lines: _Lines) -> None:
        self._stream, self._lines = stream, lines

    def write(self, text: str) -> int:
        self._lines.write(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
