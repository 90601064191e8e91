"""A tiny training run with a tracker; as a script, in a process of its own, perhaps until it is killed.

python -m tests.tracking.runs '{"folder": ..., "settings": {...}, "kill_at": 7}'
"""

import json
import sys

import torch

from entreg.tracking import tracked
from entreg.tracking.settings import tracker_settings_from_mapping
from entreg.training.loop import TrainingSettings, train
from tests.training.tiny import FAST, Digits, new_run

RUN = "0123456789ab"
CONFIG = {"method": "tiny", "trainer": {"steps": 12}}


class Objective:
    """Stops with an error instead of a step."""

    def __init__(self, objective, fail_at):
        self.objective, self.fail_at = objective, fail_at
        self.state_dict, self.load_state_dict = objective.state_dict, objective.load_state_dict

    def __call__(self, model, batch, step):
        if step == self.fail_at:
            raise RuntimeError("stopped by the test")
        return self.objective(model, batch, step)


def tracked_training(folder, tracker, *, kill_at=None, fail_at=None, resume="auto", settings=None, **options):
    """Train with the tracker of a configuration in ``<folder>/outputs``; gives the result."""
    torch.set_num_threads(1)
    model, objective, extra = new_run(kill_at)
    chosen = tracker_settings_from_mapping({**tracker, "directory": f"{folder}/outputs"})
    identity = {"config": CONFIG, "experiment": "tests/tiny", "group": "tests/tiny", "name": "tiny", "run_id": RUN}
    try:
        with tracked(chosen, **identity) as one:
            return train(
                model,
                Objective(objective, fail_at),
                Digits(),
                TrainingSettings(**{**FAST, "log_every": 1, **(settings or {})}),
                f"{folder}/run",
                extra_parameters=extra,
                resume=resume,
                device="cpu",
                tracker=one,
                **options,
            )
    finally:
        if "wandb" in sys.modules:
            # As at the end of a process: wandb's service writes its last lines.
            sys.modules["wandb"].teardown()


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    result = tracked_training(arguments.pop("folder"), arguments.pop("tracker"), **arguments)
    print(len(result.history))
