"""Sweeps of a script whose runs only take time: failures, relaunches, two launchers, kills, searches, launchers."""

import os
import signal

import pytest

from entreg.errors import InputError
from entreg.records.store import RecordStore
from entreg.runs.directory import RunDirectory
from entreg.runs.sweep import Sweep
from tests.runs.small_project import Project, wait_until


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def directories(project):
    return [RunDirectory(path) for path in sorted((project.folder / "runs").glob("tests-sweep-*"))]


def the_sweep(project):
    (path,) = (project.folder / "runs" / "sweeps").glob("*/sweep.json")
    return Sweep(path.parent)


def states(project, monkeypatch):
    monkeypatch.chdir(project.folder)
    return {run.job[-1]: run.state for run in the_sweep(project).runs()}


def test_failures_stop_nothing_and_are_all_that_is_run_again(project, monkeypatch):
    command = ["-m", "defects=[3]", "refused=[1]", "number=0,1,2,3"]
    status, out, err = project.run(*command)
    # A defect among the failures is told from what a user can act on by the status.
    assert status == 1
    assert project.traces("begin") == [0, 1, 2, 3]
    assert project.traces("end") == [0, 2]
    *_, count, last = err.splitlines()
    assert last == "Error: 1 is not a good number."
    assert "4 runs: 2 done, 2 failed." in count
    failed = {one.failure(): one for one in directories(project) if one.failure() is not None}
    assert set(failed) == {"1 is not a good number.", "defect: ZeroDivisionError: division by zero"}
    for sentence, directory in failed.items():
        log = directory.log.read_text()
        assert "Traceback (most recent call last):" in log
        assert sentence.removeprefix("defect: ") in log
        # The last lines name the log.
        assert f"see runs/{directory.path.name}/log.txt" in err
        assert not (directory.path / "DONE").exists()
    assert "working on 1" in failed["1 is not a good number."].log.read_text()
    # No traceback on the terminal.
    assert "Traceback" not in err
    assert states(project, monkeypatch) == {
        "number=0": "done",
        "number=1": "failed",
        "number=2": "done",
        "number=3": "failed",
    }
    before = {path: path.stat().st_mtime_ns for path in project.records()}
    assert len(before) == 2
    (project.folder / "mended").write_text("")
    # The order of the arguments does not make another sweep.
    status, out, err = project.run("-m", "number=0,1,2,3", "refused=[1]", "defects=[3]")
    assert (status, project.traces("begin")) == (0, [0, 1, 2, 3, 1, 3])
    assert "4 runs: 4 done" in out
    assert len(RecordStore(project.folder / "runs").load_all()) == 4
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert set(states(project, monkeypatch).values()) == {"done"}
    assert all((one.path / "DONE").exists() and one.failure() is None for one in directories(project))
    # What is recorded as the command is the run's own.
    commands = {record["command"] for record in RecordStore(project.folder / "runs").load_all()}
    assert "python script.py number=1 'refused=[1]' 'defects=[3]'" in commands


def test_a_job_that_fails_before_its_run_is_told_too(project):
    status, _, err = project.run("-m", "number=impossible,1")
    assert status == 2
    assert project.traces("end") == [1]
    assert err.splitlines()[-1] == "Error: a number is wanted."
    (line,) = [line for line in err.splitlines() if line.startswith("  see ")]
    assert "Traceback" in (project.folder / line.split()[1]).read_text()
    assert "2 runs: 1 done, 1 failed" in err


def test_a_plain_call_with_several_runs_does_all_it_can(project, monkeypatch):
    status, _, err = project.run("numbers=[0,1,2]", "refused=[1]")
    assert status == 2
    assert project.traces("end") == [0, 2]
    assert err.splitlines()[-1] == "Error: 1 is not a good number."
    monkeypatch.chdir(project.folder)
    assert [(run.label, run.state) for run in the_sweep(project).runs()] == [
        ("tests/sweep number 0", "done"),
        ("tests/sweep number 1", "failed"),
        ("tests/sweep number 2", "done"),
    ]


def test_a_reason_is_said_once(project):
    status, _, err = project.run("numbers=[0,1,2]", "defects=[0,2]")
    assert status == 1
    assert [line.partition(": ")[2] for line in err.splitlines() if line.startswith("Failed")] == [
        "tests/sweep number 0: defect: ZeroDivisionError: division by zero",
        "tests/sweep number 2: for the same reason",
    ]


@pytest.mark.slow
def test_two_launchers_run_no_job_twice(project):
    command = ["-m", "seconds=0.4", "number=range(12)"]
    launchers = [project.start(*command) for _ in range(2)]
    results = [launcher.communicate(timeout=300) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], results
    assert sorted(project.traces("begin")) == sorted(project.traces("end")) == list(range(12))
    assert len(RecordStore(project.folder / "runs").load_all()) == 12
    for out, _ in results:
        assert "12 runs: 12 done" in out
    assert all(len(one.lock.history()) == 1 for one in directories(project))


@pytest.mark.slow
def test_what_a_killed_launcher_was_at_is_taken_over_by_the_other(project):
    command = ["-m", "seconds=2", "number=0,1,2,3"]
    first = project.start(*command)
    wait_until(lambda: project.traces("begin") == [0])
    second = project.start(*command)
    wait_until(lambda: len(project.traces("begin")) >= 2)

    def is_at_a_run():
        attempts = [attempt for one in directories(project) for attempt in one.lock.history()]
        return any(attempt["pid"] == first.pid and attempt["outcome"] is None for attempt in attempts)

    wait_until(is_at_a_run)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0, err
    assert "4 runs: 4 done" in out
    assert sorted(project.traces("end")) == [0, 1, 2, 3]
    outcomes = [[attempt["outcome"] for attempt in one.lock.history()] for one in directories(project)]
    assert sorted(outcomes, key=len) == [["done"], ["done"], ["done"], ["died", "done"]]
    taken = next(one for one in directories(project) if len(one.lock.history()) == 2)
    assert "Taken over from process" in taken.log.read_text()


@pytest.mark.slow
def test_a_search_goes_on_where_it_was_killed_without_a_database(project, monkeypatch):
    command = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.sampler.seed=0", "hydra.sweeper.n_jobs=1", "seconds=0.3"]
    command += ["number=range(-20,20)", "hydra.sweeper.max_failure_rate=1.0"]
    search = project.start(*command, "hydra.sweeper.n_trials=6")
    wait_until(lambda: len(project.traces("begin")) == 3)
    os.killpg(search.pid, signal.SIGKILL)
    search.communicate()
    status, out, err = project.run(*command, "hydra.sweeper.n_trials=6")
    assert status == 0, err
    begun, ended = project.traces("begin"), project.traces("end")
    # The trial that was killed was proposed again and run again, the two before it were found.
    assert len(begun) == len(set(begun)) + 1
    assert len(ended) == len(set(ended)) == len(project.records()) <= 6
    monkeypatch.chdir(project.folder)
    sweep = the_sweep(project)
    assert f"Best value: {float(min(number**2 for number in ended))}" in out
    assert {run.state for run in sweep.runs()} == {"done"}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_launchers_are_choices_of_the_configuration(project, launcher):
    status, _, err = project.run("-m", f"launcher={launcher}", "number=0,1,2", "refused=[1]")
    assert status == 2, err
    assert sorted(project.traces("begin")) == [0, 1, 2]
    assert sorted(project.traces("end")) == [0, 2]
    assert err.splitlines()[-1] == "Error: 1 is not a good number."
    # Jobs that another launcher has done are found.
    (project.folder / "mended").write_text("")
    status, _, err = project.run("-m", "number=0,1,2", "refused=[1]")
    assert status == 0, err
    assert project.traces("begin")[3:] == [1]
    assert {record["command"] for record in RecordStore(project.folder / "runs").load_all()} == {
        f"python script.py number={number} 'refused=[1]'" for number in range(3)
    }


@pytest.mark.slow
def test_slurm_gets_an_array_with_the_resources_of_the_configuration(project):
    project.pretend_slurm()
    command = ["-m", "launcher=submitit_slurm", "hydra.launcher.partition=gpu", "hydra.launcher.array_parallelism=2"]
    status, _, err = project.run(*command, "number=0,1,2", "refused=[1]")
    assert status == 2, err
    assert sorted(project.traces("begin")) == [0, 1, 2]
    assert sorted(project.traces("end")) == [0, 2]
    assert err.splitlines()[-1] == "Error: 1 is not a good number."
    submitted = (project.folder / "submitted.sh").read_text()
    for option in ("array=0-2%2", "partition=gpu", "gpus-per-node=1", "cpus-per-task=12", "mem=64GB", "time=720"):
        assert f"#SBATCH --{option}\n" in submitted
    assert set(project.folder.glob("runs/sweeps/*/submitit/*"))


def test_a_run_that_another_process_is_at_is_waited_for(project):
    config = {"seconds": 0.0, "refused": [], "defects": [], "number": 3}
    attempt = RunDirectory.of(project.folder / "runs", "tests/sweep", config).lock.acquire()
    process = project.start("number=3")
    said = process.stderr.readline()
    assert said.startswith(f"tests/sweep number 3 is in the hands of process {os.getpid()} on ")
    assert project.traces("begin") == []
    attempt.end("failed")
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert project.traces("end") == [3]


def test_what_fails_in_the_hands_of_another_process_is_not_tried_again(project):
    config = {"seconds": 0.0, "refused": [], "defects": [], "number": 3}
    directory = RunDirectory.of(project.folder / "runs", "tests/sweep", config)
    attempt = directory.lock.acquire()
    process = project.start("number=3")
    assert "is in the hands of process" in process.stderr.readline()
    with pytest.raises(InputError), directory.attempting(attempt, config, "x"):
        raise InputError("3 is no good.")
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert err.startswith("Error: 3 is no good. (in another process, see ")
    assert project.traces("begin") == []
    # Whoever is launched later tries.
    assert project.run("number=3")[0] == 0
