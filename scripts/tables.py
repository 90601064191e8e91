"""Rebuild the tables, the figures, the report and the README's claims table from run records.

python scripts/tables.py                          results/runs -> results/{tables,figures,report.html}, README.md
python scripts/tables.py --records outputs/runs   your own runs -> outputs/{tables,figures,report.html}
python scripts/tables.py --check                  write nothing, fail when something is not up to date
"""

import argparse
from pathlib import Path

from entreg.cli import entry_point
from entreg.errors import RecordError
from entreg.records import REFERENCE_ROOT, RecordStore
from entreg.records.build import build_all

REPOSITORY = REFERENCE_ROOT.parents[1]


@entry_point
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, default=REFERENCE_ROOT, help="folder of run records")
    parser.add_argument(
        "--out", type=Path, help="where tables/, figures/ and report.html go (default: the folder above --records)"
    )
    parser.add_argument(
        "--readme", type=Path, help="Markdown file with a claims table (default: README.md for results/runs)"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 when a file differs; write nothing")
    arguments = parser.parse_args()

    is_reference = arguments.records.resolve() == REFERENCE_ROOT
    if not arguments.records.is_dir() and not is_reference:
        raise RecordError(f"There is no folder of records {arguments.records}; run an experiment first.")
    records = RecordStore(arguments.records).load_all()
    out = arguments.out or arguments.records.parent
    readme = arguments.readme
    if readme is None and is_reference and arguments.out is None:
        readme = REPOSITORY / "README.md"
    report = build_all(records, out, records_root=arguments.records, readme=readme, check=arguments.check)

    changed, gone = ("differs", "should go") if arguments.check else ("written", "removed")
    for path in report.written:
        print(f"{changed}: {path}")
    for path in report.removed:
        print(f"{gone}: {path}")
    total = len(report.written) + len(report.unchanged)
    if arguments.check and not report.up_to_date:
        wrong = len(report.written) + len(report.removed)
        print(f"{wrong} files are not what the {len(records)} records give; run make tables.")
        return 1
    print(f"{len(records)} records, {total} files: {len(report.unchanged)} were up to date.")
    return 0


if __name__ == "__main__":
    main()
