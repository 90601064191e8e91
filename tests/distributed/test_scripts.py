"""The scripts under launchers: one process's losses and numbers, written and printed once."""

import json

import pytest

from tests.distributed.launch import TORCHRUN, accelerate, launch

VISION = (
    "scripts/train.py",
    "profile=smoke",
    # Bfloat16, and a high learning rate in many steps, would let roundings grow.
    "trainer.precision=float32",
    "base.trainer.precision=float32",
    "base.trainer.optimizer=adamw",
    "base.trainer.steps=400",
    "base.trainer.learning_rate=0.001",
    "trainer.log_every=1",
    "base.trainer.log_every=1",
    "regularizer=row_entropy",
    "+regularizer.penalties.row_entropy.schedule=target",
    "+regularizer.penalties.row_entropy.target=1.0",
    "+regularizer.penalties.row_entropy.gain=0.5",
    "+regularizer.penalties.row_entropy.minimum_weight=0.001",
    "evaluation.localisation.scores=[mixed]",
    "evaluation.plans.setting_b=null",
    "evaluation.plans.columns=null",
    "evaluation.plans.tokens=null",
)
LANGUAGE = (
    "scripts/language.py",
    "experiment=llm/training",
    "profile=smoke",
    "study.seeds=[0]",
    "profile.language.methods=[plain]",
    "trainer.precision=float32",
    "trainer.log_every=1",
    "evaluation.plans.window=null",
)


def numbers(value):
    """The numbers in a record's part, in order, without times."""
    if isinstance(value, dict):
        return [one for key in sorted(value) if "seconds" not in key for one in numbers(value[key])]
    if isinstance(value, list):
        return [one for item in value for one in numbers(item)]
    return [value] if isinstance(value, int | float) else []


def outcome(folder, words, launcher):
    """The record, the logs of training and what was printed."""
    done = launch(*words, f"store={folder / 'runs'}", f"checkpoints={folder / 'checkpoints'}", launcher=launcher)
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "runs").glob("*.json")
    logs = sorted((folder / "checkpoints").glob("*/metrics.jsonl"))
    rows = [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]
    return json.loads(path.read_text()), rows, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "launcher", "logs"),
    [(VISION, TORCHRUN, 2), (LANGUAGE, accelerate("fsdp"), 1)],
    ids=["vision by torchrun", "a sharded decoder by accelerate"],
)
def test_two_processes_leave_the_record_of_one(tmp_path, words, launcher, logs):
    record, rows, printed = outcome(tmp_path / "two", words, launcher)
    wanted, expected, told = outcome(tmp_path / "one", words, ())
    assert len(rows) == len(expected) == logs
    # Scripts train in float32: what differs is the order of sums, 2^-24 at each, which few and small steps of Adam let
    # grow by some thousands at most. What several processes compute to the ninth digit, other tests see in float64.
    losses = [row["loss"] for log in rows for row in log]
    assert losses == pytest.approx([row["loss"] for log in expected for row in log], rel=1e-4)
    assert len(losses) >= 4
    assert numbers(rows) == pytest.approx(numbers(expected), rel=1e-2, abs=1e-6)
    assert record["config_hash"] == wanted["config_hash"]
    # The weights differ by roundings, and an answer may hang on one.
    assert len(record["rows"]) == len(wanted["rows"]) > 1
    for one, two in zip(record["rows"], wanted["rows"], strict=True):
        assert one.keys() == two.keys()
        if "loss" in one:
            assert one["loss"] == pytest.approx(two["loss"], rel=1e-2)
    assert printed.count("run 1 of 1") == 1
    assert len(printed.splitlines()) == len(told.splitlines())
