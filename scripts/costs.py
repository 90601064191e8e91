"""Write what the paper-scale experiments cost on 1, 8 and 64 GPUs, from the times in run records.

python scripts/costs.py            results/runs -> docs/scale_out_costs.md
python scripts/costs.py --check    write nothing, fail when the page is not up to date
"""

import argparse
from pathlib import Path

import hydra

from entreg.atomic import write_text_atomic
from entreg.cli import CONFIGS, entry_point
from entreg.experiments.paper_costs import EXPERIMENTS, cost_page, paper_experiment
from entreg.records import REFERENCE_ROOT, RecordStore

PAGE = CONFIGS.parent / "docs" / "scale_out_costs.md"


@entry_point
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, default=REFERENCE_ROOT, help="folder of run records")
    parser.add_argument("--out", type=Path, default=PAGE, help="Markdown file")
    parser.add_argument("--check", action="store_true", help="exit with 1 when the file differs; write nothing")
    arguments = parser.parse_args()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        experiments = [paper_experiment(name) for name in EXPERIMENTS]
    page = cost_page(experiments, RecordStore(arguments.records).load_all())
    if arguments.check:
        same = arguments.out.is_file() and arguments.out.read_text(encoding="utf-8") == page
        print(f"{arguments.out} is {'up to date' if same else 'not what the records give; run make costs'}.")
        return 0 if same else 1
    print(f"written: {write_text_atomic(arguments.out, page)}")
    return 0


if __name__ == "__main__":
    main()
