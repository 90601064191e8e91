"""What wandb's files and a server hold after runs that end well, fail, are killed, resumed, or find nobody there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from entreg.records.environment import git_state
from entreg.tracking import wandb_backend
from tests.tracking import wandb_files
from tests.tracking.runs import RUN, tracked_training
from tests.tracking.server import KEY, FakeServer

OFFLINE = {"kind": "wandb", "mode": "offline"}
ONLINE = {"kind": "wandb", "mode": "online"}


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    """The rows of the same run without a tracker or an interruption, but for their times."""
    return without_times(tracked_training(tmp_path_factory.mktemp("plain"), {"kind": "none"}).history)


def without_times(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def tracked_rows(folder):
    return without_times([{"step": step, **row} for step, row in wandb_files.history(folder / "outputs")])


def in_process(folder, tracker, **arguments):
    text = json.dumps({"folder": str(folder), "tracker": tracker, **arguments})
    command = [sys.executable, "-m", "tests.tracking.runs", text]
    root = Path(__file__).parents[2]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)


def test_files_hold_the_history_and_what_was_run(tmp_path, monkeypatch, capfd):
    started, init = [], wandb_backend.wandb.init
    monkeypatch.setattr(wandb_backend.wandb, "init", lambda **options: started.append(init(**options)) or started[-1])
    with FakeServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        result = tracked_training(tmp_path, OFFLINE)
    assert server.requests == []
    (path,) = wandb_files.parts(tmp_path / "outputs")
    assert path.parent.name.startswith("offline-run-")
    steps = wandb_files.history(tmp_path / "outputs")
    assert [{"step": step, **row} for step, row in steps] == result.history
    (run,) = wandb_files.only(path, "run")
    assert (run.run_id, run.run_group, run.project, run.display_name) == (RUN, "tests/tiny", "entreg", "tiny")
    config = {one.key: json.loads(one.value_json) for one in run.config.update}
    assert (config["method"], config["trainer"], config["experiment"]) == ("tiny", {"steps": 12}, "tests/tiny")
    assert config["code"]["commit"] == git_state()["commit"] != None  # noqa: E711
    # The machine's load is sampled too; whether a sample comes before so short a run ends is up to the machine.
    assert [run.settings.x_disable_stats for run in started] == [False]
    assert [one.exit_code for one in wandb_files.only(path, "exit")] == [0]
    assert "wandb" not in "".join(capfd.readouterr())


def test_a_failed_run_is_marked_and_goes_on_without_writing_a_step_twice(tmp_path, wanted):
    with pytest.raises(RuntimeError, match="stopped by the test"):
        tracked_training(tmp_path, OFFLINE, fail_at=8)
    (first,) = wandb_files.parts(tmp_path / "outputs")
    assert [one.exit_code for one in wandb_files.only(first, "exit")] == [1]
    # The newest checkpoint is of step 6: steps 7 and 8 are taken again.
    assert [step for step, _ in wandb_files.history(tmp_path / "outputs")] == list(range(1, 9))
    tracked_training(tmp_path, OFFLINE)
    assert len(wandb_files.parts(tmp_path / "outputs", RUN)) == 2
    assert tracked_rows(tmp_path) == wanted


def test_what_a_killed_run_had_not_written_is_written_when_it_goes_on(tmp_path, wanted):
    killed = in_process(tmp_path, OFFLINE, kill_at=8)
    assert killed.returncode == -signal.SIGKILL
    # wandb writes every few seconds; a slow machine may have got that far.
    written = len(wandb_files.history(tmp_path / "outputs"))
    assert written <= 8
    tracked_training(tmp_path, OFFLINE)
    assert len(wandb_files.parts(tmp_path / "outputs", RUN)) == (2 if written else 1)
    assert tracked_rows(tmp_path) == wanted


def test_a_run_that_starts_again_forgets_its_earlier_attempt(tmp_path, wanted):
    with pytest.raises(RuntimeError, match="stopped by the test"):
        tracked_training(tmp_path, OFFLINE, fail_at=8)
    tracked_training(tmp_path, OFFLINE, resume=None)
    assert len(wandb_files.parts(tmp_path / "outputs", RUN)) == 1
    assert tracked_rows(tmp_path) == wanted


def test_a_finished_run_that_is_asked_for_again_writes_nothing(tmp_path):
    tracked_training(tmp_path, OFFLINE)
    tracked_training(tmp_path, OFFLINE)
    assert len(wandb_files.parts(tmp_path / "outputs")) == 1


def test_a_server_gets_everything_and_a_resumed_run_goes_on_in_its_curve(tmp_path, monkeypatch, wanted, capfd):
    with FakeServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        with pytest.raises(RuntimeError, match="stopped by the test"):
            tracked_training(tmp_path, ONLINE, fail_at=8)
        assert server.steps(RUN) == list(range(1, 9))
        tracked_training(tmp_path, ONLINE)
        assert set(server.runs) == {RUN}
        assert server.runs[RUN]["groupName"] == "tests/tiny"
        assert f"{server.url}/me/entreg/runs/{RUN}" in capfd.readouterr().err
        rows = server.history(RUN)
    losses = {row["_step"]: row["loss"] for row in rows}
    assert [row["_step"] for row in rows] == list(range(1, 13))
    assert list(losses.values()) == [row["loss"] for row in wanted]


@pytest.mark.parametrize(("key", "reason"), [(KEY, "refused"), (None, "No API key")])
def test_no_server_or_no_key_leaves_the_run_in_files(tmp_path, monkeypatch, wanted, capfd, closed_port, key, reason):
    monkeypatch.setenv("WANDB_BASE_URL", closed_port)
    monkeypatch.setattr(wandb_backend, "_TRIES", 1)
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    start = time.monotonic()
    result = tracked_training(tmp_path, ONLINE)
    assert time.monotonic() - start < 30
    assert without_times(result.history) == wanted == tracked_rows(tmp_path)
    said = [line for line in capfd.readouterr().err.splitlines() if "make wandb-sync" in line]
    assert len(said) == 1
    assert reason in said[0]
    # Nothing is left of the attempt that would look like a run.
    (path,) = wandb_files.parts(tmp_path / "outputs")
    assert path.parent.name.startswith("offline-run-")


@pytest.mark.slow
def test_a_server_that_goes_away_delays_the_end_of_a_run_by_no_more_than_is_allowed(tmp_path, monkeypatch, wanted):
    script = (
        "import sys; from tests.tracking.runs import tracked_training; from tests.tracking.server import FakeServer;"
        "from entreg.tracking import wandb_backend; wandb_backend._FINISH_SECONDS = 3;"
        "import os; server = FakeServer().__enter__(); os.environ['WANDB_BASE_URL'] = server.url;\n"
        "class Evaluation:\n"
        "    def __call__(self, model, step): server.stop(); return {}\n"
        f"tracked_training({str(tmp_path)!r}, {ONLINE!r}, settings={{'evaluate_every': 5}}, evaluate=Evaluation())"
    )
    start = time.monotonic()
    environment = {**os.environ, "WANDB_API_KEY": KEY}
    done = subprocess.run(
        [sys.executable, "-c", script.replace("server.stop()", "step == 5 and server.stop()")],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 60
    assert "did not finish" in done.stderr
    assert "Traceback" not in done.stderr
    # wandb's own file has it all.
    assert tracked_rows(tmp_path) == wanted
