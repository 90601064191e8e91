import json
import sys

import pytest

from entreg.errors import BusyError, InputError
from entreg.runs.directory import RunDirectory, described

CONFIG = {"method": "plain", "seed": 0}


def attempt(directory, body=lambda: None):
    with directory.attempting(directory.lock.acquire(), CONFIG, "python scripts/train.py seed=0"):
        body()


def test_the_name_is_the_experiments_and_the_configurations(tmp_path):
    one = RunDirectory.of(tmp_path, "vit/digit_scenes", CONFIG).path
    assert one.parent == tmp_path
    assert one.name.startswith("vit-digit_scenes-")
    assert RunDirectory.of(tmp_path, "vit/digit_scenes", {"seed": 0, "method": "plain"}).path == one
    assert RunDirectory.of(tmp_path, "vit/digit_scenes", {**CONFIG, "seed": 1}).path != one


def test_what_is_printed_is_logged_and_shown(tmp_path, capsys):
    directory = RunDirectory(tmp_path / "run")

    def body():
        print("to the output")
        for step in range(3):
            print(f"\rstep {step}", end="", file=sys.stderr)
        print(file=sys.stderr)

    attempt(directory, body)
    out, err = capsys.readouterr()
    assert out == "to the output\n"
    assert err == "\rstep 0\rstep 1\rstep 2\n"
    title, *lines = directory.log.read_text().splitlines()
    assert title.endswith("attempt 1: python scripts/train.py seed=0")
    # Of a bar, its last state.
    assert lines == ["to the output", "step 2"]
    assert json.loads((directory.path / "config.json").read_text()) == CONFIG
    assert sys.stdout is not None
    print("afterwards")
    assert "afterwards" not in directory.log.read_text()


@pytest.mark.parametrize(
    ("error", "sentence"),
    [(InputError("n must be\n positive"), "n must be positive"), (KeyError("x"), "defect: KeyError: 'x'")],
)
def test_a_failure_is_marked_and_its_traceback_logged(tmp_path, error, sentence):
    directory = RunDirectory(tmp_path / "run")

    def body():
        print("half a line", end="")
        raise error

    with pytest.raises(type(error)):
        attempt(directory, body)
    assert described(error) == sentence
    assert directory.failure() == sentence
    log = directory.log.read_text()
    assert "half a line\nTraceback (most recent call last):" in log
    assert 'test_directory.py", line' in log
    assert str(directory.log) in (directory.path / "FAILED").read_text()
    # The next attempt that succeeds is what counts; the log has both.
    attempt(directory, lambda: directory.mark_done(tmp_path / "record.json"))
    assert directory.failure() is None
    assert (directory.path / "DONE").read_text() == f"{tmp_path / 'record.json'}\n"
    assert directory.log.read_text().count("=== ") == 2
    assert [one["outcome"] for one in directory.lock.history()] == ["failed", "done"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, BusyError])
def test_an_interruption_is_no_failure(tmp_path, error):
    directory = RunDirectory(tmp_path / "run")

    def body():
        raise error

    with pytest.raises(error):
        attempt(directory, body)
    assert directory.failure() is None
    assert error.__name__ in directory.log.read_text()


def test_a_full_disk_costs_lines_of_the_log_only(tmp_path, capsys):
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    directory.log.symlink_to("/dev/full")
    attempt(directory, lambda: print("said"))
    assert capsys.readouterr().out == "said\n"


def test_done_is_written_for_whoever_was_killed_before(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.confirm_done(tmp_path / "record.json")
    # A record from elsewhere has no directory here.
    assert not directory.path.exists()
    attempt(directory)
    directory.confirm_done(tmp_path / "record.json")
    assert (directory.path / "DONE").exists()
