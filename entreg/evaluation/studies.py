"""What the studies of all families of models share: which runs they are, and running those that have no record yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from entreg import distributed
from entreg.atomic import require_writable
from entreg.errors import ConfigError
from entreg.records.store import RecordStore

NOT_RECORDED = ("store", "checkpoints", "resume", "force", "study", "profile")
"""Keys of an entry configuration that do not decide a run's result."""


class Run(Protocol):
    """One run of a study, planned and checked.

    Attributes:
        config: everything that decides its result; the record's own.
        experiment: name in the records.
    """

    config: Mapping[str, Any]

    @property
    def experiment(self) -> str: ...

    def make_record(self, command: str) -> dict[str, Any]:
        """Do the run."""
        ...


def study_configs(config: DictConfig, overrides: Sequence[str], entry: str = "train") -> list[dict[str, Any]]:
    """The resolved configuration of every method and seed of a study, seeds outermost.

    Each is composed anew with the same overrides, the method's own and the seed, so that a study is nothing but many
    single runs. Hydra must be initialised.

    Args:
        config: composed from an entry configuration with an experiment that has ``study.methods``.
        overrides: those it was composed with.
        entry: name of the entry configuration.

    Raises:
        ConfigError: the experiment has no methods.
    """
    methods = OmegaConf.to_container(config.study.methods, resolve=True)
    allowed = config.profile.get("methods")
    names = [name for name in methods if allowed is None or name in allowed] or list(methods)[:1]
    if not names:
        raise ConfigError(f"experiment {config.name} has no study.methods; run it with scripts/train.py")
    seeds = config.profile.seeds if config.study.seeds is None else config.study.seeds
    composed = [
        hydra.compose(entry, [*overrides, *methods[name], f"method={name}", f"seed={seed}"])
        for seed in seeds
        for name in names
    ]
    return [OmegaConf.to_container(one, resolve=True) for one in composed]


def run_all(runs: Sequence[Run], *, store: str | Path, command: str, force: bool = False) -> list[dict[str, Any]]:
    """Run what has no record yet and save each record as soon as it is there.

    Several processes of a launcher share each run; the first one reads and writes the records.

    Args:
        runs: planned runs.
        store: folder of the records.
        command: what to type to repeat the runs.
        force: run again what has a record already.

    Returns:
        The records in the order of ``runs``, old ones included.

    Raises:
        OutputError: a record or checkpoint cannot be written.
    """
    records = RecordStore(store)
    result = []
    with distributed.joined(runs[0].config.get("device", "cpu") if runs else "cpu"):
        distributed.from_first(lambda: require_writable(store))
        for number, run in enumerate(runs, 1):
            record = distributed.from_first(lambda run=run: None if force else records.find(run.experiment, run.config))
            if record is None:
                print(f"run {number} of {len(runs)}: {run.experiment} {run.config['method']} seed {run.config['seed']}")
                record = run.make_record(command)
                if distributed.is_first():
                    records.save(record)
            result.append(record)
    return result


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
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda, got '{name}'")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no CUDA device")
    return name


def last_step(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The ``last_step`` of a record's metrics: the newest row of the training log, if there is one."""
    return {"last_step": dict(history[-1])} if history else {}
