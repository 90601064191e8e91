"""Kill -9 at twenty random moments of a training, an evaluation and a building of tables."""

import json

import hydra
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from entreg.cli import CONFIGS
from entreg.data.assets import ASSETS, cached_path
from entreg.data.digits import load_digits
from entreg.records import REFERENCE_ROOT, RecordStore
from entreg.training.checkpoints import latest_checkpoint, read_checkpoint
from tests.experiments.vision.test_runs import DIGITS
from tests.faults import victims
from tests.faults.catalogue import Fault
from tests.faults.processes import killed_at_random_moments

TITLE = "Killed (power cut, `kill -9`, out of memory, end of a Slurm allocation)"
KILLS = 20


def training(folder):
    def check(directory):
        # What is there under its name is whole, always; and an older checkpoint goes only after a newer one is there.
        found = sorted((directory / "checkpoints").glob("step-*"))
        steps = [read_checkpoint(path).step for path in found]
        lines = (directory / "metrics.jsonl").read_text().splitlines() if steps else []
        rows = [json.loads(line)["step"] for line in lines[: max(steps, default=0)]]
        assert rows == list(range(1, len(rows) + 1))
        assert len(rows) >= max(steps, default=0)

    killed_at_random_moments(folder, victims.train, kills=KILLS, check=check, seed=1)
    whole, halves = (latest_checkpoint(folder / name / "checkpoints") for name in ("whole", "halves"))
    assert whole.step == halves.step == victims.TRAINING["steps"]
    for name in whole.model:
        assert torch.equal(whole.model[name], halves.model[name])
        assert torch.equal(whole.averaged[name], halves.averaged[name])
    assert str(whole.state["optimizer"]) == str(halves.state["optimizer"])
    first, second = (
        [json.loads(line) | {"seconds": 0} for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "halves")
    )
    assert first == second
    assert not list((folder / "halves" / "checkpoints").glob(".*.tmp"))


def evaluation(folder):
    load_digits("train")
    (folder / "assets.json").write_text(json.dumps([str(cached_path(name).parents[1]) for name in ASSETS]))
    without_training = ["base.trainer.steps=0", "trainer.steps=0", "method=plain", "force=true"]
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = OmegaConf.to_container(hydra.compose("vision", [*DIGITS, *without_training]), resolve=True)
    (folder / "config.json").write_text(json.dumps(config))

    def check(directory):
        assert len(RecordStore(directory / "runs").load_all()) <= 1
        for path in (directory / "cache").glob("corrupted/*/*.npy"):
            assert np.load(path).dtype == np.uint8

    killed_at_random_moments(folder, victims.evaluate, kills=KILLS, check=check, seed=2)
    (whole,), (halves,) = (RecordStore(folder / name / "runs").load_all() for name in ("whole", "halves"))
    assert whole["rows"] == halves["rows"]
    assert whole["rows"]


def tables(folder):
    (folder / "runs").mkdir()
    chosen = [path for path in REFERENCE_ROOT.glob("*.json") if path.name.startswith("benchmark__entropy_law")]
    assert chosen
    for path in chosen:
        (folder / "runs" / path.name).write_bytes(path.read_bytes())

    def files(name):
        # What a killed process was writing begins with a dot.
        found = (path for path in (folder / name).glob("*/*") if not path.name.startswith("."))
        return {path.relative_to(folder / name): path.read_bytes() for path in found}

    def check(directory):
        whole = files("whole")
        assert all(whole[path] == content for path, content in files(directory.name).items())

    killed_at_random_moments(folder, victims.build, kills=KILLS, check=check, seed=3)
    assert files("whole") == files("halves")
    assert len(files("whole")) >= 6


FAULTS = (
    Fault(
        "a training is killed at 20 random moments",
        None,
        "the same command goes on from the newest checkpoint; weights, optimiser and log end as without the kills, "
        "to the bit on a CPU",
        training,
    ),
    Fault(
        "an evaluation is killed at 20 random moments",
        None,
        "a record is there whole or not at all, as are kept corrupted images; the same command goes on behind the last "
        "finished measure and ends with the same numbers",
        evaluation,
    ),
    Fault(
        "a building of tables and figures is killed at 20 random moments",
        None,
        "every file is the old or the new one; the same command ends with the same files",
        tables,
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_kill(fault, memory_folder):
    fault.inject(memory_folder)
