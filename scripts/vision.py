"""Run all methods and seeds of a vision experiment, save their records, print tables and verdicts.

python scripts/vision.py profile=reproduce                                   the ten-minute version
python scripts/vision.py experiment=cifar/digits store=results/runs          a study behind the reference records
python scripts/vision.py experiment=vit/imagenet profile=paper data.root=/data/imagenet
python scripts/vision.py profile=smoke store=outputs/smoke                   in seconds
"""

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import entreg.script  # noqa: F401, before PyTorch is loaded
from entreg.cli import command_line, hydra_main
from entreg.experiments.studies import run_all, study_configs
from entreg.experiments.vision.experiment import CHECKED, plan_run
from entreg.experiments.vision.printout import report
from entreg.runs.multirun import is_multirun
from entreg.runs.objective import Objective


@hydra_main("vision", checked=(*CHECKED, "objective.where"), shared=True)
def main(config: DictConfig) -> float | None:
    objective = Objective.from_mapping(config.objective)
    runs = [plan_run(one) for one in study_configs(config, HydraConfig.get().overrides.task, "vision")]
    records = run_all(runs, store=config.store, command=command_line(), force=config.force)
    if not is_multirun():
        # The tables of one job of many say little and take long; see scripts/status.py and scripts/tables.py.
        print(report(records, config.store))
    return objective.of(records)


if __name__ == "__main__":
    main()
