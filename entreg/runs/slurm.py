"""A script on several nodes of a Slurm cluster: one job, ``torchrun`` on every node, queued again when it is ended.

submitit submits it and starts it once per node; nothing in the scripts knows of Slurm. A job that runs into its time
limit or is preempted is queued again and goes on from the newest checkpoint.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from entreg.errors import ConfigError, ProcessError
from entreg.records.environment import REPOSITORY

_CPU_PROCESSES = 2


@dataclass(frozen=True)
class TorchrunJob:
    """What submitit calls on each node.

    Attributes:
        words: script and arguments.
        processes: on each node.
    """

    words: tuple[str, ...]
    processes: int

    def __call__(self) -> None:
        """Run the script on this node, together with the other nodes.

        Raises:
            ProcessError: it failed; the log of the job says why.
        """
        job = submitit.JobEnvironment()
        status = subprocess.run(self.command(job.hostnames, job.job_id), cwd=REPOSITORY, check=False).returncode
        if status:
            raise ProcessError(f"{self.words[0]} ended with status {status} on node {job.node}; its log says why.")

    def command(self, hosts: Sequence[str], job: str) -> list[str]:
        """The same on every node: they find each other at the first one.

        Args:
            hosts: names of the nodes.
            job: identifier of the job.
        """
        if len(hosts) == 1:
            meeting = ["--standalone"]
        else:
            # Jobs that share a node must not meet each other.
            port = 20_000 + int("".join(filter(str.isdigit, job)) or 0) % 10_000
            meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={hosts[0]}:{port}", f"--rdzv-id={job}"]
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(hosts)}"]
        return [*launcher, f"--nproc-per-node={self.processes}", *meeting, *self.words]

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit queues when the job is ended from outside: the same, which goes on from its checkpoints."""
        return submitit.helpers.DelayedSubmission(self)


def submit(settings: Mapping[str, Any], words: Sequence[str]) -> submitit.Job[None]:
    """Queue a script, or without Slurm run it.

    Args:
        settings: content of ``configs/accelerate/slurm.yaml``.
        words: script, as from the root of the repository, and its arguments.

    Raises:
        ConfigError: there is no such script, a value is out of range, or there is no Slurm.
        ProcessError: it ran without Slurm, which is waited for, and failed.
    """
    if not words or not (REPOSITORY / words[0]).is_file():
        raise ConfigError(f"there is no script '{words[0] if words else ''}'; name one, such as scripts/vision.py")
    if settings["nodes"] < 1 or settings["gpus_per_node"] < 0 or settings["minutes"] < 1:
        raise ConfigError(
            f"a job needs at least one node and minute, and no negative number of GPUs, got nodes={settings['nodes']}, "
            f"minutes={settings['minutes']} and gpus_per_node={settings['gpus_per_node']}"
        )
    if settings["cluster"] == "slurm" and submitit.SlurmExecutor.affinity() < 0:
        raise ConfigError("there is no Slurm on this machine (no srun); log in where there is, or set cluster=local")
    gpus = settings["gpus_per_node"]
    executor = submitit.AutoExecutor(Path(settings["folder"]) / "%j", cluster=settings["cluster"])
    executor.update_parameters(
        name=settings["name"],
        nodes=settings["nodes"],
        tasks_per_node=1,
        gpus_per_node=gpus,
        cpus_per_task=settings["cpus_per_gpu"] * max(1, gpus),
        timeout_min=settings["minutes"],
        **({} if settings["memory_gb"] is None else {"mem_gb": settings["memory_gb"]}),
        **{f"slurm_{key}": settings[key] for key in ("partition", "account") if settings[key] is not None},
    )
    job = executor.submit(TorchrunJob(tuple(words), gpus or _CPU_PROCESSES))
    # A local job ends with the process that started it.
    if settings["cluster"] == "local" and job.exception() is not None:
        raise ProcessError(f"{words[0]} failed; see {job.paths.stderr}.")
    return job
