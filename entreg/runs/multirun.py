"""What ties Hydra's multiruns to sweeps: where a sweep lies, which jobs it has, and what a job does.

Hydra runs jobs and, whatever its launcher, forgets them: it begins anew each time, says only at the end that a job
failed, and of several failures only the first (its issues 3328 and 2284). Here a job notes itself what it does.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override

from entreg import distributed
from entreg.errors import BusyError, ConfigError, EntregError
from entreg.runs.directory import described
from entreg.runs.lock import Attempt
from entreg.runs.study import hold_study, silence_sqlalchemy
from entreg.runs.sweep import Job, Sweep

_BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
_ONE_AFTER_THE_OTHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
_NOT_IDENTITY = (
    *("-m", "--multirun", "launcher=", "hydra/launcher=", "hydra.launcher.", "hydra.verbose=", "hydra.callbacks."),
    *("hydra.sweeper.n_trials=", "hydra.sweeper.storage=", "force=", "tracker=", "tracker."),
)
"""Beginnings of arguments that change how a sweep is run, but not which runs it has."""


def sweep_name(arguments: Sequence[str]) -> str:
    """The name of the sweep that a command line stands for, whatever its launcher and the order of its arguments.

    Args:
        arguments: as ``sys.argv``.
    """
    script = Path(arguments[0]).stem
    deciding = sorted(word for word in arguments[1:] if not word.lstrip("+").startswith(_NOT_IDENTITY))
    values = dict(word.lstrip("+").partition("=")[::2] for word in deciding)
    name = values.get("sweep", values.get("experiment", script)).replace("/", "-")
    if not name.replace("-", "").replace("_", "").isalnum():
        name = script
    return f"{name}-{hashlib.sha256(json.dumps([script, deciding]).encode()).hexdigest()[:8]}"


_LAUNCHED: ContextVar[float] = ContextVar("launched")

# For ``hydra.sweep.dir``: the value is made where a multirun begins, and travels to its jobs in Hydra's cache.
OmegaConf.register_new_resolver("sweep_name", lambda: sweep_name(sys.argv), use_cache=True, replace=True)


class RegisterSweep(Callback):
    """Hydra's callback that writes down which jobs a multirun has."""

    begun: Sweep | None = None
    """The sweep of the multirun that this process began last."""

    study: Attempt | None = None
    """The right to write into the study that this process goes on with."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            self._begin(config)
        except EntregError as error:
            raise Refusal(error) from error

    def _begin(self, config: DictConfig) -> None:
        from entreg.cli import command_line

        sweep = Sweep(config.hydra.sweep.dir)
        searched = config.hydra.sweeper._target_ != _BASIC
        trials = config.hydra.sweeper.get("n_trials") if searched else None
        if searched:
            silence_sqlalchemy()
            with flag_override(config, ["struct", "readonly"], False):
                RegisterSweep.study = hold_study(config.hydra.sweeper, sweep.directory.name)
        if not distributed.is_first():
            return
        sweep.begin(
            command_line(sys.argv),
            jobs=None if searched else _jobs(config),
            trials=trials,
            objective=_plain(config.get("objective")),
        )
        RegisterSweep.begun = sweep

    @classmethod
    def release(cls) -> None:
        """Give the study back that this process goes on with, if any."""
        if cls.study is not None:
            cls.study.end("done")
            cls.study = None


class Refusal(SystemExit):
    """Ends a multirun before it begins. Hydra makes warnings of a callback's errors and goes on.

    Attributes:
        error: what is wrong.
    """

    def __init__(self, error: EntregError) -> None:
        super().__init__(str(error))
        self.error = error


class Task:
    """A script's function as Hydra calls it for each job.

    In a multirun its errors are noted and do not reach Hydra, so that they stop neither launcher nor sweeper. It gives
    the number that a search is for.

    Args:
        function: what the script does with a configuration.
        sentence: turns an exception of Hydra or OmegaConf into the error that a user can act on, or raises it again.

    Attributes:
        failure: of a plain run, the error that its user can act on.
        entered: whether the function was called, in this process.
    """

    def __init__(self, function: Callable[[DictConfig], Any], sentence: Callable[[Exception], EntregError]) -> None:
        functools.update_wrapper(self, function)
        self.function, self.sentence = function, sentence
        self.launched = time.time()
        self.failure: EntregError | None = None
        self.entered = False

    def __call__(self, config: DictConfig) -> Any:
        self.entered = True
        if is_multirun():
            return self._job(config)
        try:
            return self._said(config)
        except EntregError as error:
            # Hydra announces a failing job in a line of its own before the exception gets to the script.
            self.failure = error
            return None

    def _said(self, config: DictConfig) -> Any:
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

        try:
            return self.function(config)
        except (HydraException, OmegaConfBaseException) as error:
            raise self.sentence(error) from error

    def _job(self, config: DictConfig) -> Any:
        from entreg.cli import command_line

        job = current_job()
        _LAUNCHED.set(self.launched)
        try:
            with job.attempting(command_line()) if distributed.is_first() else contextlib.nullcontext():
                value = self._said(config)
                if value is None and needs_value():
                    raise ConfigError(
                        f"The record has no number for the objective {_plain(config.get('objective'))}; choose one of "
                        "configs/objective that its rows or metrics have."
                    )
                return value
        except BusyError as error:
            print(error)
        except Exception as error:
            if distributed.launched():
                # The other processes may not have failed and would wait in vain for this one in the next job.
                raise SystemExit(2) from error
            print(f"Failed: {' '.join(job.single_run)}: {described(error)}; see {job.log}.", file=sys.stderr)
        return None


def is_multirun() -> bool:
    """Whether the call is one of Hydra's many."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def is_parallel() -> bool:
    """Whether the call is one of many that may run at the same time and print to the same terminal."""
    return is_multirun() and HydraConfig.get().launcher._target_ != _ONE_AFTER_THE_OTHER


def needs_value() -> bool:
    """Whether whoever chooses the jobs does so by the values of earlier ones."""
    return is_multirun() and HydraConfig.get().sweeper._target_ != _BASIC


def current_job() -> Job:
    """The job that this call is, of a multirun or of a plain one."""
    settings = HydraConfig.get()
    return Sweep(settings.sweep.dir).job(OmegaConf.to_container(settings.overrides.task))


def launch_time() -> float:
    """Seconds since the epoch at which the multirun was launched that this call belongs to; now if it is none."""
    return _LAUNCHED.get() if is_multirun() else time.time()


def script_name() -> str:
    """Of the script whose job this is, without ``.py``."""
    return HydraConfig.get().job.name


def plan_job(runs: Iterable[tuple[str, Path, Path]], *, command: str) -> None:
    """Say for :mod:`entreg.runs.status` which runs this call of a script stands for, if there are several.

    Args:
        runs: see :meth:`entreg.runs.sweep.Job.plan`.
        command: what was typed.
    """
    runs = list(runs)
    if not HydraConfig.initialized() or not distributed.is_first() or (not is_multirun() and len(runs) < 2):
        return
    job = current_job()
    if not is_multirun():
        Sweep(HydraConfig.get().sweep.dir).begin(command, jobs=[job.overrides])
    job.plan(runs)


def _jobs(config: DictConfig) -> list[list[str]]:
    """The overrides of all jobs of Hydra's own sweeper."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    texts = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    parsed = OverridesParser.create().parse_overrides([*texts, *config.hydra.overrides.task])
    return BasicSweeper.split_arguments(parsed, None)[0]


def _plain(config: Any) -> Any:
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
