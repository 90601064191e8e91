"""What became of the runs of a sweep: done, running, failed, queued, the best so far, the time left.

python scripts/status.py                        the sweep of outputs/runs that was begun last
python scripts/status.py --watch                the same, drawn again until nothing is left to run
python scripts/status.py --store results/runs   of another folder of records
python scripts/status.py outputs/runs/sweeps/vit-1a2b3c4d
"""

import argparse
import sys
import time
from pathlib import Path

from entreg.cli import entry_point
from entreg.runs.status import is_over, newest_sweep, status_table
from entreg.runs.sweep import Sweep


@entry_point
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path, nargs="?", help="directory of a sweep (default: the newest of --store)")
    parser.add_argument("--store", type=Path, default=Path("outputs/runs"), help="folder of run records")
    parser.add_argument("--watch", action="store_true", help="go on until nothing is left to run")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks of --watch")
    arguments = parser.parse_args()
    sweep = newest_sweep(arguments.store) if arguments.sweep is None else Sweep(arguments.sweep)
    shown = None
    while True:
        runs = sweep.runs()
        text = status_table(sweep, runs)
        if sys.stdout.isatty() and arguments.watch:
            # To the upper left corner, and what lies below is wiped away.
            print(f"\033[H\033[J{text}", flush=True)
        elif text != shown:
            print(text, flush=True)
        shown = text
        if not arguments.watch or is_over(runs):
            return
        time.sleep(arguments.every)


if __name__ == "__main__":
    main()
