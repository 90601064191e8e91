"""Run the geometry experiment, save its records, print its tables and how they compare with the reference.

python scripts/geometry.py                                          the whole study (see configs/experiment/geometry)
python scripts/geometry.py profile=reproduce                        its key rows in ten minutes
python scripts/geometry.py profile=smoke store=outputs/smoke        in seconds
python scripts/geometry.py experiment=geometry/hull distributions=[cities] seeds=[0] training.entropy_weight=0.1
python scripts/geometry.py -m +sweep=geometry_ablation              the sensitivity study as a Hydra multirun
"""

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import entreg.script  # noqa: F401, before PyTorch is loaded
from entreg.cli import command_line, hydra_main
from entreg.experiments.geometry.experiment import experiment_configs, plan_runs
from entreg.experiments.geometry.printout import report
from entreg.experiments.studies import run_all
from entreg.runs.multirun import is_multirun
from entreg.runs.objective import Objective


@hydra_main("geometry", checked=["objective.where"])
def main(config: DictConfig) -> float | None:
    objective = Objective.from_mapping(config.objective)
    runs = [run for one in experiment_configs(config, HydraConfig.get().overrides.task) for run in plan_runs(one)]
    records = run_all(runs, store=config.store, command=command_line(), force=config.force)
    if not is_multirun():
        # The tables of one job of many say little and take long; see scripts/status.py and scripts/tables.py.
        print(report(records, config.store))
    return objective.of(records)


if __name__ == "__main__":
    main()
