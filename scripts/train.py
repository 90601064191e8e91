"""Train one vision model with one method, evaluate it dense and sparse, and save the record.

python scripts/train.py                                                      the digit scenes, no regulariser
python scripts/train.py regularizer=key_entropy sparsity=setting_a seed=1    entropy, sparse in the loop
python scripts/train.py experiment=vit/imagenet data.root=/data/imagenet     the paper's scale
python scripts/train.py profile=smoke store=outputs/smoke                    in seconds
python scripts/train.py -m regularizer=key_entropy,row_entropy,none seed=0,1,2    a Hydra multirun
"""

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import entreg.script  # noqa: F401, before PyTorch is loaded
from entreg.cli import command_line, hydra_main
from entreg.experiments.profiles import checked_config
from entreg.experiments.studies import run_all
from entreg.experiments.vision.experiment import CHECKED, plan_run
from entreg.experiments.vision.printout import report
from entreg.runs.multirun import is_multirun
from entreg.runs.objective import Objective


@hydra_main("vision", checked=(*CHECKED, "objective.where"), shared=True)
def main(config: DictConfig) -> float | None:
    objective = Objective.from_mapping(config.objective)
    run = plan_run(checked_config(config, HydraConfig.get().overrides.task, "vision"))
    records = run_all([run], store=config.store, command=command_line(), force=config.force)
    if not is_multirun():
        # The tables of one job of many say little and take long; see scripts/status.py and scripts/tables.py.
        print(report(records, config.store))
    return objective.of(records)


if __name__ == "__main__":
    main()
