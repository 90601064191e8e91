"""Run benchmarks, save their records and print their tables.

python scripts/benchmark.py                                     every benchmark of the geometry package
python scripts/benchmark.py benchmark=geometry_hull             one of configs/benchmark
python scripts/benchmark.py profile=smoke store=outputs/smoke   in seconds
python scripts/benchmark.py store=results/runs                  into the reference records; only missing ones are run
"""

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_method
from omegaconf import DictConfig

import entreg.script  # noqa: F401, before PyTorch is loaded
from entreg.cli import command_line, hydra_main
from entreg.experiments.printing import filled_tables
from entreg.experiments.profiles import checked_config
from entreg.records.store import RecordStore


@hydra_main("benchmark")
def main(config: DictConfig) -> None:
    settings = checked_config(config, HydraConfig.get().overrides.task, "benchmark")
    chosen = settings["benchmark"]
    benchmarks = [chosen] if "_target_" in chosen else list(chosen.values())
    common = {"profile": settings["profile"], "store": settings["store"], "force": settings["force"]}
    records = RecordStore(settings["store"])
    saved = set()
    for benchmark in benchmarks:
        run = get_method(benchmark.pop("_target_"))
        for path in run(**benchmark, **common, command=command_line()):
            print(f"record: {path}")
            saved.add(path.name)
    made = [r for r in records.load_all() if records.path_for(r["experiment"], r["config"]).name in saved]
    print("\n".join(["", *filled_tables(made)]))


if __name__ == "__main__":
    main()
