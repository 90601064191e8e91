"""Every vision experiment composes, runs in seconds, is resumed, and says at once what is missing."""

import hydra
import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from entreg.cli import CONFIGS
from entreg.data.corruptions import CORRUPTIONS
from entreg.errors import AssetError, ConfigError
from entreg.experiments.studies import run_all, study_configs
from entreg.experiments.vision import evaluation as vision_evaluation
from entreg.experiments.vision import experiment as vision_experiment
from entreg.experiments.vision.experiment import plan_run
from entreg.experiments.vision.printout import report
from entreg.records.store import RecordStore
from tests.data.official_layouts import random_pixels, write_cifar100, write_corruptions, write_image_folder
from tests.faults.processes import run_program

EXPERIMENTS = [
    f"{family}/{path.stem}"
    for family in ("vit", "cifar")
    for path in sorted((CONFIGS / "experiment" / family).glob("*.yaml"))
]
SYNSETS = ["n01440764", "n01443537", "n15075141"]

# Seconds instead of hours: one step of few images through a shallow model.
TINY = [
    "profile=smoke",
    "model.options.depth=2",
    "model.options.embed_dim=16",
    "base.trainer.steps=1",
    "base.trainer.warmup_steps=0",
    "base.trainer.batch_size=4",
    "trainer.steps=1",
    "trainer.batch_size=4",
    "trainer.warmup_steps=0",
    "evaluation.limit=6",
    "evaluation.batch_size=6",
]
SCENES = [
    *TINY,
    "experiment=vit/digit_scenes",
    "evaluation.plans.setting_a.reductions=[drop]",
    "evaluation.plans.setting_a.scores=[mixed,received]",
    "evaluation.plans.setting_b=null",
    "evaluation.plans.columns=null",
    "evaluation.plans.tokens.levels=[0.5]",
    "evaluation.localisation.scores=[mixed,magnitude]",
]
DIGITS = [
    *TINY,
    "experiment=cifar/digits",
    "evaluation.plans.tokens.reductions=[drop]",
    "evaluation.plans.tokens.scores=[mixed]",
    "evaluation.robustness.severities=[1]",
    "evaluation.robustness.extra=false",
]


@pytest.fixture(autouse=True)
def initialised_hydra():
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


def planned(folder, *overrides):
    overrides = [*overrides, f"checkpoints={folder / 'checkpoints'}"]
    return [plan_run(one) for one in study_configs(hydra.compose("vision", overrides), overrides, "vision")]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_header_says_what_it_serves_and_how_it_is_run(name):
    header = (CONFIGS / "experiment" / f"{name}.yaml").read_text()
    for word in ("# Serves:", "# Command:", "# Hardware:", "Run time:", "# Expected:"):
        assert word in header


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_method_of_every_experiment_is_accepted(name, tmp_path):
    runs = planned(tmp_path, f"experiment={name}", "study.seeds=[0]")
    methods = [run.config["method"] for run in runs]
    assert methods[0] == "plain"
    assert len(set(methods)) == len(methods) >= 3
    assert any(method.startswith("ours") for method in methods)
    assert {run.experiment for run in runs} == {name}
    # Only the method differs: all start from one dense model.
    assert len({repr(run.base_config) for run in runs}) == 1
    deciding = [{key: run.config[key] for key in ("trainer", "regularizer", "sparsity")} for run in runs]
    assert len({repr(one) for one in deciding}) == len(runs)


def test_sensitivity_changes_one_factor_at_a_time(tmp_path):
    runs = planned(tmp_path, "experiment=vit/sensitivity")
    methods = {run.config["method"]: flat(run.config) for run in runs}
    bases = ("key_entropy", "ball", "ours_a")
    variants = [name for name in methods if name not in ("plain", *bases)]
    assert len(variants) >= 20
    for name in variants:
        (base,) = [one for one in bases if name.startswith(f"{one}_")]
        before, after = ({k: v for k, v in methods[one].items() if k != "method"} for one in (base, name))
        changed = [key for key in before | after if before.get(key) != after.get(key)]
        # One value, or the one penalty that the name says.
        penalty = name.startswith("ours_a_entropy") and all(key.startswith("regularizer.") for key in changed)
        assert len(changed) == 1 or penalty, (name, changed)


def flat(values, prefix=""):
    """Nested mappings as one, keys with dots."""
    result = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = tuple(value) if isinstance(value, list) else value
    return result


def test_methods_and_seeds_follow_the_profile(tmp_path):
    runs = planned(tmp_path, "profile=reproduce")
    whole = hydra.compose("vision").study.methods
    assert {"plain", "ours_a"} <= {run.config["method"] for run in runs} < set(whole)
    assert {run.config["seed"] for run in runs} == {0}
    runs = planned(tmp_path, "profile.vision.methods=[ball]", "profile.seeds=[4,5]")
    assert [(run.config["method"], run.config["seed"]) for run in runs] == [("ball", 4), ("ball", 5)]
    (run,) = planned(tmp_path, "profile=smoke", "profile.vision.methods=[plain]")
    assert run.config["scale"] == "smoke"
    assert (run.config["base"]["trainer"]["steps"], run.config["trainer"]["steps"]) == (48, 4)
    assert run.config["evaluation"]["limit"] == 40


def test_scenes_run_are_found_again_and_forced(tmp_path):
    runs = planned(tmp_path, *SCENES)
    assert [run.config["method"] for run in runs] == ["plain", "ours_a"]
    records = run_all(runs, store=tmp_path / "runs", command="first")
    for record in records:
        assert (record["scale"], record["command"], record["seed"]) == ("smoke", "first", 0)
        assert record["metrics"]["training_steps"] == 1
        rows = record["rows"]
        assert {row["split"] for row in rows} == {"validation", "test"}
        found = [(row["plan"], row["level"], row["score"]) for row in rows if row["split"] == "test"]
        assert found[:4] == [
            ("dense", None, None),
            ("setting_a", None, "mixed"),
            ("setting_a", None, "received"),
            ("tokens", 0.5, "mixed"),
        ]
        # Two layers and their mean, by two scores.
        assert [plan for plan, _, _ in found[4:]] == ["localisation"] * 6
        for row in rows:
            if row["plan"] != "localisation":
                assert row["images"] == 6
                assert 0 <= row["top1"] <= 1
        assert next(row for row in rows if row["plan"] == "tokens")["sparsity"] == pytest.approx(0.5, abs=0.03)
    # One dense model was trained for both.
    assert len(list((tmp_path / "checkpoints").glob("*dense*"))) == 1
    assert f"2 vision records in {tmp_path / 'runs'}" in report(records, tmp_path / "runs")
    store = RecordStore(tmp_path / "runs")
    assert run_all(runs, store=store.root, command="second") == [store.find(run.experiment, run.config) for run in runs]
    forced = run_all(runs[:1], store=store.root, command="third", force=True)
    assert forced[0]["command"] == "third"
    assert forced[0]["id"] == records[0]["id"]
    assert forced[0]["rows"] == records[0]["rows"]


def test_digits_run_on_corrupted_images(tmp_path):
    runs = planned(tmp_path, *DIGITS)
    assert [run.config["method"] for run in runs] == ["plain", "ours"]
    (record, _) = run_all(runs, store=tmp_path / "runs", command="first")
    rows = [row for row in record["rows"] if row["plan"] == "robustness"]
    cells = [(row["setting"], row["corruption"], row["severity"]) for row in rows]
    assert cells == [(setting, name, 1) for setting in ("dense", "sparse") for name in CORRUPTIONS]
    # One severity of five: a mean, but not the mean corruption error.
    assert record["metrics"]["mce_dense"] is record["metrics"]["mce_sparse"] is None
    errors = [row["error"] for row in rows if row["setting"] == "dense"]
    assert record["metrics"]["corrupted_error_dense"] == pytest.approx(np.mean(errors))
    assert run_all(runs, store=tmp_path / "runs", command="second")[0]["command"] == "first"


class Killed(BaseException):
    """Ends a run as a kill does: nothing that it has not written is kept."""


def test_a_killed_evaluation_goes_on_behind_what_it_has_finished(tmp_path, monkeypatch):
    (run, _) = planned(tmp_path, *DIGITS)
    (whole,) = run_all([run], store=tmp_path / "whole", command="x")
    stock, evaluated, limit = vision_evaluation.evaluate, [], [20]

    def counted(*arguments, **settings):
        if len(evaluated) == limit[0]:
            raise Killed
        evaluated.append(1)
        return stock(*arguments, **settings)

    monkeypatch.setattr(vision_evaluation, "evaluate", counted)
    with pytest.raises(Killed):
        run_all([run], store=tmp_path / "runs", command="x")
    limit[0] = None
    (record,) = run_all([run], store=tmp_path / "runs", command="x")
    assert record["rows"] == whole["rows"]
    ours = ("mce_dense", "mce_sparse", "corrupted_error_dense", "corrupted_error_sparse")
    assert [record["metrics"][name] for name in ours] == [whole["metrics"][name] for name in ours]
    # What was finished was measured once in both attempts.
    assert len(evaluated) == len(record["rows"])
    assert list((tmp_path / "runs").glob("*/measures.json")) == []


def test_missing_corruptions_show_before_a_model_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(vision_experiment, "vision_model", lambda *args, **kwargs: pytest.fail("a model was built"))
    write_cifar100(tmp_path, (random_pixels(200), np.arange(200) % 100), (random_pixels(5, 1), np.arange(5)))
    runs = planned(tmp_path, "experiment=cifar/cifar100", "profile=paper", f"data.root={tmp_path}")
    with pytest.raises(AssetError, match="CIFAR-100-C"):
        run_all(runs[:1], store=tmp_path / "runs", command="x")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["device=tpu"], "device must be one of auto, cpu, cuda"),
        (["evaluation.precision=float16"], "evaluation.precision"),
        (["evaluation.plans.setting_a.before_layer=-1"], "before_layer"),
        (["+evaluation.plans.setting_a.kep=3"], "kep"),
        (["+base.curriculum.cell=2"], "unknown key 'cell' of base.curriculum"),
        (["base.curriculum.cells=0"], "out of range"),
        (["trainer.steps=10", "trainer.warmup_steps=10"], "warmup_steps"),
        (["regularizer=l1_gate"], "sparsity=gate"),
        (["regularizer=ball", "regularizer.penalties.ball.quantity=cube"], "cube"),
        (["regularizer=ball", "+regularizer.penalties.ball.wieght=1.0"], "wieght"),
        (["sparsity=setting_a", "sparsity.score=best"], "best"),
    ],
)
def test_wrong_configurations_are_one_sentence_before_anything_runs(overrides, message):
    config = OmegaConf.to_container(hydra.compose("vision", overrides), resolve=True)
    with pytest.raises(ConfigError, match=message) as caught:
        plan_run(config)
    assert "\n" not in str(caught.value)


def script(*arguments):
    return run_program("scripts/vision.py", *arguments)


@pytest.mark.parametrize(
    ("experiment", "words"),
    [
        ("vit/imagenet", ["/nowhere", "https://image-net.org", "data.root"]),
        ("cifar/cifar100", ["/nowhere", "https://www.cs.toronto.edu", "data.download=true"]),
    ],
)
def test_the_papers_commands_say_what_is_missing(experiment, words, tmp_path):
    done = script(
        f"experiment={experiment}",
        "profile=paper",
        "data.root=/nowhere",
        f"store={tmp_path / 'runs'}",
        f"checkpoints={tmp_path / 'checkpoints'}",
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    sentences = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(sentences) == 1
    for word in words:
        assert word in sentences[0]
    assert not list((tmp_path / "checkpoints").glob("*"))


# The paper's commands on miniatures: what is left of the paper's is the data's layout and the experiment.
MINIATURE = [
    "profile=paper",
    "profile.seeds=[0]",
    "model.pretrained=false",
    *(f"+model.options.{key}={value}" for key, value in {"depth": 6, "embed_dim": 32, "num_heads": 2}.items()),
    *(f"+model.options.{key}={value}" for key, value in {"img_size": 48, "patch_size": 4}.items()),
    "+data.preprocessing.input_size=[3,48,48]",
    "trainer.steps=1",
    "trainer.warmup_steps=0",
    "trainer.batch_size=4",
    "trainer.num_workers=0",
    "trainer.precision=float32",
    "evaluation.precision=float32",
    "evaluation.batch_size=6",
    "device=cpu",
]


@pytest.mark.slow
def test_the_papers_vit_command_runs_on_a_miniature(tmp_path):
    write_image_folder(tmp_path / "data", "train", SYNSETS, per_class=4)
    write_image_folder(tmp_path / "data", "val", SYNSETS, per_class=2)
    done = script(
        "experiment=vit/imagenet",
        *MINIATURE,
        "profile.vision.methods=[plain,ours_a]",
        "evaluation.plans.columns.levels=[0.5]",
        f"data.root={tmp_path / 'data'}",
        "data.subset=true",
        f"tracker.directory={tmp_path}",
        f"store={tmp_path / 'runs'}",
        f"checkpoints={tmp_path / 'checkpoints'}",
    )
    assert done.returncode == 0, done.stderr
    # Tracked by default, down to the pictures.
    assert "track" not in done.stderr
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/overlays*.png"))) == 2
    records = RecordStore(tmp_path / "runs").load_all()
    assert [record["config"]["method"] for record in records if record["scale"] == "paper"].count("ours_a") == 1
    assert len(records) == 2
    for record in records:
        assert {row["images"] for row in record["rows"] if row["split"] == "test"} == {6}
        setting = [row for row in record["rows"] if row["plan"] == "setting_a"]
        assert all(row["sparsity"] == pytest.approx(0.8, abs=0.02) for row in setting)
        assert record["dataset"]["images"] == {"train": 9, "validation": 3, "test": 6}
    assert "Setting A: fewer patch tokens from layer 1 on" in done.stdout
    assert "vit-top1" in done.stdout


@pytest.mark.slow
def test_the_papers_cifar_command_runs_on_a_miniature(tmp_path):
    labels = np.arange(200) % 100
    write_cifar100(tmp_path, (random_pixels(200), labels), (random_pixels(4, 1), labels[:4]))
    write_corruptions(tmp_path / "CIFAR-100-C", labels[:4])
    done = script(
        "experiment=cifar/cifar100",
        *MINIATURE,
        "profile.vision.methods=[plain,ours]",
        "base.trainer.steps=1",
        "base.trainer.warmup_steps=0",
        "base.trainer.batch_size=4",
        "base.trainer.precision=float32",
        "evaluation.limit=4",
        f"data.root={tmp_path}",
        f"tracker.directory={tmp_path}",
        f"store={tmp_path / 'runs'}",
        f"checkpoints={tmp_path / 'checkpoints'}",
    )
    assert done.returncode == 0, done.stderr
    records = RecordStore(tmp_path / "runs").load_all()
    assert sorted(record["config"]["method"] for record in records) == ["ours", "plain"]
    for record in records:
        counted = [
            row["error"]
            for row in record["rows"]
            if row["plan"] == "robustness" and row["setting"] == "dense" and row["corruption"] in CORRUPTIONS
        ]
        assert len(counted) == 75
        assert record["metrics"]["mce_dense"] == pytest.approx(np.mean(counted))
    assert "Mean corruption error" in done.stdout
    assert "cifar-mce" in done.stdout
