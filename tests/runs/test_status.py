import contextlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from entreg.cli import CONFIGS
from entreg.errors import BusyError, RecordError
from entreg.progress import duration
from entreg.records.record import new_record
from entreg.records.store import RecordStore
from entreg.runs import status
from entreg.runs.directory import RunDirectory
from entreg.runs.status import conclude, counted, run_names, status_table, time_left
from entreg.runs.sweep import RunStatus, Sweep
from tests.faults.processes import run_program

ACCURACY = {"name": "accuracy", "value": "accuracy", "where": None, "direction": "maximize"}
COMMAND = "python scripts/train.py -m method=a,b,c seed=0"


def record(method, accuracy, seconds=60.0):
    return new_record(
        experiment="tests/status",
        scale="smoke",
        config={"method": method},
        command="x",
        dataset={"name": "none"},
        seed=0,
        repeats=1,
        metrics={"accuracy": accuracy},
        rows=[],
        wall_seconds=seconds,
    )


def planned(sweep, store, method):
    """A job with one run, as a script begins it; its directory."""
    job, directory = (
        sweep.job(["seed=0", f"method={method}"]),
        RunDirectory.of(store, "tests/status", {"method": method}),
    )
    job.plan([("the run", directory.path, RecordStore(store).path_for("tests/status", {"method": method}))])
    return directory


def begin(sweep, method, error):
    """A job whose run ends before it begins."""
    with contextlib.suppress(type(error)), sweep.job(["seed=0", f"method={method}"]).attempting("x"):
        planned(sweep, sweep.directory.parents[1], method)
        raise error


@pytest.fixture
def sweep(tmp_path):
    """Six jobs: two done, one failed, one running, one killed, one not begun."""
    store = tmp_path / "runs"
    sweep = Sweep(store / "sweeps" / "mine")
    sweep.begin(COMMAND, jobs=[["seed=0", f"method={name}"] for name in "abcdef"], objective=ACCURACY)
    for method, accuracy in (("a", 0.25), ("b", 0.75)):
        directory = planned(sweep, store, method)
        with directory.attempting(directory.lock.acquire(), {"method": method}, "x"):
            directory.mark_done(RecordStore(store).save(record(method, accuracy)))
    directory = planned(sweep, store, "c")
    with pytest.raises(ValueError, match="broken"), directory.attempting(directory.lock.acquire(), {}, "x"):
        raise ValueError("broken")
    planned(sweep, store, "d").lock.acquire()
    directory = planned(sweep, store, "e")
    code = f"from entreg.runs.lock import Lock; import os; Lock({str(directory.lock.folder)!r}).acquire(); os._exit(9)"
    subprocess.run([sys.executable, "-c", code], cwd=CONFIGS.parent, check=False)
    return sweep


def test_every_state_is_told(sweep):
    runs = sweep.runs()
    assert [run.state for run in runs] == ["done", "done", "failed", "running", "interrupted", "queued"]
    assert counted(runs) == "6 runs: 2 done, 1 running, 1 failed, 1 interrupted, 1 queued"
    assert run_names(runs) == [f"method={name}" for name in "abcdef"]
    # One at a time, 60 s each: two to come and half of the one that is running.
    assert time_left(runs) == pytest.approx(150)
    text = status_table(sweep, runs)
    lines = text.splitlines()
    assert lines[0] == f"Sweep {sweep.directory}: {COMMAND}"
    assert "best so far: accuracy 0.750: method=b" in lines
    assert any(line.startswith("time left: about 2 min") for line in lines)
    assert [line.split() for line in lines if line.startswith("method=b")] == [
        ["method=b", "done", "1", "60", "s", "0.750"]
    ]
    assert "failed: method=c: defect: ValueError: broken" in text
    log = next(line.removeprefix("  see ") for line in lines if line.startswith("  see "))
    assert "ValueError: broken" in Path(log).read_text()


def test_the_last_lines_say_how_many_failed_and_where_to_look(sweep, capsys):
    assert conclude(sweep) == 1
    out, err = capsys.readouterr()
    assert out == ""
    *_, count, last = err.splitlines()
    assert "6 runs: 2 done, 1 running, 1 failed" in count
    assert str(sweep.directory) in count
    assert last == "Error: defect: ValueError: broken"
    assert "log.txt" in err
    assert sweep.content()["ended"] is not None


def test_a_launcher_that_stops_is_told(tmp_path, capsys):
    sweep = Sweep(tmp_path / "sweep")
    sweep.begin(COMMAND, jobs=[["seed=0"], ["seed=1"]])
    assert conclude(sweep, stopped=RuntimeError("no such partition\nmore")) == 2
    err = capsys.readouterr().err
    assert "2 runs: 2 queued" in err
    assert err.splitlines()[-1] == "Error: the launcher stopped: RuntimeError: no such partition"


def test_a_damaged_record_is_a_failure(sweep):
    path = next(iter(sweep.directory.parents[1].glob("*.json")))
    path.write_text(path.read_text()[:-20])
    (run,) = [run for run in sweep.runs() if run.failure is not None and "truncated" in run.failure]
    assert run.state == "failed"


def test_a_search_has_trials_to_come(tmp_path):
    sweep = Sweep(tmp_path / "sweep")
    sweep.begin(COMMAND, jobs=None, trials=3)
    with sweep.job(["x=1"]).attempting("x"):
        pass
    assert [run.state for run in sweep.runs()] == ["done", "queued", "queued"]
    assert run_names(sweep.runs())[1] == "(to be chosen)"
    sweep.end()
    assert [run.state for run in sweep.runs()] == ["done"]


def test_names_hold_what_differs():
    runs = [
        RunStatus(("seed=0", "method=a"), "", "queued"),
        RunStatus(("seed=0", "method=b"), "first", "queued"),
        RunStatus(("seed=0", "method=b"), "second", "queued"),
    ]
    assert run_names(runs) == ["method=a", "method=b first", "method=b second"]
    assert run_names([RunStatus(("seed=0",), "", "queued")]) == ["seed=0"]


@pytest.mark.parametrize(("seconds", "text"), [(41.2, "41 s"), (150, "2 min"), (9000, "2.5 h")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_waiting_for_others_ends_when_they_do(sweep, monkeypatch, capsys):
    monkeypatch.setattr(status, "_POLL", 0.05)
    (running,) = [run for run in sweep.runs() if run.state == "running"]
    attempts = running.log or RunDirectory.of(sweep.directory.parents[1], "tests/status", {"method": "d"}).lock
    told = []

    def sleep(seconds):
        told.append(seconds)
        path = sorted(attempts.folder.glob("*.json"))[-1]
        path.write_text(path.read_text().replace('"outcome": null', '"outcome": "failed"'))

    monkeypatch.setattr(time, "sleep", sleep)
    # One was killed and one not begun: there is something left to do.
    assert status.wait_for_others(sweep)
    assert told == [0.05]
    assert "Waiting for another launcher: 6 runs: 2 done, 1 running" in capsys.readouterr().err
    # Nothing runs elsewhere: what is left is left by this launcher.
    assert not status.wait_for_others(sweep)
    # Another launcher was at one of them, and was killed before this one got here.
    begin(sweep, "e", BusyError("Another process is at it."))
    assert status.wait_for_others(sweep)
    begin(sweep, "e", KeyboardInterrupt())
    assert not status.wait_for_others(sweep)


def script(*arguments):
    return run_program("scripts/status.py", *arguments)


def test_the_script_shows_the_newest_sweep(sweep, tmp_path):
    done = script("--store", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == status_table(sweep, sweep.runs()).strip()
    # Not a terminal: no signs that only a terminal understands.
    assert "\033" not in done.stdout


def test_without_a_sweep_the_script_says_so(tmp_path):
    done = script("--store", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: There is no sweep in ")
    with pytest.raises(RecordError, match="There is no sweep"):
        Sweep(tmp_path).runs()


def test_watching_ends_with_the_sweep(tmp_path):
    sweep = Sweep(tmp_path / "sweeps" / "mine")
    sweep.begin(COMMAND, jobs=[["x=1"]])
    command = [sys.executable, str(CONFIGS.parent / "scripts" / "status.py"), "--watch", "--every", "0.05"]
    with subprocess.Popen([*command, str(sweep.directory)], stdout=subprocess.PIPE, text=True) as watching:
        first = watching.stdout.readline()
        assert first.startswith("Sweep ")
        with sweep.job(["x=1"]).attempting("x"):
            pass
        rest = watching.stdout.read()
    assert watching.returncode == 0
    assert "1 run: 1 queued" in rest
    assert "1 run: 1 done" in rest
