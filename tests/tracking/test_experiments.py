"""What a whole vision run, a language run and a geometry run leave in wandb's files, and a run in two processes."""

import json

import hydra
import pytest
from omegaconf import OmegaConf
from PIL import Image

from entreg.cli import CONFIGS
from entreg.experiments.geometry import experiment as geometry_experiment
from entreg.experiments.language import experiment as language_experiment
from entreg.experiments.studies import run_all
from entreg.experiments.vision import experiment as vision_experiment
from entreg.records.record import config_hash
from tests.distributed.launch import launch_forked
from tests.experiments.vision.test_runs import SCENES
from tests.faults.disks import small_disk
from tests.tracking import wandb_files
from tests.tracking.runs import RUN, tracked_training


def composed(entry, folder, *overrides):
    given = ["profile=smoke", "tracker.mode=offline", f"tracker.directory={folder}", "tracker.attention_every=1"]
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = hydra.compose(entry, [*overrides, *given])
    return OmegaConf.to_container(config, resolve=True)


def finished(runs, folder):
    """The records, and of each tracked run its file, rows and tables by name."""
    import wandb

    records = run_all(runs, store=folder / "runs", command="test")
    wandb.teardown()
    found = {}
    for path in wandb_files.parts(folder):
        tables = {}
        for file in sorted(path.parent.glob("files/media/table/*.table.json")):
            content = json.loads(file.read_text())
            rows = [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
            tables[file.name.rsplit("_", 2)[0]] = rows
        run_id = path.stem.removeprefix("run-")
        found[run_id] = (path, wandb_files.history(folder, run_id), tables)
    return records, found


def without_gaps(rows):
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


def test_a_vision_run(tmp_path):
    overrides = [one for one in SCENES if not one.startswith("profile=")]
    values = composed("vision", tmp_path, *overrides, "seed=1", f"checkpoints={tmp_path / 'checkpoints'}")
    run = vision_experiment.plan_run(values)
    (record,), found = finished([run], tmp_path)
    assert set(found) == {config_hash(run.config), config_hash({**run.base_config, "scale": "smoke"})}
    path, rows, tables = found[record["config_hash"]]
    (told,) = wandb_files.only(path, "run")
    assert (told.run_group, told.display_name) == ("vit/digit_scenes", "none seed 1")
    config = {one.key: json.loads(one.value_json) for one in told.config.update}
    assert {key: config[key] for key in run.config} == run.config
    last = record["metrics"]["last_step"]
    (step, row) = rows[-1]
    assert step == last["step"] == 1
    assert row["loss"] == last["loss"]
    # One support per layer, of at most the 148 tokens.
    assert {name for name in row if name.startswith("row_support/")} == {f"row_support/layer_0{one}" for one in (0, 1)}
    assert 1 <= row["row_support/layer_01"] <= 148
    accuracies = [one for one in record["rows"] if "sparsity" in one]
    assert [one["top1"] for one in tables["sparsity_accuracy"]] == [one["top1"] for one in accuracies]
    assert without_gaps(tables["localisation"]) == without_gaps(
        [one for one in record["rows"] if one["plan"] == "localisation"]
    )
    (picture,) = path.parent.glob("files/media/images/overlays*.png")
    # Four scenes, each beside what the first plan of the first reduction keeps.
    assert Image.open(picture).size[1] > 3 * 200


@pytest.mark.slow
def test_a_language_run_that_trains(tmp_path):
    overrides = [
        "experiment=llm/training",
        "trainer.steps=2",
        "profile.language.step_scale=1",
        "trainer.warmup_steps=0",
    ]
    overrides += ["evaluation.tasks.needle=null", "evaluation.tasks.summary=null", "profile.language.plans=[window]"]
    values = composed("language", tmp_path, *overrides, f"checkpoints={tmp_path / 'checkpoints'}")
    run = language_experiment.plan_run(values)
    (record,), found = finished([run], tmp_path)
    ((_, rows, tables),) = found.values()
    assert rows[-1][0] == 2
    assert {"row_support/layer_00", "row_support/layer_01", "loss"} <= set(rows[-1][1])
    copies = [(one["plan"], one["realised_sparsity"], one["loss"]) for one in record["rows"] if one["task"] == "copy"]
    found = [(one["plan"], one["realised_sparsity"], one["loss"]) for one in tables["sparsity_copy"]]
    assert found == copies != []


@pytest.mark.slow
def test_a_geometry_run_is_tracked_when_it_has_been_timed(tmp_path):
    values = composed("geometry", tmp_path, "experiment=geometry/hull", "distributions=[circle]", "sizes=[200]")
    runs = geometry_experiment.plan_runs(values)[:1]
    (record,), found = finished(runs, tmp_path)
    ((path, _, tables),) = found.values()
    assert [one["method"] for one in tables["methods"]] == [one["method"] for one in record["rows"]]
    summary = {
        one.key or "/".join(one.nested_key): json.loads(one.value_json)
        for part in wandb_files.only(path, "summary")
        for one in part.update
    }
    assert summary["result/training_entropy"] == record["metrics"]["training_entropy"]


@pytest.mark.slow
def test_of_two_processes_one_tracks(tmp_path):
    arguments = {"folder": str(tmp_path), "tracker": {"kind": "wandb"}}
    for done in launch_forked("tests/tracking/runs.py", json.dumps(arguments)):
        assert done.returncode == 0, done.stderr
    assert len(wandb_files.parts(tmp_path / "outputs")) == 1
    assert [step for step, _ in wandb_files.history(tmp_path / "outputs", RUN)] == list(range(1, 13))


# TensorBoard's writer ends in a thread of its own.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("kind", ["wandb", "tensorboard"])
def test_a_disk_that_fills_up_stops_tracking_only(tmp_path, kind):
    with small_disk(tmp_path / "outputs", 200, needs_mount=True) as fill:

        def evaluate(model, step):
            if step == 5:
                fill()
            return {}

        result = tracked_training(tmp_path, {"kind": kind}, settings={"evaluate_every": 5}, evaluate=evaluate)
    assert [row["step"] for row in result.history] == list(range(1, 13))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 12
