"""A script whose runs do nothing but take time, fail when asked to, and leave traces of their own of having run."""

import os
import subprocess
import sys
import textwrap
import time

from entreg.cli import CONFIGS
from entreg.records import environment

SCRIPT = """
    import os, time
    from dataclasses import dataclass
    from pathlib import Path
    from entreg.cli import command_line, hydra_main
    from entreg.errors import InputError
    from entreg.experiments.studies import run_all
    from entreg.records.record import new_record

    @dataclass(frozen=True)
    class Run:
        config: dict
        mended: Path
        experiment: str = "tests/sweep"

        @property
        def label(self):
            return f"number {self.config['number']}"

        inputs = {}

        def require_inputs(self):
            pass

        def make_record(self, command, directory):
            with open("trace.txt", "a") as file:
                file.write(f"begin {self.config['number']}\\n")
            print("working on", self.config["number"])
            time.sleep(self.config["seconds"])
            if not self.mended.exists():
                if self.config["number"] in self.config["refused"]:
                    raise InputError(f"{self.config['number']} is not a good number.")
                if self.config["number"] in self.config["defects"]:
                    1 / 0
            with open("trace.txt", "a") as file:
                file.write(f"end {self.config['number']}\\n")
            return new_record(
                experiment=self.experiment, scale="smoke", config=self.config, command=command,
                dataset={"name": "none"}, seed=0, repeats=1, metrics={"square": self.config["number"] ** 2},
                rows=[], wall_seconds=self.config["seconds"],
            )

    @hydra_main("main", config_path=Path(__file__).parent / "configs")
    def main(config):
        if config.number == "impossible":
            raise InputError("a number is wanted.")
        deciding = {
            "seconds": config.seconds, "refused": list(config.refused), "defects": list(config.defects)
        }
        numbers = config.numbers or [config.number]
        runs = [Run({**deciding, "number": number}, Path("mended")) for number in numbers]
        records = run_all(runs, store=config.store, command=command_line(), force=config.force)
        return sum(record["metrics"]["square"] for record in records) / len(records)

    if __name__ == "__main__":
        main()
"""

MAIN = """
    defaults:
      - _self_
      - launcher: basic
      - override hydra/job_logging: stdout
    number: 0
    numbers: null
    seconds: 0.0
    refused: []
    defects: []
    store: runs
    force: false
    objective: {name: square, value: square, where: null, direction: minimize}
    hydra:
      output_subdir: null
      run: {dir: .}
      sweep: {dir: "${store}/sweeps/${sweep_name:}", subdir: .}
      job: {chdir: false}
      searchpath: ["file://CONFIGS"]
"""

SLURM = {
    "sbatch": """
        file="${@: -1}"
        cp "$file" submitted.sh
        tasks=$(grep -oP '^#SBATCH --array=\\K[0-9]+-[0-9]+' "$file")
        for task in $(seq ${tasks%-*} ${tasks#*-}); do
            export SLURM_JOB_ID=$$$task SLURM_ARRAY_JOB_ID=$$ SLURM_ARRAY_TASK_ID=$task SLURM_JOB_NODELIST=localhost
            export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NNODES=1
            setsid bash "$file" > /dev/null 2>&1 &
        done
        echo "Submitted batch job $$"
    """,
    "srun": """
        while [[ "$1" == -* ]]; do
            case "$1" in --output | --error) shift 2 ;; *) shift ;; esac
        done
        exec "$@"
    """,
    "sacct": "echo 'JobID|State|NodeList'",
}


class Project:
    """The script in a folder of its own.

    Args:
        folder: empty.
    """

    def __init__(self, folder):
        self.folder = folder
        self.environment = {"PYTHONPATH": str(environment.REPOSITORY)}
        (folder / "configs").mkdir()
        (folder / "configs" / "main.yaml").write_text(textwrap.dedent(MAIN).replace("CONFIGS", str(CONFIGS)))
        (folder / "script.py").write_text(textwrap.dedent(SCRIPT))

    def start(self, *arguments):
        """The script's process, the first of a group of its own."""
        return subprocess.Popen(
            [sys.executable, "script.py", *arguments],
            cwd=self.folder,
            env={**os.environ, **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments):
        """Exit status, output and errors of the script."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    def pretend_slurm(self):
        """Slurm's commands, as far as submitit calls them: an array's tasks become processes of this machine."""
        folder = self.folder / "slurm"
        folder.mkdir()
        for name, lines in SLURM.items():
            (folder / name).write_text(f"#!/bin/bash\n{textwrap.dedent(lines)}")
            (folder / name).chmod(0o755)
        self.environment["PATH"] = f"{folder}:{os.environ['PATH']}"

    def traces(self, word):
        """The numbers of the runs that began, or ended, in that order."""
        path = self.folder / "trace.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return [int(line.split()[1]) for line in lines if line.startswith(word)]

    def records(self):
        """Paths of the records."""
        return sorted((self.folder / "runs").glob("*.json"))


def wait_until(condition, seconds=120):
    """Wait for something to become true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
