"""A search that Optuna keeps in a database: it goes on with the trials that it has, whoever was killed.

Hydra's sweeper opens the study that ``hydra.sweeper.storage`` and ``hydra.sweeper.study_name`` name, adds
``hydra.sweeper.n_trials`` trials to it whatever it holds, begins its sampler anew and forgets what a killed launcher
was at. Here the study is looked at before, and the sweeper told what is left to do.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from omegaconf import DictConfig

from entreg import distributed
from entreg.errors import ConfigError, first_line
from entreg.runs.lock import Attempt, Lock

_URL = re.compile(r"sqlite:///(?!:memory:)([^?]+)")


def hold_study(sweeper: DictConfig, name: str) -> Attempt | None:
    """Look at the study that a search is to go on with, and tell the sweeper what is left of it.

    What a killed launcher was at, and trials that failed, are proposed again first, with the same values.

    Args:
        sweeper: ``hydra.sweeper`` of Hydra's sweeper for Optuna. Changed: ``n_trials`` becomes the number of trials
            that are left when those which the study has ended with a value are taken off; ``study_name`` becomes
            ``name`` if it was not given; ``sampler.seed`` is another one for each state of the study, so that a sampler
            does not propose again what it did.
        name: of the sweep.

    Returns:
        The right to write into the study, which ends with the process at the latest; None if no storage is given.

    Raises:
        ConfigError: the storage is no SQLite file, the installed packages cannot keep a study in one, or the study is
            of another direction.
        OutputError: the folder of the file cannot be written.
    """
    storage = sweeper.get("storage")
    if storage is None:
        return None
    path = _database(storage, sweeper)
    if sweeper.get("study_name") is None:
        sweeper.study_name = name
    lock = Lock(path.with_name(f"{path.name}.attempts") / quote(sweeper.study_name, safe=""))
    attempt = lock.wait(f"The study {sweeper.study_name} in {path}")
    try:
        _go_on(sweeper, path)
    except BaseException:
        attempt.end("failed")
        raise
    return attempt


def _database(storage: Any, sweeper: DictConfig) -> Path:
    """The file of a storage that can be served."""
    served = _URL.fullmatch(storage) if isinstance(storage, str) else None
    if served is None:
        raise ConfigError(
            f"hydra.sweeper.storage is sqlite:///FILE, no other database is served, got {storage!r}; without a storage "
            "a search goes on from its records"
        )
    if distributed.launched():
        raise ConfigError("hydra.sweeper.storage is for one process that searches; start it without a launcher")
    if str(sweeper.sampler.get("_target_", "")).endswith("GridSampler"):
        raise ConfigError(
            "a grid search needs no hydra.sweeper.storage: without it the same command finds what it has done"
        )
    import optuna
    import sqlalchemy

    if optuna.__version__.startswith("2.") and not sqlalchemy.__version__.startswith("1."):
        raise ConfigError(
            f"hydra.sweeper.storage needs SQLAlchemy 1.4, for which optuna {optuna.__version__} is written, but "
            f"{sqlalchemy.__version__} is installed: pip install 'sqlalchemy<2' 'alembic<1.17'"
        )
    return Path(served[1])


def _go_on(sweeper: DictConfig, path: Path) -> None:
    import optuna
    from optuna.trial import TrialState

    with _quiet():
        try:
            # The sweeper itself opens it by the same words.
            study = optuna.create_study(
                study_name=sweeper.study_name, storage=sweeper.storage, directions=_directions(sweeper, path)
            )
        except optuna.exceptions.DuplicatedStudyError:
            study = optuna.load_study(study_name=sweeper.study_name, storage=sweeper.storage)
        trials = study.get_trials(deepcopy=False)
        for trial in trials:
            if trial.state == TrialState.RUNNING:
                study.tell(trial.number, state=TrialState.FAIL)
        settled = {_key(trial.params) for trial in trials if trial.state == TrialState.COMPLETE}
        settled |= {_key(trial.system_attrs["fixed_params"]) for trial in trials if trial.state == TrialState.WAITING}
        for trial in trials:
            key = _key(trial.params)
            if trial.state in (TrialState.RUNNING, TrialState.FAIL) and key not in settled:
                study.enqueue_trial(trial.params)
                settled.add(key)
    complete = sum(trial.state == TrialState.COMPLETE for trial in trials)
    sweeper.n_trials = max(0, sweeper.n_trials - complete)
    if sweeper.sampler.get("seed") is not None:
        sweeper.sampler.seed += len(trials)


def _directions(sweeper: DictConfig, path: Path) -> Sequence[str]:
    """The directions that are asked for, which must be those of the study if there is one."""
    import optuna

    direction = sweeper.direction
    wanted = [direction] if isinstance(direction, str) or not isinstance(direction, Sequence) else list(direction)
    wanted = [getattr(one, "name", one) for one in wanted]
    try:
        studies = optuna.get_all_study_summaries(sweeper.storage)
    except Exception as error:
        # What is no database, one of another version or one that cannot be opened ends in errors of three libraries.
        raise ConfigError(
            f"the studies in {path} cannot be read ({first_line(error.__cause__ or error)}); name another file as "
            "hydra.sweeper.storage"
        ) from error
    for study in studies:
        found = [one.name.lower() for one in study.directions]
        if study.study_name == sweeper.study_name and found != wanted:
            raise ConfigError(
                f"the study {study.study_name} in {path} is one to {' and '.join(found)}, not to "
                f"{' and '.join(wanted)}; give another hydra.sweeper.study_name"
            )
    return wanted


def _key(params: dict[str, Any]) -> str:
    return json.dumps(params, sort_keys=True, default=str)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's lines on studies, of which the sweeper prints its own, and on what it calls experimental."""
    import optuna

    shown = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(shown)


def silence_sqlalchemy() -> None:
    """SQLAlchemy 1.4 announces its successor when Optuna is loaded, which needs 1.4."""
    os.environ.setdefault("SQLALCHEMY_SILENCE_UBER_WARNING", "1")
