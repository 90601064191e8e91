"""Starting Python programs in several processes on one CPU, as a user would."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
# accelerate's command imports timm, which on some machines needs entreg.compat; this module of it does not.
ACCELERATE = (
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_machines=1",
    "--num_processes=2",
    "--main_process_port=0",
    "--mixed_precision=no",
    "--dynamo_backend=no",
)


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


def sentences(done):
    """What a finished process says to its user when it fails."""
    # They may come after a bar of progress, on the same line.
    return re.findall(r"(?<!\w)Error: .*", done.stderr)
