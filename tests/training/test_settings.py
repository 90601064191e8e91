"""Settings of training: ranges, and configurations that name every one of them."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from entreg.errors import ConfigError
from entreg.training.loop import TrainingSettings, training_settings_from_mapping

CONFIGS = Path(__file__).parents[2] / "configs" / "trainer"


def read(name):
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    for parent in values.pop("defaults", []):
        values = {**read(parent), **values}
    return values


def test_the_default_configuration_names_every_setting_but_the_seed():
    # The seed is the run's.
    assert {*read("default"), "seed"} == {field.name for field in dataclasses.fields(TrainingSettings)}


@pytest.mark.parametrize("name", [path.stem for path in sorted(CONFIGS.glob("*.yaml"))])
def test_configurations_are_settings(name):
    values = read(name)
    settings = training_settings_from_mapping({**values, "seed": 3})
    assert {**dataclasses.asdict(settings)} == {**values, "seed": 3}
    assert settings.parts(processes=8) == 8 * settings.gradient_accumulation


def test_unknown_setting():
    with pytest.raises(ConfigError, match="unknown training setting 'learning', known are steps, batch_size"):
        training_settings_from_mapping({"learning": 1})


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"steps": -1}, "steps must be a whole number of at least 0"),
        ({"batch_size": 2.0}, "batch_size must be a whole number of at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be a whole number"),
        ({"keep_checkpoints": True}, "keep_checkpoints must be a whole number"),
        # How YAML reads a number without a point.
        ({"learning_rate": "1e-3"}, "learning_rate must be a finite number above 0, got '1e-3'"),
        ({"learning_rate": 0.0}, "learning_rate must be a finite number above 0"),
        ({"weight_decay": float("nan")}, "weight_decay must be a finite number at least 0"),
        ({"weight_decay": None}, "weight_decay must be a finite number at least 0"),
        ({"ema_decay": 1.0}, r"ema_decay must be a finite number in \(0, 1\)"),
        ({"layer_decay": 1.5}, "layer_decay must be"),
        ({"clip_norm": 0}, "clip_norm must be"),
        ({"schedule": "step"}, "schedule must be one of cosine, linear, constant"),
        ({"precision": "float16"}, "precision must be one of float32, bfloat16"),
        ({"steps": 10, "warmup_steps": 10}, "warmup_steps must be fewer than steps"),
        ({"batch_size": 10, "gradient_accumulation": 4}, "multiple of processes x gradient_accumulation, 1 x 4"),
        ({"mixup": 0.8}, "need num_classes"),
        ({"cutmix": 0.8, "num_classes": 3, "batch_size": 7}, "even number of images in every part"),
    ],
)
def test_values_out_of_range(values, sentence):
    with pytest.raises(ConfigError, match=sentence):
        TrainingSettings(**values)


def test_a_batch_that_processes_cannot_share_is_refused():
    settings = TrainingSettings(batch_size=12, gradient_accumulation=2)
    assert settings.parts(3) == 6
    with pytest.raises(ConfigError, match="4 x 2"):
        settings.parts(4)


def test_what_does_not_decide_the_weights_is_not_compared():
    one = TrainingSettings(num_workers=1, log_every=3, checkpoint_every=None, keep_checkpoints=9)
    assert one.deciding() == TrainingSettings().deciding()
    assert one.deciding() != TrainingSettings(seed=1).deciding()
