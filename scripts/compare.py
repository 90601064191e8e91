"""Two records, folders of records or commits side by side, significant differences marked.

python scripts/compare.py HEAD~10 HEAD                      all reference records at two commits
python scripts/compare.py results/runs outputs/runs         the reference and your own runs
python scripts/compare.py 0573b831c28a 59e8f88766dc         two records, by hash, identifier or file
python scripts/compare.py A B --fields loss --all           other quantities; every row, also what is not significant
"""

import argparse

from entreg.cli import entry_point
from entreg.records.compare import compare, read_source
from entreg.records.tables import provenance


@entry_point
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", metavar="A", help="record, folder of records, or git revision")
    parser.add_argument("second", metavar="B", help="the same for the other side")
    parser.add_argument("--fields", help="quantities, separated by commas (default: each row's main one)")
    parser.add_argument("--all", action="store_true", help="show every row, also where there are many")
    arguments = parser.parse_args()

    sides = [read_source(text) for text in (arguments.first, arguments.second)]
    found = compare(*sides, fields=arguments.fields.split(",") if arguments.fields else None)
    print(found.text(everything=arguments.all))
    for letter, side in zip("AB", sides, strict=True):
        _, device, code = provenance(side.records)
        print(f"{letter}: {len(side.records)} records. {device} {code}")
    return 0 if found.possible else 1


if __name__ == "__main__":
    main()
