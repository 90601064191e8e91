"""One training of a tiny decoder in float64, by as many processes as there are.

In float64, because the order in which numbers are added up, which differs between processors and between one process
and two, then decides the ninth digit at most, whatever the optimiser makes of it; a wrong sum still shows in the first.

python -m tests.distributed.training '{"directory": ..., "settings": {...}, "kill": [process, step]}'
"""

import json
import os
import signal
import sys

from entreg import distributed
from entreg.adapters import probe
from entreg.adapters.language_models import random_language_model
from entreg.cli import entry_point
from entreg.training.language import LanguageObjective, TokenWindows, prepare_language_training
from entreg.training.loop import TrainingSettings, train
from entreg.training.penalties import Penalties, penalty_from_mapping
from tests.experiments.language.test_evaluation import TINY, windows

SETTINGS = {
    "steps": 6,
    "batch_size": 8,
    "learning_rate": 0.01,
    "warmup_steps": 2,
    "log_every": 1,
    "checkpoint_every": 2,
}


def run(directory, settings=None, kill=None, **options):
    """Train; gives the result and the model. ``kill`` names the process and the step in which it dies."""
    model = prepare_language_training(random_language_model("smollm2_135m", TINY).model, {"kind": "full"}).double()
    penalty = penalty_from_mapping({"quantity": "row_entropy", "weight": 0.1, "num_sampled_queries": None})
    captures = probe(model)
    # One row of logits at a time where there are few, so that chunks are recomputed.
    objective = LanguageObjective(Penalties({"rows": penalty}), captures=captures, chunk_size=24)

    def lethal(model, batch, step):
        if kill is not None and [int(os.environ.get("RANK", 0)), step] == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return objective(model, batch, step)

    data = TokenWindows(windows(21, 16))
    chosen = TrainingSettings(**{**SETTINGS, **(settings or {})})
    return train(model, lethal, data, chosen, directory, device="cpu", **options), model


@entry_point
def main():
    with distributed.joined("cpu"):
        result, model = run(**json.loads(sys.argv[1]))
        if result.sharded:
            print("weights of this process:", sum(one.to_local().numel() for one in model.parameters()))


if __name__ == "__main__":
    main()
