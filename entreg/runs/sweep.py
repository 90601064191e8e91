"""The jobs of one command, and what became of them.

``<store>/sweeps/<name>-<hash of the command>/`` holds ``sweep.json`` (which jobs there are) and, for each job that was
begun, ``jobs/<hash of its overrides>.json`` (which runs it stands for) and ``.log``. What became of a run is not
written here: its directory and its record say that. So the files stay true whoever is killed, and the same command
again finds the same sweep.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from entreg.atomic import write_text_atomic
from entreg.errors import BusyError, RecordError
from entreg.records.record import parse
from entreg.runs.directory import RunDirectory, described, logged

State = Literal["done", "running", "failed", "interrupted", "queued"]
STATES: tuple[State, ...] = ("done", "running", "failed", "interrupted", "queued")


@dataclass(frozen=True)
class RunStatus:
    """What became of one run of a sweep.

    Attributes:
        job: the overrides of its job.
        label: what tells it from the other runs of its job; empty if it is the only one.
        state: ``interrupted``: killed, to be gone on with by the same command.
        attempts: how often it was begun.
        seconds: of the newest attempt; None if there is none or it was killed.
        failure: see :func:`entreg.runs.directory.described`; None unless it failed.
        log: what it printed; None if it was not begun.
        record: of a run that is done.
    """

    job: tuple[str, ...]
    label: str
    state: State
    attempts: int = 0
    seconds: float | None = None
    failure: str | None = None
    log: Path | None = None
    record: Mapping[str, Any] | None = None


class Sweep:
    """The directory of a sweep.

    Args:
        directory: made when the sweep begins.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.path = self.directory / "sweep.json"

    def begin(
        self,
        command: str,
        *,
        jobs: Sequence[Sequence[str]] | None,
        trials: int | None = None,
        objective: Mapping[str, Any] | None = None,
    ) -> None:
        """Say which jobs there are.

        Args:
            command: what was typed.
            jobs: overrides of each; None: they are chosen one after the other, ``trials`` of them.
            trials: how many, where ``jobs`` is None.
            objective: content of a file in ``configs/objective``.

        Raises:
            OutputError: the directory cannot be written.
        """
        content = {
            "command": command,
            "jobs": None if jobs is None else [list(job) for job in jobs],
            "trials": trials,
            "objective": objective,
            "begun": _utc(),
            "ended": None,
        }
        write_text_atomic(self.path, json.dumps(content, indent=1) + "\n")

    def end(self) -> None:
        """Say that nothing more is coming."""
        write_text_atomic(self.path, json.dumps({**self.content(), "ended": _utc()}, indent=1) + "\n")

    def content(self) -> dict[str, Any]:
        """What :meth:`begin` was told, ``begun`` and ``ended``.

        Raises:
            RecordError: there is no sweep, or its file is damaged.
        """
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RecordError(
                f"There is no sweep in {self.directory}; begin one, for example make sweep-vit."
            ) from error
        except (OSError, ValueError) as error:
            raise RecordError(f"{self.path} is damaged; run the sweep's command again.") from error

    def job(self, overrides: Sequence[str]) -> Job:
        """The job with these overrides."""
        key = hashlib.sha256(json.dumps(sorted(overrides)).encode()).hexdigest()[:12]
        return Job(self.directory / "jobs" / f"{key}.json", tuple(overrides))

    def runs(self) -> list[RunStatus]:
        """What became of every run, in the order of the jobs; of a job that was not begun it counts one."""
        content = self.content()
        if content["jobs"] is not None:
            jobs = [self.job(overrides) for overrides in content["jobs"]]
        else:
            paths = (self.directory / "jobs").glob("*.json")
            begun = {path: read for path in paths if (read := _read(path))}
            order = sorted(begun, key=lambda path: begun[path].get("begun", ""))
            jobs = [Job(path, tuple(begun[path]["overrides"])) for path in order]
        found = [status for job in jobs for status in job.runs()]
        if content["jobs"] is None and content["ended"] is None:
            found += [RunStatus((), "", "queued")] * max(0, (content["trials"] or 0) - len(jobs))
        return found


class Job:
    """One call of a script's function: one set of overrides, one run or several.

    Args:
        path: of its file.
        overrides: of the configuration.
    """

    def __init__(self, path: Path, overrides: tuple[str, ...]) -> None:
        self.path, self.overrides = path, overrides

    @property
    def single_run(self) -> list[str]:
        """The overrides with which the script does the same alone."""
        return [word for word in self.overrides if not word.startswith("launcher=")]

    @property
    def log(self) -> Path:
        """What the job printed."""
        return self.path.with_suffix(".log")

    @property
    def left(self) -> bool:
        """Whether it was left to another launcher, which was at it."""
        return bool(_read(self.path).get("left"))

    @contextlib.contextmanager
    def attempting(self, command: str) -> Iterator[None]:
        """Do the job in the block: it is logged, and what ends it is noted.

        Args:
            command: what to type to repeat it.

        Raises:
            OutputError: its files cannot be written.
        """
        self._write(begun=_utc(), ended=None, failure=None, runs=None, left=False)
        failure, left = None, False
        try:
            with logged(self.log, command):
                yield
        except BusyError:
            left = True
            raise
        except Exception as error:
            failure = described(error)
            raise
        finally:
            self._write(ended=_utc(), failure=failure, left=left)

    def plan(self, runs: Sequence[tuple[str, Path, Path]]) -> None:
        """Say which runs the job stands for.

        Args:
            runs: of each its label, its directory and its record's path.
        """
        self._write(runs=[[label, str(directory), str(record)] for label, directory, record in runs])

    def runs(self) -> list[RunStatus]:
        """What became of its runs."""
        content = _read(self.path)
        runs, failure = content.get("runs"), content.get("failure")
        if runs is None and failure is not None:
            return [RunStatus(self.overrides, "", "failed", 1, failure=failure, log=self.log)]
        if runs is None:
            return [RunStatus(self.overrides, "", "done" if content.get("ended") else "queued")]
        found = [
            _run_status(self.overrides, label if len(runs) > 1 else "", RunDirectory(directory), Path(record))
            for label, directory, record in runs
        ]
        if failure is not None and all(one.state == "done" for one in found):
            # What is left to a job after its runs: its tables, the number that is searched for.
            found.append(RunStatus(self.overrides, "after its runs", "failed", 1, failure=failure, log=self.log))
        return found

    def _write(self, **changes: Any) -> None:
        content = {"overrides": list(self.overrides), **_read(self.path), **changes}
        write_text_atomic(self.path, json.dumps(content, indent=1) + "\n")


def _run_status(job: tuple[str, ...], label: str, directory: RunDirectory, path: Path) -> RunStatus:
    history = directory.lock.history()
    seconds = history[-1].get("seconds") if history else None
    log = directory.log if directory.log.exists() else None
    state: State = "interrupted" if history else "queued"
    record, failure = None, directory.failure()
    holder = directory.lock.holder()
    if holder is not None:
        state, failure = "running", None
    elif path.exists():
        try:
            record = parse(path.read_text(encoding="utf-8"), str(path))
            state, failure, seconds = "done", None, record["wall_seconds"]
        except (OSError, ValueError, RecordError) as error:
            state, failure = "failed", described(error)
    elif failure is not None:
        state = "failed"
    return RunStatus(job, label, state, len(history), seconds, failure, log, record)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _utc() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
