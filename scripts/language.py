"""Run all methods and seeds of a language experiment, save their records, print tables and verdicts.

python scripts/language.py profile=reproduce                                  the offline model in minutes
python scripts/language.py experiment=llm/training store=results/runs         a study behind the reference records
python scripts/language.py experiment=llm/phi_2 profile=paper                 the paper's scale
python scripts/language.py experiment=llm/other profile=paper model.name=/models/my-decoder
python scripts/language.py profile=smoke store=outputs/smoke                  in seconds
"""

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import entreg.script  # noqa: F401, before PyTorch is loaded
from entreg.cli import command_line, hydra_main
from entreg.experiments.language.experiment import CHECKED, plan_run
from entreg.experiments.language.printout import report
from entreg.experiments.studies import run_all, study_configs
from entreg.runs.multirun import is_multirun
from entreg.runs.objective import Objective


@hydra_main("language", checked=(*CHECKED, "objective.where"), shared=True)
def main(config: DictConfig) -> float | None:
    objective = Objective.from_mapping(config.objective)
    runs = [plan_run(one) for one in study_configs(config, HydraConfig.get().overrides.task, "language")]
    records = run_all(runs, store=config.store, command=command_line(), force=config.force)
    if not is_multirun():
        # The tables of one job of many say little and take long; see scripts/status.py and scripts/tables.py.
        print(report(records, config.store))
    return objective.of(records)


if __name__ == "__main__":
    main()
