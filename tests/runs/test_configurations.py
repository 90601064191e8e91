"""Launchers, ready sweeps and the alias of the issue are what their files say."""

import importlib
import re
import subprocess

import hydra
import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

from entreg.cli import CONFIGS
from entreg.experiments.geometry.experiment import experiment_configs, plan_runs
from entreg.runs.multirun import sweep_name

LAUNCHERS = sorted(path.stem for path in (CONFIGS / "launcher").glob("*.yaml"))
SWEEPS = sorted(path.stem for path in (CONFIGS / "sweep").glob("*.yaml"))


@pytest.fixture(autouse=True)
def initialised_hydra():
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


def params(name):
    """Of a sweep: key to its values, as Hydra splits them."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    content = yaml.safe_load((CONFIGS / "sweep" / f"{name}.yaml").read_text())
    texts = [f"{key}={value}" for key, value in content["hydra"]["sweeper"]["params"].items()]
    parsed = OverridesParser.create().parse_overrides(texts)
    return {
        one.key_or_group: [yaml.safe_load(text) for text in one.sweep_string_iterator()]
        for one in parsed
        if one.is_sweep_override() and one.is_discrete_sweep()
    }


def test_launchers_are_those_of_the_issue():
    assert LAUNCHERS == ["basic", "joblib", "submitit_local", "submitit_slurm"]


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("entry", ["vision", "language", "geometry"])
def test_launchers_compose_with_every_script(name, entry):
    config = hydra.compose(entry, [f"launcher={name}"], return_hydra_config=True)
    target = config.hydra.launcher._target_
    module, _, cls = target.rpartition(".")
    assert hasattr(importlib.import_module(module), cls)
    assert name.partition("_")[0] in target.lower()
    # The launcher decides nothing of the run.
    assert "launcher" not in config
    if name == "submitit_slurm":
        assert (config.hydra.launcher.gpus_per_node, config.hydra.launcher.max_num_timeout) == (1, 20)
        # Further options of the plugin are there to be set.
        again = hydra.compose(entry, [f"launcher={name}", "hydra.launcher.qos=high"], return_hydra_config=True)
        assert again.hydra.launcher.qos == "high"


@pytest.mark.parametrize("name", SWEEPS)
def test_sweeps_say_what_they_vary_and_how_they_are_run(name):
    header = (CONFIGS / "sweep" / f"{name}.yaml").read_text()
    assert f"+sweep={name}" in header
    assert "# Command:" in header


@pytest.mark.parametrize(
    ("name", "entry", "seeds"), [("vit", "vision", 5), ("cifar", "vision", 5), ("llm", "language", 3)]
)
def test_ready_sweeps_have_all_methods_and_seeds(name, entry, seeds):
    config = hydra.compose(entry, [f"+sweep={name}"])
    varied = params(name)
    assert sorted(one for (one,) in varied[f"profile.{entry}.methods"]) == sorted(config.study.methods)
    assert varied["study.seeds"] == [[seed] for seed in range(seeds)]
    header = (CONFIGS / "sweep" / f"{name}.yaml").read_text()
    for word in ("# Varies:", "# Run time:", f"make sweep-{name}"):
        assert word in header


def test_the_geometry_sweep_is_the_study_without_its_sensitivity():
    varied = params("geometry")
    study = {
        (run.experiment, run.distribution, run.seed)
        for config in experiment_configs(hydra.compose("geometry"), [])
        for run in plan_runs(config)
        if run.experiment != "geometry/sensitivity"
    }
    jobs = {
        (experiment, distribution, seed)
        for experiment in varied["experiment"]
        for (distribution,) in varied["distributions"]
        for (seed,) in varied["seeds"]
    }
    assert jobs == study


def test_the_search_is_for_what_it_names():
    composed = hydra.compose("vision", ["+sweep=vit_search"], return_hydra_config=True)
    assert "optuna" in composed.hydra.sweeper._target_
    assert composed.hydra.sweeper.direction == composed.objective.direction == "maximize"
    assert composed.objective.name == "sparse_accuracy"
    searched = {key.rpartition(".")[2] for key, value in composed.hydra.sweeper.params.items() if "(" in value}
    assert searched == {"weight", "warmup_steps", "schedule", "budget"}


def test_make_hands_launcher_and_jobs_on():
    def printed(*arguments):
        done = subprocess.run(
            ["make", "-n", "--no-print-directory", *arguments],
            cwd=CONFIGS.parent,
            capture_output=True,
            text=True,
            check=True,
        )
        return " ".join(done.stdout.splitlines()[-1].split())

    assert re.search(r"scripts/vision.py -m \+sweep=vit profile=offline launcher=basic$", printed("sweep-vit"))
    assert printed("sweep-cifar", "JOBS=4").endswith(
        "+sweep=cifar profile=offline launcher=joblib hydra.launcher.n_jobs=4"
    )
    slurm = printed("sweep-llm", "LAUNCHER=submitit_slurm", "JOBS=8", "PROFILE=paper")
    assert slurm.endswith("profile=paper launcher=submitit_slurm hydra.launcher.array_parallelism=8")
    assert "scripts/geometry.py -m +sweep=geometry" in printed("sweep-geometry")
    assert "scripts/status.py" in printed("status")


def test_a_sweep_is_named_by_what_it_runs_and_not_by_how():
    name = sweep_name(["scripts/train.py", "-m", "seed=0,1", "experiment=vit/digit_scenes"])
    assert name.startswith("vit-digit_scenes-")
    assert name == sweep_name(
        [
            "/elsewhere/train.py",
            "experiment=vit/digit_scenes",
            "-m",
            "launcher=joblib",
            "hydra.launcher.n_jobs=2",
            "seed=0,1",
        ]
    )
    others = [
        ["scripts/train.py", "-m", "seed=0,1,2", "experiment=vit/digit_scenes"],
        ["scripts/vision.py", "-m", "seed=0,1", "experiment=vit/digit_scenes"],
        ["scripts/train.py", "-m", "seed=0,1", "experiment=vit/sensitivity"],
    ]
    assert len({name, *map(sweep_name, others)}) == 4
    assert sweep_name(["train.py", "-m", "+sweep=vit"]).startswith("vit-")
    # A name that is no name of a folder.
    assert sweep_name(["train.py", "-m", "experiment=vit/a,vit/b"]).startswith("train-")
