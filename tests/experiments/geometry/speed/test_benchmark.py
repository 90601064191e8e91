"""The geometry benchmarks: rows against independent facts, budgets, resuming, and configurations."""

import json
from dataclasses import replace

import hydra
import numpy as np
import pytest
from hydra.utils import get_method
from omegaconf import OmegaConf

from entreg.cli import CONFIGS
from entreg.errors import ConfigError
from entreg.experiments.geometry.speed import benchmark as geometry_speed
from entreg.experiments.geometry.speed.benchmark import (
    COHERENT_POINT_SETS,
    MEASURED,
    NOT_RUN,
    benchmark_points,
    hull_family,
    measure,
    run_geometry_speed,
)
from entreg.experiments.geometry.speed.rivals import HULL_RIVALS, Rival
from entreg.geometry.generators import generate
from entreg.records.store import RecordStore

SMOKE = {"name": "smoke", "repeats": 2, "seeds": [0], "geometry": {"max_points": 1_000}}


def run(tmp_path, **changes):
    settings = {
        "problem": "hull",
        "distributions": ["square"],
        "sizes": [10, 200, 50_000],
        "time_budget": 5.0,
        "profile": SMOKE,
        "store": tmp_path,
        "command": "test",
    }
    return run_geometry_speed(**{**settings, **changes})


def test_hull_rows(tmp_path):
    (path,) = run(tmp_path)
    record = json.loads(path.read_text())
    assert record["experiment"] == "benchmark/geometry_hull/square"
    assert record["scale"] == "smoke"
    rows = record["rows"]
    # Sizes beyond the profile's limit are left out.
    assert {row["n"] for row in rows} == {10, 200}
    assert set(HULL_RIVALS) | {"entreg", "entreg_1_thread", "entreg_float32"} <= {row["method"] for row in rows}
    by_method = {row["method"]: row for row in rows if row["n"] == 200}
    for row in by_method.values():
        assert row["status"] == MEASURED
        assert row["repeats"] == 2
        assert 0 < row["seconds_min"] <= row["seconds_median"] <= row["seconds_max"]
        assert row["ratio_to_qhull"] == pytest.approx(by_method["qhull"]["seconds_median"] / row["seconds_median"])
        if row["kind"] not in ("limit", "conversion"):
            assert row["exact"] is True
            assert row["missing"] == row["extra"] == 0
    libraries = [by_method[name] for name in ("qhull", "geos", "opencv")]
    fastest = min(libraries, key=lambda row: row["seconds_median"])
    assert by_method["entreg"]["fastest_rival"] == fastest["method"]
    assert record["metrics"]["ratio_to_qhull"]["200"] == by_method["entreg"]["ratio_to_qhull"]


@pytest.mark.parametrize(("problem", "baseline"), [("pareto", "numpy_lexsort"), ("delaunay", "qhull")])
def test_other_problems(tmp_path, problem, baseline):
    (path,) = run(tmp_path, problem=problem, sizes=[150], distributions=["gaussian"])
    rows = json.loads(path.read_text())["rows"]
    checked = [row for row in rows if row["kind"] != "limit"]
    assert len(checked) >= 4
    assert all(row["exact"] for row in checked)
    assert next(row for row in rows if row["method"] == baseline)[f"ratio_to_{baseline}"] == 1.0


def test_only_missing_records_are_run(tmp_path, monkeypatch):
    first = run(tmp_path, sizes=[10])
    before = first[0].read_bytes()
    monkeypatch.setattr(geometry_speed, "measure", lambda *_, **__: pytest.fail("ran again"))
    assert run(tmp_path, sizes=[10]) == first
    monkeypatch.undo()
    both = run(tmp_path, sizes=[10], distributions=["square", "disk"])
    assert both[0] == first[0]
    assert len(RecordStore(tmp_path).load_all()) == 2
    assert before == first[0].read_bytes()
    run(tmp_path, sizes=[10], force=True)
    assert before != first[0].read_bytes()


def test_methods_over_their_budget_say_so():
    family = hull_family()
    points = generate("square", 100, 0)
    rows = measure(family, points, repeats=1, time_budget=1.0, expected={"qhull": 2.0, "qhull_hilbert": 0.5})
    by_method = {row["method"]: row for row in rows}
    assert len(by_method) == len(family.methods)
    for name in ("qhull", "qhull_hilbert"):
        assert by_method[name]["status"] == NOT_RUN
        assert by_method[name]["seconds_median"] is None
        assert by_method[name]["repeats"] == 0
    assert by_method["entreg"]["status"] == MEASURED
    assert by_method["entreg"]["ratio_to_qhull"] is None
    assert by_method["entreg"]["fastest_rival"] in ("geos", "opencv")


def test_slow_methods_get_fewer_rounds():
    rows = measure(hull_family(), generate("square", 100, 0), repeats=5, time_budget=1e-9)
    assert {row["repeats"] for row in rows} == {3}


def test_wrong_results_are_seen():
    family = hull_family()
    points = generate("disk", 300, 0)
    ours, *others = family.methods

    def cut(given):
        return ours.rival.run(given)[1:]

    lossy = replace(others[-1], rival=Rival("lossy", cut), kind="library")
    rows = measure(replace(family, methods=(ours, lossy)), points, repeats=1, time_budget=1.0)
    assert (rows[1]["exact"], rows[1]["missing"], rows[1]["extra"]) == (False, 1, 0)
    wrong = replace(ours, rival=Rival("entreg", cut))
    with pytest.raises(RuntimeError, match="entreg is wrong on 300 points"):
        measure(replace(family, methods=(wrong, *others)), points, repeats=1, time_budget=1.0)


@pytest.mark.parametrize("name", COHERENT_POINT_SETS)
def test_coherent_inputs_have_near_neighbours_in_the_list(name):
    points = benchmark_points(name, 2_000, 0)
    assert points.shape == (2_000, 2)
    shuffled = points[np.random.default_rng(0).permutation(2_000)]

    def median_step(listed):
        return np.median(np.linalg.norm(np.diff(listed, axis=0), axis=1))

    assert median_step(points) < 0.2 * median_step(shuffled)
    assert np.array_equal(points, benchmark_points(name, 2_000, 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem": "voronoi"}, "unknown problem 'voronoi'"),
        ({"distributions": ["torus"]}, "unknown distribution 'torus'"),
        ({"sizes": [5_000]}, "max_points"),
        ({"sizes": [2]}, "sizes"),
        ({"time_budget": 0.0}, "time_budget"),
    ],
)
def test_impossible_settings_give_one_sentence(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("benchmark", "changes"),
    [
        ("geometry_hull", {"distributions": ["square"], "sizes": [10]}),
        ("geometry_pareto", {"distributions": ["square"], "sizes": [10]}),
        ("geometry_delaunay", {"distributions": ["clusters_ordered"], "sizes": [100]}),
        ("entropy_law", {"families": ["hull_fraction"], "levels": 3}),
    ],
)
def test_configurations_run_under_smoke(tmp_path, benchmark, changes):
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = hydra.compose("benchmark", [f"benchmark={benchmark}", "profile=smoke", f"store={tmp_path}"])
        whole = hydra.compose("benchmark", ["profile=smoke"])
    settings = OmegaConf.to_container(config, resolve=True)
    assert whole.benchmark[benchmark] == config.benchmark
    assert min(config.benchmark.sizes) <= config.profile.geometry.max_points
    target = get_method(settings["benchmark"].pop("_target_"))
    paths = target(
        **{**settings["benchmark"], **changes},
        profile=settings["profile"],
        store=settings["store"],
        force=settings["force"],
        command="test",
    )
    assert [path.parent for path in paths] == [tmp_path]
