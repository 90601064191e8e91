"""Work done in processes of their own that can be killed: forked from a server that has imported everything already."""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np

from tests.faults.catalogue import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
# Without them, every process would spend seconds on imports, and most kills would hit those.
CONTEXT.set_forkserver_preload(["pytest", "tests.faults.victims"])


def _quietly(log, errors, method, function, arguments):
    """Runs the function with its outputs in files, as a shell's ``>log 2>errors``."""
    # The context that this process was made by is not that of the processes that it makes.
    multiprocessing.set_start_method(method, force=True)
    for number, path in ((1, log), (2, errors)):
        # Appending, so that both may be the same file.
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(one, "w", closefd=False, encoding="utf-8") for one in (1, 2))
    try:
        function(*arguments)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def start(log, function, *arguments, errors=None):
    """A running process; ``log`` gets what it prints, ``errors``, if given, what it prints to standard error."""
    errors = log if errors is None else errors
    for path in {log, errors}:
        path.write_bytes(b"")
    method = multiprocessing.get_start_method()
    process = CONTEXT.Process(target=_quietly, args=(str(log), str(errors), method, function, arguments))
    process.start()
    return process


def finish(process, log, limit=120):
    """Waits for a process; gives its exit status and what it printed."""
    process.join(limit)
    assert process.exitcode is not None, f"still running after {limit} s: {log.read_text()}"
    return process.exitcode, log.read_text(encoding="utf-8") if log.exists() else "it did not even start"


def run_script(log, name, *arguments):
    """``python scripts/<name>.py <arguments>`` in a process of its own; gives its exit status and what it printed."""
    return finish(start(log, _program, f"scripts/{name}.py", arguments, os.getcwd(), dict(os.environ)), log)


def run_program(path, *arguments, folder=ROOT, environment=()):
    """``python <path> <arguments>`` in a folder, as ``subprocess.run(..., capture_output=True, text=True)`` gives it.

    The path is one from the folder. The environment is this process's with what is given.
    """
    with tempfile.TemporaryDirectory() as logs:
        out, errors = Path(logs, "out"), Path(logs, "errors")
        values = {**os.environ, **dict(environment)}
        words = (str(path), tuple(map(str, arguments)), str(folder), values)
        status, text = finish(start(out, _program, *words, errors=errors), out, limit=300)
        return subprocess.CompletedProcess([str(path), *words[1]], status, text, errors.read_text(encoding="utf-8"))


def _program(path, arguments, folder, environment):
    # The server that this process is forked from had other ones.
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    # timm has imported it in the server: its temporary folder would be that of all processes, and go with the first.
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        del sys.modules[name]
    sys.argv = [path, *arguments]
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    try:
        runpy.run_path(path, run_name="__main__")
    finally:
        # A process of multiprocessing ends without.
        atexit._run_exitfuncs()


def killed_at_random_moments(folder, function, *, kills, check, seed):
    """Kill -9 at moments spread over an undisturbed run's duration, each time starting again in the same folder.

    Args:
        folder: of the test; ``function(folder / "halves")`` is what is killed.
        function: to be run; ``function(folder / "whole")`` is the undisturbed run.
        kills: how many have to hit.
        check: ``check(folder / "halves")``, called after every kill and at the end.
        seed: of the moments.

    Returns:
        Number of runs that ended before their kill came, after which the folder is cleared.
    """
    log, whole, halves = folder / "log", folder / "whole", folder / "halves"
    # The second run says how long one takes: the first one also starts the server.
    for directory in (folder / "first", whole):
        began = time.perf_counter()
        status, text = finish(start(log, function, directory), log)
        length = time.perf_counter() - began
        assert status == 0, text
    moments = np.random.default_rng(seed).uniform(0.0, length, 10 * kills)
    hits = ended = 0
    for moment in moments:
        process = start(log, function, halves)
        time.sleep(moment)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), log.read_text()
        check(halves)
        if process.exitcode == 0:
            ended += 1
            halves.rename(folder / f"ended-{ended}")
        hits += process.exitcode != 0
        if hits == kills:
            break
    assert hits == kills
    status, text = finish(start(log, function, halves), log)
    assert status == 0, text
    check(halves)
    return ended


@contextlib.contextmanager
def together(log_folder, number, function, *arguments):
    """The same work in several processes at once; yields while they run, and wants all to succeed."""
    logs = [log_folder / f"log-{place}" for place in range(number)]
    running = [start(log, function, *arguments, place) for place, log in enumerate(logs)]
    yield running
    for process, log in zip(running, logs, strict=True):
        status, text = finish(process, log)
        assert status == 0, text
