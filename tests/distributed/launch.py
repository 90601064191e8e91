"""Starting Python programs in several processes on one CPU, as a user would, or without the time of a launcher."""

import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.faults.processes import run_program

ROOT = Path(__file__).resolve().parents[2]

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def accelerate(configuration):
    """The launcher for two processes with one of ``configs/accelerate``."""
    # accelerate's command imports timm, which on some machines needs entreg.compat; this module of it does not.
    file = ROOT / "configs" / "accelerate" / f"{configuration}.yaml"
    options = (f"--config_file={file}", "--num_processes=2", "--main_process_port=0")
    return ("-m", "accelerate.commands.launch", *options)


def launch(*arguments, launcher=TORCHRUN, **environment):
    """Run ``python <launcher> <arguments>`` from the root of the repository; gives the finished process."""
    return subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def launch_forked(path, *arguments):
    """``python <path> <arguments>`` in two processes with a launcher's variables; gives both when they have ended.

    They are forked from one that has imported everything, in a quarter of a launcher's time.
    """
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(one.getsockname()[1])}
    place |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}

    def run(rank):
        return run_program(path, *arguments, environment={**place, "RANK": rank, "LOCAL_RANK": rank})

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(run, "01"))


def sentences(done):
    """What a finished process says to its user when it fails."""
    # They may come after a bar of progress, on the same line.
    return re.findall(r"(?<!\w)Error: .*", done.stderr)
