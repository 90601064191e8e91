"""What is done to be disturbed: a training, an evaluation, a building of tables, each as small as it can be.

Everything they need is imported here, once, in the server that their processes are forked from.
"""

import json
import os
from pathlib import Path

import timm.optim
import timm.scheduler
import timm.utils  # noqa: F401

import entreg.experiments.geometry.experiment
import entreg.experiments.geometry.printout
import entreg.experiments.language.experiment
import entreg.experiments.language.printout
import entreg.experiments.vision.printout  # noqa: F401
from entreg.experiments.studies import run_all
from entreg.experiments.vision.experiment import plan_run
from entreg.records import RecordStore, registry
from entreg.records.build import build_all
from entreg.training.checkpoints import save_checkpoint
from tests.training import tiny

registry.discover()

TRAINING = {"steps": 24, "checkpoint_every": 2, "log_every": 1, "ema_decay": 0.9}


def train(directory):
    """A few steps, half of them with a checkpoint."""
    tiny.run(directory, TRAINING, data="NoisyDigits", augment=True)


def train_as(directory, place):
    """The same, as one of several processes."""
    train(directory)


def evaluate(directory):
    """One record of an untrained model on clean and corrupted digits; its configuration is in a file beside."""
    directory.mkdir(exist_ok=True)
    # The images that are corrupted and kept are part of what a kill can spoil.
    os.environ["ENTREG_CACHE"] = str(directory / "cache")
    link_assets(directory / "cache", json.loads((directory.parent / "assets.json").read_text()))
    config = json.loads((directory.parent / "config.json").read_text())
    run_all(
        [plan_run({**config, "checkpoints": str(directory / "checkpoints")})], store=directory / "runs", command="x"
    )


def link_assets(cache, folders):
    """Give a new cache the packaged data that another one holds."""
    cache.mkdir(parents=True, exist_ok=True)
    for folder in map(Path, folders):
        if folder.exists() and not (cache / folder.name).exists():
            (cache / folder.name).symlink_to(folder)


def build(directory):
    """Tables and figures of the records in a folder beside."""
    build_all(RecordStore(directory.parent / "runs").load_all(), directory)


def save_record(store, record, times, place):
    """The same record, again and again; its seconds are the process's own."""
    for number in range(times):
        RecordStore(store).save({**record, "wall_seconds": place + number / 1000})


def save_checkpoints(root, model, steps, keep, place):
    """Checkpoints of the same steps, as another process writes them."""
    for step in steps:
        save_checkpoint(root, step, model, {"writer": place}, keep=keep)
