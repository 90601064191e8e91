"""Every geometry experiment composes and runs in seconds, is resumed, and refuses what it does not know."""

import json

import hydra
import numpy as np
import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

from entreg.cli import CONFIGS
from entreg.errors import ConfigError
from entreg.experiments.geometry import experiment as geometry_experiment
from entreg.experiments.geometry.experiment import experiment_configs, measure_methods, plan_runs
from entreg.experiments.geometry.methods import PROBLEMS, Answer, Method
from entreg.experiments.geometry.printout import report
from entreg.experiments.studies import run_all
from entreg.records.store import RecordStore
from tests.faults.processes import run_program

EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment" / "geometry").glob("*.yaml"))
SINGLE = [name for name in EXPERIMENTS if name != "study"]


@pytest.fixture(autouse=True)
def initialised_hydra():
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


def compose(*overrides: str) -> list[dict]:
    return experiment_configs(hydra.compose("geometry", list(overrides)), overrides)


def planned(*overrides: str) -> list:
    return [run for config in compose(*overrides) for run in plan_runs(config)]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_header_says_what_it_serves_and_how_it_is_run(name):
    header = (CONFIGS / "experiment" / "geometry" / f"{name}.yaml").read_text()
    for word in ("# Serves:", "# Command:", "# Hardware:", "Run time:", "Expected:"):
        assert word in header


@pytest.mark.parametrize("name", SINGLE)
def test_every_experiment_runs_under_the_smoke_profile(name, tmp_path):
    overrides = ["profile=smoke", f"experiment=geometry/{name}", "sizes_of={}"]
    if name == "sensitivity":
        overrides += ["distributions=[disk]", "variant=ball_num_cells_4"]
    runs = planned(*overrides)
    assert runs
    records = run_all(runs, store=tmp_path, command="python scripts/geometry.py")
    for run, record in zip(runs, records, strict=True):
        problem = PROBLEMS[run.problem]
        assert record["scale"] == "smoke"
        assert record["config"]["training"]["steps"] == 6
        methods = [row["method"] for row in record["rows"]]
        assert methods[0] == problem.baseline
        assert {"entreg", "entropy_net_rewrite", "entropy_net_rewrite_free", "entropy_net_advise"} <= set(methods)
        for row in record["rows"]:
            assert row["status"] == "measured"
            assert row["n"] <= 1000
            assert row["seconds"] > 0
        exact = {row["method"]: row for row in record["rows"] if row["kind"] in ("ours", "advise")}
        assert all(row["area_error"] < 1e-12 for row in exact.values())
    text = report(records, tmp_path)
    assert f"{len(records)} geometry records" in text
    assert "entropy net, rewrite" in text or name == "sensitivity"
    # A second call finds all records and computes nothing: the records are the very same.
    assert run_all(runs, store=tmp_path, command="another") == [
        RecordStore(tmp_path).find(run.experiment, run.config) for run in runs
    ]


def test_force_runs_again(tmp_path):
    runs = planned("profile=smoke", "experiment=geometry/hull", "distributions=[circle]")
    first = run_all(runs, store=tmp_path, command="first")
    assert run_all(runs, store=tmp_path, command="second")[0]["command"] == "first"
    second = run_all(runs, store=tmp_path, command="second", force=True)
    assert second[0]["command"] == "second"
    assert second[0]["id"] == first[0]["id"]
    # Everything but times is reproducible.
    for field in ("area_error", "hausdorff", "answer_size"):
        assert [row[field] for row in first[0]["rows"]] == [row[field] for row in second[0]["rows"]]


def test_study_runs_everything_and_the_reproduction_is_a_part_of_it():
    study, part = planned(), planned("profile=reproduce")
    assert {run.experiment for run in study} == {f"geometry/{name}" for name in SINGLE}
    assert {run.seed for run in study} == {0, 1, 2}
    hull = [run for run in study if run.experiment == "geometry/hull"]
    assert len({run.distribution for run in hull}) == 8
    assert all(run.sizes[:2] == (10_000, 100_000) for run in hull)
    million = {run.distribution for run in hull if run.sizes[2:] == (1_000_000,)}
    assert million == {run.distribution for run in hull} - {"parabola", "sorted_runs"}
    assert {run.scale for run in study} == {"offline"}
    assert {run.scale for run in part} == {"reproduce"}
    reference = {(run.experiment, run.distribution, run.seed, run.training): set(run.sizes) for run in study}
    for run in part:
        assert max(run.sizes) <= 100_000
        assert set(run.sizes) <= reference[run.experiment, run.distribution, run.seed, run.training]
    assert {"cities", "square", "circle"} <= {run.distribution for run in part}


def test_overrides_reach_every_experiment_of_a_study():
    runs = planned("distributions=[disk]", "seeds=[5]", "training.steps=7")
    assert {(run.distribution, run.seed, run.training.steps) for run in runs} == {("disk", 5, 7)}


def test_sensitivity_changes_one_factor_at_a_time():
    runs = planned("experiment=geometry/sensitivity", "distributions=[disk]", "seeds=[0]")
    training = {run.variant: run.training for run in runs}
    assert len({repr(value) for value in training.values()}) == len(training)
    for name, settings in training.items():
        base = training["ball" if settings.surrogate == "ball" else "default"]
        changed = [key for key, value in vars(settings).items() if value != getattr(base, key)]
        assert len(changed) <= 1
        assert not changed or changed[0] in name
    factors = {name.rpartition("_")[0].removeprefix("ball_") for name in training if "_" in name}
    assert factors == {"entropy_weight", "num_cells", "sharpness", "initialization", "hidden"}


def test_sweep_lists_all_variants():
    sweep = yaml.safe_load((CONFIGS / "sweep" / "geometry_ablation.yaml").read_text())
    listed = [name.strip() for name in sweep["hydra"]["sweeper"]["params"]["variant"].split(",")]
    experiment = yaml.safe_load((CONFIGS / "experiment" / "geometry" / "sensitivity.yaml").read_text())
    assert listed == list(experiment["variants"])
    assert planned("+sweep=geometry_ablation", "variant=ball")[0].variant == "ball"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("problem=voronoi", "unknown problem 'voronoi'"),
        ("distributions=[moon]", "unknown distribution 'moon'"),
        ("+sizes_of.moon=[10]", "unknown distribution 'moon'"),
        ("variant=nothing", "unknown variant 'nothing'"),
        ("sizes=[5]", "at least 10"),
        ("+training.cells=4", "unknown training setting 'cells'"),
        ("training.surrogate=cube", "surrogate must be"),
        ("training.steps=many", "training"),
        ("training.entropy_weight=-1", "at least 0"),
    ],
)
def test_wrong_configurations_are_one_sentence(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        planned("experiment=geometry/hull", override)
    assert "\n" not in str(caught.value)


def test_script_says_one_sentence_and_fails():
    done = run_program("scripts/geometry.py", "experiment=geometry/hull", "distributions=[moon]")
    assert done.returncode == 2
    assert "unknown distribution 'moon'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_method_that_fails_keeps_its_row_and_the_reason():
    def collinear() -> Answer:
        return Answer(PROBLEMS["hull"].classical(np.zeros((10, 2))))

    methods = {
        "good": Method("baseline", lambda: Answer(np.arange(3))),
        "bad": Method("rewrite", collinear),
    }
    seconds, answers, failures = measure_methods(methods, repeats=3, time_budget=1.0)
    assert list(seconds) == list(answers) == ["good"]
    assert len(seconds["good"]) == 3
    assert failures["bad"].startswith("Qhull failed")


def test_a_killed_run_goes_on_behind_the_sizes_that_it_has_finished(tmp_path, monkeypatch):
    (run,) = planned("profile=smoke", "experiment=geometry/hull", "distributions=[square]", "sizes=[100,200,300]")
    stock, measured, limit = geometry_experiment._rows, [], [2]

    def counted(run, problem, methods, points):
        if len(measured) == limit[0]:
            raise KeyboardInterrupt
        measured.append(len(points))
        return stock(run, problem, methods, points)

    monkeypatch.setattr(geometry_experiment, "_rows", counted)
    with pytest.raises(KeyboardInterrupt):
        run_all([run], store=tmp_path, command="x")
    limit[0] = None
    (record,) = run_all([run], store=tmp_path, command="x")
    assert measured == [100, 200, 300]
    assert list(dict.fromkeys(row["n"] for row in record["rows"])) == [100, 200, 300]


def test_records_are_plain_json(tmp_path):
    (record,) = run_all(
        planned("profile=smoke", "experiment=geometry/hull", "distributions=[square]"), store=tmp_path, command="x"
    )
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["id"] == record["id"]
    assert len(record["metrics"]["sample_before"]) == len(record["metrics"]["sample_after"]) == 400
