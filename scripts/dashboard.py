"""Look at tracked runs in the terminal, or upload those that were tracked offline.

python scripts/dashboard.py                    the runs in outputs/wandb, in wandb leet; q leaves, h helps
python scripts/dashboard.py --upload           upload the runs that have not been uploaded yet
python scripts/dashboard.py elsewhere          the runs of tracker.directory=elsewhere
"""

import argparse
from pathlib import Path

from entreg.cli import entry_point
from entreg.tracking.offline_runs import open_dashboard, upload


@entry_point
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("outputs"), help="tracker.directory of the runs")
    parser.add_argument("--upload", action="store_true", help="upload instead of looking")
    arguments = parser.parse_args()
    if not arguments.upload:
        return open_dashboard(arguments.folder)
    print(upload(arguments.folder))
    return 0


if __name__ == "__main__":
    main()
