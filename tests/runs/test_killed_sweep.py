"""The issue's own sweep, in miniature: killed at random moments and launched again until it is done."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from entreg.cli import CONFIGS
from entreg.records.store import RecordStore
from entreg.runs.directory import RunDirectory
from tests.experiments.vision.test_runs import TINY
from tests.faults.processes import run_program
from tests.runs.small_project import wait_until

COMMAND = [
    *("-m", "experiment=vit/cluttered_mnist", "regularizer=key_entropy,row_entropy,none", "seed=0,1"),
    *TINY,
    *("trainer.steps=6", "trainer.checkpoint_every=1", "profile.vision.step_scale=1.0", "evaluation.localisation=null"),
    *("tracker=none", "launcher=joblib", "hydra.launcher.n_jobs=2"),
]


def start(folder):
    command = [sys.executable, str(CONFIGS.parent / "scripts" / "train.py"), *COMMAND]
    log = (folder / "launcher.txt").open("a")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment, start_new_session=True)


@pytest.mark.slow
def test_a_sweep_killed_twice_ends_with_each_of_its_runs_once(tmp_path):
    store = tmp_path / "outputs" / "runs"
    moments = random.Random(0)
    finished = {}
    for least in (1, 3):
        launcher = start(tmp_path)
        wait_until(lambda l=launcher, n=least: l.poll() is not None or len(list(store.glob("*.json"))) >= n, 400)
        assert launcher.poll() is None, (tmp_path / "launcher.txt").read_text()
        # Short of the time that the other runs take, a few tenths of a second each.
        time.sleep(moments.random() * 0.4)
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
        for path, time_and_file in finished.items():
            assert (path.stat().st_mtime_ns, path.stat().st_ino) == time_and_file
        finished = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in store.glob("*.json")}
    assert len(finished) < 6
    launcher = start(tmp_path)
    assert launcher.wait(400) == 0, (tmp_path / "launcher.txt").read_text()
    for path, time_and_file in finished.items():
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == time_and_file
    # Every record is checked as it is read: schema, checksum, identifier, name.
    records = RecordStore(store).load_all()
    assert sorted((one["config"]["method"], one["seed"]) for one in records) == [
        (method, seed) for method in ("key_entropy", "none", "row_entropy") for seed in range(2)
    ]
    assert all(one["metrics"]["training_steps"] == 6 for one in records)
    directories = [RunDirectory.of(store, one["experiment"], one["config"]) for one in records]
    assert len(list(store.glob("vit-cluttered_mnist-*"))) == 6
    outcomes = []
    for directory in directories:
        assert (directory.path / "DONE").exists()
        *killed, last = [attempt["outcome"] for attempt in directory.lock.history()]
        # Whoever was killed after saving the record left nothing to do; nobody did a run twice.
        assert last in ("done", "died")
        assert set(killed) <= {"died"}
        outcomes += killed
    # Two processes at a time were killed twice.
    assert len(outcomes) <= 4
    assert "6 runs: 6 done" in (tmp_path / "launcher.txt").read_text()
    status = run_program(CONFIGS.parent / "scripts" / "status.py", folder=tmp_path)
    assert "6 runs: 6 done" in status.stdout
    assert "best so far: dense_accuracy" in status.stdout
    assert status.stdout.count(" done ") >= 6
