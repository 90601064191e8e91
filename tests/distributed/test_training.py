"""Training in two processes against one: the same losses and weights; a process that dies; fully sharded weights."""

import json
import re
import shutil

import pytest
import torch

from entreg import distributed
from entreg.adapters.language_models import random_language_model
from entreg.errors import ConfigError
from entreg.experiments.paper_costs import state_bytes
from entreg.training.checkpoints import latest_checkpoint, read_checkpoint
from entreg.training.loop import TrainingSettings
from entreg.training.sharding import check_sharding, sharding_wanted
from tests.distributed import training
from tests.distributed.launch import accelerate, launch, sentences
from tests.experiments.language.test_evaluation import TINY

SHARDED = {"ACCELERATE_USE_FSDP": "true"}


def start(directory, *, launcher=None, environment=None, **options):
    """The training in two processes; gives the finished launcher."""
    arguments = json.dumps({"directory": str(directory), **options})
    chosen = {} if launcher is None else {"launcher": launcher}
    return launch("-m", "tests.distributed.training", arguments, **chosen, **(environment or {}))


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(found, wanted):
    """Two directories of runs: equal rows of the log, weights and states of the optimiser."""
    for one, two in zip(rows(found), rows(wanted), strict=True):
        assert one.keys() == two.keys()
        # Means of the parts of a batch are logged in float32.
        few_bits = 4 * torch.finfo(torch.float32).eps
        assert all(one[name] == pytest.approx(two[name], rel=few_bits) for name in one if name != "seconds")
    one, two = (latest_checkpoint(folder / "checkpoints") for folder in (found, wanted))
    assert one.step == two.step == 6
    assert one.model.keys() == two.model.keys()
    for name, value in two.model.items():
        assert value.dtype is torch.float64
        torch.testing.assert_close(one.model[name], value, rtol=1e-9, atol=1e-9)
    moments = one.state["optimizer"]["state"], two.state["optimizer"]["state"]
    assert moments[0].keys() == moments[1].keys()
    for index, values in moments[1].items():
        for name, value in values.items():
            torch.testing.assert_close(moments[0][index][name], value, rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process."""
    directory = tmp_path_factory.mktemp("alone")
    training.run(directory)
    return directory


@pytest.mark.slow
def test_accelerate_gives_the_losses_of_one_process(tmp_path, alone):
    done = start(tmp_path, launcher=accelerate("multi_gpu"))
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path, alone)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("process", "environment"), [(0, {}), (1, SHARDED)])
def test_a_killed_process_ends_the_run_with_one_sentence_and_a_whole_checkpoint(tmp_path, alone, process, environment):
    done = start(tmp_path, kill=[process, 3], environment=environment)
    assert done.returncode != 0
    (sentence,) = sentences(done)
    assert "one of its processes was killed or failed" in sentence
    assert "goes on from the newest checkpoint" in sentence
    # The one of the launcher's report.
    assert done.stderr.count("Traceback") == 1
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert read_checkpoint(folder).step == 2
    # One process goes on where the two were.
    training.run(tmp_path)
    assert_same_training(tmp_path, alone)


@pytest.mark.slow
def test_sharded_processes_go_on_from_the_checkpoint_of_one(tmp_path):
    settings = {"gradient_accumulation": 2, "gradient_checkpointing": True}
    _, model = training.run(tmp_path / "alone", settings)
    shutil.copytree(tmp_path / "alone", tmp_path / "sharded")
    shutil.rmtree(tmp_path / "sharded" / "checkpoints" / "step-00000006")
    done = start(tmp_path / "sharded", settings=settings, launcher=accelerate("fsdp"))
    assert done.returncode == 0, done.stderr
    # The steps up to the checkpoint were not taken again: their rows are those of before, times included.
    assert rows(tmp_path / "sharded")[:4] == rows(tmp_path / "alone")[:4]
    assert rows(tmp_path / "sharded")[5]["seconds"] != rows(tmp_path / "alone")[5]["seconds"]
    # What the first process then holds is what the costs say: half of every weight, rounded up to whole rows.
    held = int(re.search(r"weights of this process: (\d+)", done.stdout)[1])
    gathered = sum(one.numel() for name, one in model.named_parameters() if "layers.1." not in name)
    assert state_bytes(model, 2) == 16 * held + 4 * gathered
    assert held == pytest.approx(sum(one.numel() for one in model.parameters()) / 2, rel=0.02)
    assert_same_training(tmp_path / "sharded", tmp_path / "alone")


@pytest.mark.slow
def test_an_error_of_all_processes_is_said_once(tmp_path):
    done = start(tmp_path, settings={"batch_size": 7})
    assert done.returncode != 0
    assert sentences(done) == ["Error: batch_size 7 must be a multiple of processes x gradient_accumulation, 2 x 1"]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"settings": {"ema_decay": 0.9}}, "the weights are averaged, set ema_decay: null"),
        ({"extra": [torch.nn.Parameter(torch.zeros(1))]}, "parameters are trained that are not the model's"),
        ({"evaluates": True}, "the model is evaluated while it is trained"),
        ({"frozen": True}, "some weights are frozen"),
        ({"model": torch.nn.Linear(2, 2)}, "Linear is no decoder of transformers"),
    ],
)
def test_what_cannot_be_sharded_is_refused(changed, reason):
    model = changed.get("model") or random_language_model("smollm2_135m", TINY).model
    if changed.get("frozen"):
        model.get_output_embeddings().requires_grad_(False)
    settings = TrainingSettings(**changed.get("settings", {}))
    with pytest.raises(ConfigError, match=f"not possible here: {reason}.*multi_gpu.yaml"):
        check_sharding(model, changed.get("extra", []), settings, changed.get("evaluates", False))


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [("FSDP_VERSION", "1", "fsdp_version: 2"), ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params: false")],
)
def test_unsupported_settings_of_the_launcher_are_refused(monkeypatch, variable, value, words):
    monkeypatch.setattr(distributed, "num_processes", lambda: 2)
    assert not sharding_wanted()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert sharding_wanted()
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=words):
        sharding_wanted()
