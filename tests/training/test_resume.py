"""A run that is killed and resumed ends with the same weights, to the bit."""

import json
import signal

import numpy as np
import pytest
import torch

from entreg.errors import ConfigError
from entreg.training.checkpoints import latest_checkpoint
from tests.distributed.launch import launch_forked
from tests.faults.processes import run_program
from tests.training.tiny import run

VARIANTS = {
    "plain": {"settings": {}},
    "constant sgd": {"settings": {"optimizer": "sgd", "schedule": "constant", "clip_norm": None}},
    "muon": {"settings": {"optimizer": "muon", "schedule": "linear"}},
    "accumulation": {"settings": {"gradient_accumulation": 4}},
    "average": {"settings": {"ema_decay": 0.9}},
    "noise": {"settings": {}, "data": "NoisyDigits", "augment": True},
    "noise, many at once": {"settings": {}, "data": "ManyDigits", "augment": True},
    "mixing": {"settings": {"mixup": 0.8, "cutmix": 1.0, "num_classes": 3, "mixing_probability": 0.9}},
    "bfloat16": {"settings": {"precision": "bfloat16"}},
    "all": {
        "settings": {"gradient_accumulation": 2, "ema_decay": 0.9, "mixup": 0.8, "num_classes": 3, "num_workers": 2},
        "data": "NoisyDigits",
        "augment": True,
    },
}


class Killed(BaseException):
    """Stands for a signal where a process of its own would take too long."""


def assert_same_run(first, second):
    (model, extra, result), (other, other_extra, other_result) = first, second
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert all(torch.equal(one, two) for one, two in zip(extra, other_extra, strict=True))
    strip = [
        [{key: row[key] for key in row if key != "seconds"} for row in one.history] for one in (result, other_result)
    ]
    assert strip[0] == strip[1]
    saved, other_saved = (latest_checkpoint(one.directory / "checkpoints") for one in (result, other_result))
    assert saved.step == other_saved.step == result.steps
    assert str(saved.state["optimizer"]) == str(other_saved.state["optimizer"])
    assert saved.state["objective"] == other_saved.state["objective"]


@pytest.mark.parametrize("name", VARIANTS)
def test_interrupted_run_ends_with_the_same_bits(tmp_path, name):
    variant = VARIANTS[name]
    whole = run(tmp_path / "whole", **variant)
    step = int(np.random.default_rng(list(name.encode())).integers(3, 12))

    def interrupt(model, done):
        raise Killed if done == step else AssertionError

    stopped = {**variant, "settings": {**variant["settings"], "evaluate_every": step}, "evaluate": interrupt}
    with pytest.raises(Killed):
        run(tmp_path / "halves", **stopped)
    assert latest_checkpoint(tmp_path / "halves" / "checkpoints").step == step - 1 - (step - 1) % 3
    assert_same_run(whole, run(tmp_path / "halves", **variant))


def test_number_of_workers_changes_nothing(tmp_path):
    variant = {"data": "NoisyDigits", "augment": True}
    none = run(tmp_path / "none", {}, **variant)
    assert_same_run(none, run(tmp_path / "two", {"num_workers": 2}, **variant))


def in_a_process(directory, variant, kill_at=None):
    arguments = json.dumps({"directory": str(directory), "kill_at": kill_at, **variant})
    return run_program("tests/training/tiny.py", arguments)


def in_two_processes(directory, variant):
    """What they wrote to standard error."""
    first, second = launch_forked("tests/training/tiny.py", json.dumps({"directory": str(directory), **variant}))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    return first.stderr


def final_weights(directory):
    found = latest_checkpoint(directory / "checkpoints")
    return {**found.model, **{f"averaged {name}": value for name, value in (found.averaged or {}).items()}}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "all"])
def test_process_killed_at_a_random_step_ends_with_the_same_bits(tmp_path, name):
    variant = VARIANTS[name]
    assert in_a_process(tmp_path / "whole", variant).returncode == 0
    for kill_at in sorted(np.random.default_rng(len(name)).choice(np.arange(1, 12), 2, replace=False)):
        killed = in_a_process(tmp_path / "halves", variant, int(kill_at))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert in_a_process(tmp_path / "halves", variant).returncode == 0
    wanted, found = final_weights(tmp_path / "whole"), final_weights(tmp_path / "halves")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation": 2, "mixup": 0.5, "cutmix": 0.5, "num_classes": 3, "ema_decay": 0.9}],
)
def test_two_processes_equal_one(tmp_path, settings):
    # In float64, where the order of summation, which differs, decides the ninth digit at most.
    variant = {"settings": {**settings, "clip_norm": 0.1}, "dropout": 0.0, "augment": True, "double": True}
    in_two_processes(tmp_path / "two", variant)
    _, _, result = run(tmp_path / "one", **variant)
    wanted, found = final_weights(tmp_path / "one"), final_weights(tmp_path / "two")
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)
    rows = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [row["step"] for row in result.history]
    # Means over both processes' halves of the batch, logged in float32.
    tolerance = 4 * np.finfo(np.float32).eps
    np.testing.assert_allclose([row["task"] for row in rows], [row["task"] for row in result.history], rtol=tolerance)
    if not settings:
        return
    # The interrupted run of two processes goes on, too, here in the variant with everything.
    for path in (tmp_path / "two" / "checkpoints").glob("step-00000012"):
        (path / "state.json").write_text("{}")
    assert "damaged" in in_two_processes(tmp_path / "two", variant)
    repeated = final_weights(tmp_path / "two")
    assert all(torch.equal(value, repeated[name]) for name, value in found.items())


def test_finished_run_is_read_and_not_trained_again(tmp_path):
    first = run(tmp_path, {"ema_decay": 0.9})
    again = run(tmp_path, {"ema_decay": 0.9}, kill_at=0, evaluate=lambda model, step: pytest.fail("evaluated"))
    assert_same_run(first, again)
    assert again[2].seconds == first[2].seconds
    assert again[2].checkpoint == first[2].checkpoint == tmp_path / "checkpoints" / "step-00000012"


def test_start_again_removes_what_is_there(tmp_path):
    run(tmp_path / "a", {"seed": 1})
    other = run(tmp_path / "a", {"steps": 6}, resume=None)
    assert_same_run(run(tmp_path / "b", {"steps": 6}), other)
    assert [path.name for path in sorted((tmp_path / "a" / "checkpoints").iterdir())] == [
        "step-00000003",
        "step-00000006",
    ]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"settings": {"learning_rate": 0.02}}, "settings.learning_rate was 0.01 and is now 0.02"),
        ({"settings": {"steps": 24}}, "settings.steps was 12 and is now 24"),
        ({"settings": {}, "configuration": {"term": {"weight": 2}}}, "configuration.term.weight was 1 and is now 2"),
    ],
)
def test_another_configuration_is_refused_in_one_sentence(tmp_path, changed, sentence):
    run(tmp_path, {}, configuration={"term": {"weight": 1}, "layers": (0, 1)})
    options = {"configuration": {"term": {"weight": 1}, "layers": [0, 1]}, **changed}
    with pytest.raises(ConfigError, match=f"is of another run: {sentence}; choose another folder"):
        run(tmp_path, options.pop("settings"), **options)


def test_what_does_not_decide_the_weights_may_change(tmp_path):
    first = run(tmp_path, {})
    again = run(tmp_path, {"num_workers": 2, "keep_checkpoints": 5, "checkpoint_every": None, "log_every": 1})
    assert_same_run(first, again)


def test_damaged_newest_checkpoint_is_passed_over_and_never_outlives_good_ones(tmp_path, capfd):
    whole = run(tmp_path, {"keep_checkpoints": 1})
    # A checkpoint of a later step than the run will write, damaged, must not push out the good ones.
    shown = tmp_path / "checkpoints" / "step-00000099"
    shown.mkdir()
    (shown / "state.json").write_text("{")
    capfd.readouterr()
    assert_same_run(whole, run(tmp_path, {"keep_checkpoints": 1}))
    sentences = [line for line in capfd.readouterr().err.splitlines() if "damaged" in line]
    assert len(sentences) == 1
    assert "step-00000099 is damaged" in sentences[0]
    assert "goes on from the older step-00000012" in sentences[0]
    assert not shown.exists()
