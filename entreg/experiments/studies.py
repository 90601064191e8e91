"""What the studies of all families of models share: which runs they are, and running those that have no record yet."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import hydra
from omegaconf import DictConfig, OmegaConf

from entreg import distributed
from entreg.atomic import require_writable
from entreg.errors import BusyError, ConfigError, ProcessError
from entreg.names import require_choice
from entreg.records.store import RecordStore
from entreg.runs.directory import RunDirectory, described
from entreg.runs.lock import Attempt, told
from entreg.runs.multirun import is_multirun, launch_time, needs_value, plan_job

NOT_RECORDED = ("store", "checkpoints", "resume", "force", "study", "profile", "objective", "tracker")
"""Keys of an entry configuration that do not decide a run's result."""


class Run(Protocol):
    """One run of a study, planned and checked.

    Attributes:
        config: everything that decides its result; the record's own.
        experiment: name in the records.
        label: what tells it from the experiment's other runs, for people.
    """

    config: Mapping[str, Any]

    @property
    def experiment(self) -> str: ...

    @property
    def label(self) -> str: ...

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Parts of the configuration that say which data and models the run needs."""
        ...

    def require_inputs(self) -> None:
        """Look at all of them before anything slow; raises what is missing or damaged."""
        ...

    def make_record(self, command: str, directory: RunDirectory) -> dict[str, Any]:
        """Do the run; what it has measured may be kept in its directory, see :mod:`entreg.runs.finished`."""
        ...


def study_configs(config: DictConfig, overrides: Sequence[str], entry: str) -> list[dict[str, Any]]:
    """The resolved configuration of every method and seed of a study, seeds outermost.

    Each is composed anew with the same overrides, the method's own and the seed, so that a study is nothing but many
    single runs. Hydra must be initialised.

    Args:
        config: composed from an entry configuration with an experiment that has ``study.methods``.
        overrides: those it was composed with.
        entry: name of the entry configuration.

    Raises:
        ConfigError: the experiment has no methods, or as :func:`entreg.experiments.profiles.checked_config`.
    """
    # Not above: what only runs runs or finds them done need not wait for the libraries behind all names.
    from entreg.experiments.profiles import checked_config

    plain = checked_config(config, overrides, entry)
    methods, allowed = plain["study"]["methods"], plain["profile"][entry]["methods"]
    names = [name for name in methods if allowed is None or name in allowed] or list(methods)[:1]
    if not names:
        raise ConfigError(f"experiment {config.name} has no study.methods; run it with scripts/train.py")
    seeds = plain["profile"]["seeds"] if plain["study"]["seeds"] is None else plain["study"]["seeds"]
    composed = [
        hydra.compose(entry, [*overrides, *methods[name], f"method={name}", f"seed={seed}"])
        for seed in seeds
        for name in names
    ]
    return [OmegaConf.to_container(one, resolve=True) for one in composed]


def run_all(runs: Sequence[Run], *, store: str | Path, command: str, force: bool = False) -> list[dict[str, Any]]:
    """Run what has no record yet and save each record as soon as it is there.

    A run that another process is at is left to it: in a multirun at all, otherwise until the others are done. One that
    fails does not keep the others from being run. Several processes of a launcher share each run; the first one reads
    and writes.

    Args:
        runs: planned runs.
        store: folder of the records and, beside them, of the runs' directories, see :mod:`entreg.runs.directory`.
        command: what to type to repeat the runs.
        force: run again what has a record already.

    Returns:
        The records in the order of ``runs``, old ones included.

    Raises:
        ConfigError, AssetError: data or a model that a run needs are missing or damaged; nothing has been run then.
        OutputError: a record or checkpoint cannot be written.
        BusyError: another process is at a run, and this one does not wait for it.
        Exception: what the first run that failed did.
    """
    records, since = RecordStore(store), launch_time()
    found: dict[int, dict[str, Any]] = {}
    failures: list[Exception] = []
    left = list(range(len(runs)))
    with distributed.joined(runs[0].config.get("device", "cpu") if runs else "cpu"):
        distributed.from_first(lambda: require_writable(store))
        distributed.from_first(lambda: _require_inputs(runs, records, force))
        plan_job([_planned(run, records) for run in runs], command=command)
        # First what nobody else is at, then, where nothing else is left to do, what others have left undone.
        for wait in (False, True) if not distributed.launched() and (needs_value() or not is_multirun()) else (False,):
            todo, left = left, []
            for number in todo:
                try:
                    which = f"{number + 1} of {len(runs)}"
                    found[number] = _run_once(
                        runs[number], records, command, force, wait=wait, since=since, which=which
                    )
                except BusyError:
                    left.append(number)
                except Exception as error:
                    if distributed.launched() or len(runs) == 1:
                        raise
                    known = described(error) in map(described, failures)
                    reason = "for the same reason" if known else described(error)
                    print(f"Failed: {runs[number].experiment} {runs[number].label}: {reason}", file=sys.stderr)
                    failures.append(error)
    if failures:
        print(f"{len(failures)} of {len(runs)} runs failed; the same command runs only them again.", file=sys.stderr)
        raise failures[0]
    if left:
        run = runs[left[0]]
        holder = told(RunDirectory.of(store, run.experiment, run.config).lock.holder())
        raise BusyError(f"{run.experiment} {run.label} is being run by {holder}.")
    return [found[number] for number in range(len(runs))]


def _require_inputs(runs: Sequence[Run], records: RecordStore, force: bool) -> None:
    """What is missing is said once and at the start, not by each run that needs it."""
    looked_at: list[Mapping[str, Any]] = []
    for run in runs:
        if run.inputs not in looked_at and (force or records.find(run.experiment, run.config) is None):
            run.require_inputs()
            looked_at.append(run.inputs)


def _planned(run: Run, records: RecordStore) -> tuple[str, Path, Path]:
    directory = RunDirectory.of(records.root, run.experiment, run.config).path
    return f"{run.experiment} {run.label}", directory, records.path_for(run.experiment, run.config)


def _run_once(
    run: Run, records: RecordStore, command: str, force: bool, *, wait: bool, since: float, which: str
) -> dict[str, Any]:
    """The record of a run, which is run if it has none.

    Args:
        run, records, command, force: see :func:`run_all`.
        wait: for another process that is at it.
        since: when all of this was launched, in seconds since the epoch.
        which: of how many runs it is.

    Raises:
        BusyError: another process is at it, and ``wait`` is not asked for.
        ProcessError: it failed in another process meanwhile.
    """
    directory = RunDirectory.of(records.root, run.experiment, run.config)
    attempt: Attempt | None = None

    def look() -> dict[str, Any] | str | None:
        """The record, or why the run failed since this process was launched: it is not for this one to try again."""
        record = None if force else records.find(run.experiment, run.config)
        return directory.failure(since) if record is None else record

    def decide() -> tuple[dict[str, Any] | str | None, bool]:
        nonlocal attempt
        found = look()
        if found is None:
            attempt = directory.lock.wait(f"{run.experiment} {run.label}") if wait else directory.lock.acquire()
        if attempt is not None:
            try:
                # What became of it in the hands of whoever had the lock until now.
                found = look()
            except Exception:
                attempt.end("failed")
                raise
            if found is not None:
                attempt.end("nothing to do")
        if isinstance(found, dict):
            directory.confirm_done(records.path_for(run.experiment, run.config))
        return found, attempt is not None

    found, mine = distributed.from_first(decide)
    if isinstance(found, str):
        raise ProcessError(f"{found} (in another process, see {directory.log})")
    if found is not None:
        return found
    if not mine:
        raise BusyError(f"Another process is at {run.experiment} {run.label}.")
    print(f"run {which}: {run.experiment} {run.label}")
    if attempt is None:
        # The first process of this launcher writes for all of them.
        return run.make_record(command, directory)
    with directory.attempting(attempt, run.config, command):
        record = run.make_record(command, directory)
        if not attempt.is_mine():
            raise BusyError(f"{run.experiment} {run.label} was taken over while this process was suspended.")
        directory.mark_done(records.save(record))
    return record


def scaled_trainer(trainer: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """The same training with its steps multiplied by the profile's factor."""
    scaled = dict(trainer)
    for key in ("steps", "warmup_steps"):
        scaled[key] = round(trainer[key] * factor)
    if trainer["steps"] > 0:
        scaled["steps"] = max(1, scaled["steps"])
    return scaled


def chosen_device(name: str) -> str:
    """``cpu`` or ``cuda``, what ``auto`` stands for here.

    Raises:
        ConfigError: another name, or a device that is not there.
    """
    # Not above: what only launches runs or finds them done need not wait seconds for it.
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    require_choice("device", name, ("auto", "cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no CUDA device")
    return name


def last_step(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The ``last_step`` of a record's metrics: the newest row of the training log, if there is one."""
    return {"last_step": dict(history[-1])} if history else {}
