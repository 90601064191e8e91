"""What `make dashboard` shows, and what `make wandb-sync` uploads."""

import json
import os
import re
import time
from pathlib import Path

import pytest

from entreg.errors import ConfigError, OutputError
from entreg.tracking import offline_runs
from entreg.tracking.offline_runs import open_dashboard, upload
from tests.tracking import capture, wandb_files
from tests.tracking.runs import RUN, tracked_training
from tests.tracking.server import KEY, FakeServer

PICTURE = Path(__file__).parents[2] / "docs" / "assets" / "dashboard.svg"
OFFLINE = {"kind": "wandb"}


def frame(lines):
    """What does not depend on the machine: all but the numbers and the curves."""
    curves = re.compile(r"[\u2800-\u28ff\d.]")
    # The axes' widths are those of their numbers.
    without = [re.sub(r"\s+|[│─└]", " ", curves.sub(" ", line)) for line in lines]
    return [" ".join(line.split()) for line in without if line.strip()]


@pytest.mark.slow
def test_the_dashboard_shows_the_runs_as_in_the_documentation(tmp_path):
    capture.make_runs(tmp_path)
    terminal = capture.dashboard(tmp_path)
    seen = capture.shown(terminal, tmp_path).split("\n")
    text = "\n".join(seen)
    rows = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in capture.RUNS
    }
    # Both runs are marked, and the charts reach from the smallest to the largest of both runs' values.
    assert [line[:46].split() for line in seen[1:3]] == [
        ["▶", "offline-run-20260101_120500-c04f7e21b8a6"],
        ["●", "offline-run-20260101_120000-91b0c5a7d2e4"],
    ]
    for title in ("gradient_norm", "key_entropy/penalty", "learning_rate", "loss", "row_support/layer_01"):
        assert f"│{title} " in text
    place = next(index for index, line in enumerate(seen) if "│loss " in line)
    column = seen[place].index("│loss ")
    chart = [line[column:] for line in seen[place + 1 : place + 11]]
    losses = [row["loss"] for run in rows.values() for row in run]
    labels = [float(found[1]) for line in chart if (found := re.match(r"│\s*([\d.]+)[│└]", line))]
    assert len(labels) == 2
    assert labels[-1] <= min(losses) < labels[0] < max(losses)
    assert labels[-1] == pytest.approx(min(losses), rel=0.05)
    # The committed picture is of this screen, and tells nothing of where it was taken.
    assert frame(capture.text_of(PICTURE.read_text(encoding="utf-8"))) == frame(seen)
    assert frame(capture.text_of(capture.picture(terminal, tmp_path))) == frame(seen)
    assert str(tmp_path) not in capture.picture(terminal, tmp_path)
    assert terminal.leave() == 0


def test_without_runs_there_is_nothing_to_look_at(tmp_path):
    with pytest.raises(ConfigError, match=r"There are no tracked runs in .*/wandb yet; python scripts/train\.py"):
        open_dashboard(tmp_path)
    assert upload(tmp_path) == "Uploaded 0 runs; 0 were uploaded before, 0 are still being written."


def test_runs_are_uploaded_once_and_the_parts_of_a_resumed_one_are_one_run(tmp_path, monkeypatch, capfd):
    with pytest.raises(RuntimeError, match="stopped by the test"):
        tracked_training(tmp_path, OFFLINE, fail_at=8)
    tracked_training(tmp_path, OFFLINE)
    with FakeServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        folder = tmp_path / "outputs"
        assert upload(folder) == "Uploaded 2 runs; 0 were uploaded before, 0 are still being written."
        assert list(server.runs) == [RUN]
        assert server.steps(RUN) == list(range(1, 13))
        asked = len(server.requests)
        assert upload(folder) == "Uploaded 0 runs; 2 were uploaded before, 0 are still being written."
        assert len(server.requests) == asked
    assert "Finished syncing" in "".join(capfd.readouterr())


def test_a_run_that_is_still_being_written_is_uploaded_later(tmp_path, monkeypatch):
    tracked_training(tmp_path, OFFLINE)
    (log,) = wandb_files.parts(tmp_path / "outputs")
    # Its last record says that the run has ended; a killed process leaves some of what it was writing.
    log.write_bytes(log.read_bytes()[:-3])
    with FakeServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        assert upload(tmp_path / "outputs") == "Uploaded 0 runs; 0 were uploaded before, 1 are still being written."
        assert server.requests == []
        # Nothing for a while: it was killed.
        old = time.time() - 2 * offline_runs._WRITTEN_EVERY
        os.utime(log, (old, old))
        assert upload(tmp_path / "outputs").startswith("Uploaded 1 runs;")
        assert upload(tmp_path / "outputs").startswith("Uploaded 0 runs; 1 were uploaded before")
        assert server.steps(RUN) == list(range(1, 13))


def test_a_file_may_end_anywhere(tmp_path):
    tracked_training(tmp_path, OFFLINE)
    (log,) = wandb_files.parts(tmp_path / "outputs")
    data, wanted = log.read_bytes(), wandb_files.read_records(log)
    ends = {offline_runs._whole_records(data[:length]) for length in range(7, len(data) + 1)}
    # One end for each number of whole records.
    assert len(ends) == len(wanted) + 1
    for end in sorted(ends)[::5]:
        log.write_bytes(data[: end + 3])
        offline_runs._cut_to_whole_records(log)
        assert wandb_files.read_records(log) == wanted[: sorted(ends).index(end)]
        assert log.stat().st_size == end


@pytest.mark.parametrize("key", [KEY, None])
def test_what_no_server_took_is_tried_again_next_time(tmp_path, monkeypatch, closed_port, key):
    tracked_training(tmp_path, OFFLINE)
    monkeypatch.setenv("WANDB_BASE_URL", closed_port)
    monkeypatch.setenv("WANDB_X_GRAPHQL_RETRY_MAX", "1")
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    for _ in range(2):
        with pytest.raises(OutputError, match=r"1 of 1 runs in .* were not uploaded"):
            upload(tmp_path / "outputs")
