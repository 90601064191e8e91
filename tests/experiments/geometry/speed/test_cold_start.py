"""The time to the first result: whole processes, first with an empty cache of kernels and then with that cache."""

import json

import hydra
import hydra.utils
import numpy as np
import pytest

from entreg.cli import CONFIGS
from entreg.errors import ConfigError
from entreg.experiments.geometry.speed import cold_start as geometry_start
from entreg.experiments.geometry.speed.cold_start import CALLS, first_result, run_geometry_start
from entreg.experiments.geometry.speed.tables import start_table
from entreg.geometry import pareto_front

PROFILE = {"name": "smoke", "repeats": 3, "seeds": [0], "geometry": {"max_points": 1_000}}


def run(tmp_path, **changes):
    settings = {"problems": ["hull", "delaunay"], "sizes": [100, 1_000, 200_000], "profile": PROFILE, "command": "test"}
    return run_geometry_start(**{**settings, **changes}, store=tmp_path)


def test_every_turn_begins_with_an_empty_cache_and_goes_on_with_it(tmp_path, monkeypatch):
    caches = []

    def measured(program, points, cache):
        ours = "entreg" in program
        assert np.load(points).shape in ((100, 2), (1_000, 2))
        if not ours:
            return 0.5
        caches.append(cache)
        return 7.0 if caches.count(cache) == 1 else 1.0

    monkeypatch.setattr(geometry_start, "first_result", measured)
    paths = run(tmp_path)
    assert len(caches) == 2 * len(set(caches)) == 2 * 2 * 2 * 3
    records = [json.loads(path.read_text()) for path in paths]
    assert [record["experiment"] for record in records] == [
        f"benchmark/geometry_start/{p}" for p in ("hull", "delaunay")
    ]
    for record in records:
        found = {(row["n"], row["method"], row["cache"]): row["seconds_median"] for row in record["rows"]}
        assert {n for n, _, _ in found} == {100, 1_000}
        assert found[100, "entreg", "cold"] == 7.0
        assert found[1_000, "entreg", "warm"] == 1.0
        assert found[1_000, "qhull", "none"] == 0.5
    table = start_table(records)
    assert list(table.rows[0])[:4] == ["delaunay", "100", "7.00 s", "1.00 s"]
    monkeypatch.setattr(geometry_start, "first_result", lambda *_: pytest.fail("ran again"))
    assert run(tmp_path) == paths


def test_without_records_there_is_no_table():
    assert start_table([]) is None


def test_a_process_is_timed_and_its_failure_seen(tmp_path):
    np.save(tmp_path / "points.npy", np.random.default_rng(0).normal(size=(50, 2)))
    assert first_result(CALLS["pareto"]["numpy_lexsort"], tmp_path / "points.npy", tmp_path) > 0
    with pytest.raises(RuntimeError, match="no_such_name"):
        first_result("no_such_name", tmp_path / "points.npy", tmp_path)


def test_the_rival_of_the_front_computes_it():
    points = np.random.default_rng(0).normal(size=(500, 2))
    found = {"np": np, "points": points}
    exec(CALLS["pareto"]["numpy_lexsort"].replace("np.flatnonzero", "front = np.flatnonzero"), found)
    # All but the last, which has nothing to its right.
    order = np.lexsort((points[:, 1], points[:, 0]))
    assert np.array_equal(np.append(order[found["front"]], order[-1]), pareto_front(points))


def test_impossible_settings_give_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="unknown problem 'cube'"):
        run(tmp_path, problems=["cube"])
    with pytest.raises(ConfigError, match="max_points = 1000"):
        run(tmp_path, sizes=[5_000])


def test_the_configuration_composes_alone_and_with_all_others():
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = hydra.compose("benchmark", ["benchmark=geometry_start", "profile=smoke"])
        whole = hydra.compose("benchmark", ["profile=smoke"])
    assert whole.benchmark.geometry_start == config.benchmark
    assert hydra.utils.get_method(config.benchmark["_target_"]) is run_geometry_start
