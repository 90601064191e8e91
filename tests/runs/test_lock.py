"""One holder at a time: among threads of the same machine, processes that die, and machines that are out of sight."""

import contextlib
import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from entreg.errors import OutputError
from entreg.records import environment
from entreg.runs import lock as module
from entreg.runs.lock import Lock, exclusive

HOLD = """
import sys, time
from entreg.runs.lock import Lock
attempt = Lock(sys.argv[1]).acquire()
print("held" if attempt is not None else "busy", flush=True)
time.sleep(60)
"""


def holder(folder):
    """A process that has the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        cwd=environment.REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


def elsewhere(folder, changed, **values):
    """An attempt of a process on another machine, last heard of ``changed`` seconds ago."""
    folder.mkdir(parents=True)
    path = folder / "0001.json"
    content = {
        "host": "another",
        "boot": "b",
        "pid_namespace": "n",
        "pid": 1,
        "started": 1,
        "utc": "t",
        "outcome": None,
    }
    path.write_text(json.dumps({**content, **values}))
    now = time.time()
    os.utime(path, (now - changed, now - changed))
    return path


def test_a_lock_is_held_until_it_is_given_back(tmp_path):
    first, second = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    assert first.holder() is None
    attempt = first.acquire()
    assert (attempt.number, attempt.dead) == (1, None)
    assert second.acquire() is None
    assert second.holder()["pid"] == os.getpid()
    attempt.end("done")
    assert second.holder() is None
    again = second.acquire()
    assert (again.number, again.dead) == (2, None)
    assert not attempt.is_mine()
    assert again.is_mine()
    assert [one["outcome"] for one in first.history()] == ["done", None]
    assert first.history()[0]["seconds"] >= 0


@pytest.mark.parametrize(
    ("error", "outcome"), [(None, "done"), (ValueError, "failed"), (KeyboardInterrupt, "interrupted")]
)
def test_as_a_context_it_notes_how_it_ended(tmp_path, error, outcome):
    lock = Lock(tmp_path)
    with pytest.raises(error) if error is not None else contextlib.nullcontext(), lock.acquire():
        if error is not None:
            raise error
    assert [one["outcome"] for one in lock.history()] == [outcome]


@pytest.mark.parametrize("reaped", [True, False])
def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path, reaped):
    process = holder(tmp_path)
    lock = Lock(tmp_path)
    assert lock.acquire() is None
    assert lock.holder()["pid"] == process.pid
    process.send_signal(signal.SIGKILL)
    if reaped:
        process.wait()
    else:
        # Nobody has asked for its end: it still has its number.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    began = time.monotonic()
    attempt = lock.acquire()
    assert time.monotonic() - began < 2
    assert (attempt.number, attempt.dead["pid"]) == (2, process.pid)
    attempt.end("done")
    process.wait()
    process.stdout.close()
    assert [one["outcome"] for one in lock.history()] == ["died", "done"]


def test_a_process_number_that_is_used_again_is_not_the_process(tmp_path):
    lock = Lock(tmp_path)
    lock.acquire()
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "started": content["started"] - 1}))
    assert lock.acquire().number == 2


def compete(folder, start, found, over):
    start.wait()
    attempt = Lock(folder).acquire()
    found.put(0 if attempt is None else attempt.number)
    # A holder that is done keeps its process, so that only the numbers decide.
    over.wait()


def test_of_processes_that_find_the_same_dead_holder_one_takes_over(tmp_path):
    context = multiprocessing.get_context("fork")
    for round_ in range(3):
        folder = tmp_path / str(round_)
        process = holder(folder)
        process.kill()
        process.wait()
        process.stdout.close()
        start, found, over = context.Event(), context.Queue(), context.Event()
        processes = [context.Process(target=compete, args=(folder, start, found, over)) for _ in range(8)]
        for one in processes:
            one.start()
        start.set()
        assert sorted(found.get(timeout=60) for _ in processes) == [0] * 7 + [2]
        over.set()
        for one in processes:
            one.join(20)
        assert len(list(folder.glob("*.json"))) == 2


def test_a_process_elsewhere_lives_by_its_heartbeat(tmp_path):
    elsewhere(tmp_path / "fresh", changed=1.0)
    assert Lock(tmp_path / "fresh", beat=1.0).acquire() is None
    elsewhere(tmp_path / "silent", changed=100.0)
    lock = Lock(tmp_path / "silent", beat=0.1)
    assert lock.holder() is None
    attempt = lock.acquire()
    assert (attempt.number, attempt.dead["host"]) == (2, "another")
    attempt.end("done")


@pytest.mark.parametrize("changed", [1e5, -1e5])
def test_clocks_that_differ_by_a_day_take_no_lock_away(tmp_path, changed):
    path = elsewhere(tmp_path / "lock", changed=changed)
    over = threading.Event()

    def beat():
        offset = 0
        while not over.wait(0.1):
            offset += 1
            os.utime(path, (time.time() - changed + offset, time.time() - changed + offset))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        assert Lock(tmp_path / "lock", beat=0.2).acquire() is None
    finally:
        over.set()
        thread.join()
    # Once it is silent, whatever the clocks say, the lock is free.
    assert Lock(tmp_path / "lock", beat=0.2).acquire().number == 2


def test_the_holder_shows_that_it_lives(tmp_path):
    lock = Lock(tmp_path, beat=0.05)
    attempt = lock.acquire()
    os.utime(attempt.path, (0, 0))
    deadline = time.monotonic() + 5
    while attempt.path.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert attempt.path.stat().st_mtime > 0
    attempt.end("done")


def test_a_damaged_attempt_is_nobodys_once_it_is_silent(tmp_path):
    path = elsewhere(tmp_path / "lock", changed=0.0)
    path.write_text('{"host": "ano')
    assert Lock(tmp_path / "lock", beat=5.0).acquire() is None
    os.utime(path, (1, 1))
    assert Lock(tmp_path / "lock", beat=0.1).acquire().number == 2


def test_file_systems_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(module.os, "link", refuse)
    lock = Lock(tmp_path)
    attempt = lock.acquire()
    assert attempt.number == 1
    assert not module._make(attempt.path, "{}")
    assert lock.acquire() is None
    attempt.end("done")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0001.json"]


def test_waiting_ends_with_the_holder(tmp_path, capsys):
    process = holder(tmp_path / "attempts")
    timer = threading.Timer(1.0, process.kill)
    timer.start()
    began = time.monotonic()
    with exclusive(tmp_path):
        assert time.monotonic() - began >= 0.9
    assert f"Taken over from process {process.pid} on " in capsys.readouterr().err
    process.wait()
    process.stdout.close()


def test_exclusive_says_whom_it_waits_for(tmp_path, capsys):
    attempt = Lock(tmp_path / "attempts").acquire()
    threading.Timer(0.3, attempt.end, ["done"]).start()
    with exclusive(tmp_path):
        pass
    assert f"{tmp_path} is in the hands of process {os.getpid()} on " in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a file stands where the folder"):
        Lock(tmp_path / "file" / "lock").acquire()
