"""Jobs for Slurm: what each node runs, and a job on this machine through submitit's local executor."""

import sys

import pytest
from omegaconf import OmegaConf

from entreg.cli import CONFIGS
from entreg.errors import ConfigError, ProcessError
from entreg.runs.slurm import TorchrunJob, submit
from tests.distributed.launch import launch, sentences


def settings(**changed):
    return {**OmegaConf.to_container(OmegaConf.load(CONFIGS / "accelerate" / "slurm.yaml")), **changed}


def test_nodes_meet_at_the_first_one():
    job = TorchrunJob(("scripts/train.py", "seed=1"), 8)
    words = job.command(["n1", "n2", "n3"], "4711_2")
    assert words[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert words[3:5] == ["--nnodes=3", "--nproc-per-node=8"]
    assert words[5:8] == ["--rdzv-backend=c10d", "--rdzv-endpoint=n1:27112", "--rdzv-id=4711_2"]
    assert words[8:] == ["scripts/train.py", "seed=1"]
    assert "--standalone" in job.command(["n1"], "4711")
    # What is queued again after a time limit is the same.
    assert job.checkpoint().function == job


@pytest.mark.parametrize(
    ("changed", "words", "message"),
    [
        ({}, ["scripts/train.py"], "there is no Slurm on this machine"),
        ({"cluster": "local"}, ["scripts/trian.py"], "there is no script 'scripts/trian.py'"),
        ({"cluster": "local"}, [], "there is no script ''"),
        ({"cluster": "local", "nodes": 0}, ["scripts/train.py"], "at least one node and minute"),
    ],
)
def test_impossible_jobs_are_one_sentence(changed, words, message, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=message):
        submit(settings(**changed), words)


def test_unknown_settings_are_one_sentence():
    done = launch("scripts/submit.py", "node=2", "--", "scripts/train.py", launcher=())
    assert done.returncode == 2
    assert sentences(done)[0].startswith("Error: node=2 is not key=value of slurm.yaml; there are account, cluster")


@pytest.mark.slow
def test_a_job_runs_in_two_processes_on_this_machine(tmp_path, monkeypatch):
    chosen = settings(cluster="local", gpus_per_node=0, folder=str(tmp_path))
    job = submit(chosen, ["tests/distributed/hello.py"])
    assert sorted(line for line in job.stdout().splitlines() if line.startswith("process")) == [
        "process 0 of 2",
        "process 1 of 2",
    ]
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(ProcessError, match=r"hello.py failed; see .*err"):
        submit(chosen, ["tests/distributed/hello.py"])
