"""The law's families have the entropy that they claim, and the fit finds a law that is there."""

import json
import math

import numpy as np
import pytest

from entreg.entropy import hull_entropy, run_entropy
from entreg.errors import ConfigError
from entreg.experiments.geometry.speed.entropy_law import (
    LAW_FAMILIES,
    convex_clusters,
    fit_law,
    law_rows,
    run_entropy_law,
)
from entreg.geometry.convex_hull import convex_hull

SMOKE = {"name": "smoke", "repeats": 1, "seeds": [0], "geometry": {"max_points": 1_000}}


def test_families_sweep_from_no_entropy_to_log_n():
    n = 1_000
    for law in LAW_FAMILIES.values():
        values = law.values(n, 5)
        assert values == sorted(values)
        entropies = [hull_entropy(law.points(n, 0, value)).upper for value in values]
        assert entropies[0] < 0.35 * math.log(n)
        assert entropies[-1] > 0.75 * math.log(n)


def test_entropy_of_the_sorted_runs_is_that_of_the_sequence():
    law = LAW_FAMILIES["sorted_runs"]
    points = law.points(10_000, 0, 16)
    # Maximal monotone runs of the list; a boundary may by chance join a run, so only nearly.
    assert law.entropy(10_000, 16) == pytest.approx(math.log(16), abs=1e-3)
    assert run_entropy(points[:, 0]) == pytest.approx(math.log(16), abs=0.05)


def test_entropy_of_the_hull_fraction_is_that_of_singletons_and_one_disk():
    law = LAW_FAMILIES["hull_fraction"]
    assert law.entropy(100, 1.0) == pytest.approx(math.log(100))
    expected = 0.25 * math.log(100) + 0.75 * math.log(100 / 75)
    assert law.entropy(100, 0.25) == pytest.approx(expected)
    points = law.points(400, 0, 0.25)
    assert len(convex_hull(points)) == 100
    # An equilateral triangle in the unit circle has an inscribed circle of radius 1/2.
    assert np.sum(np.linalg.norm(points, axis=1) <= 0.5) == 300


@pytest.mark.parametrize("clusters", [1, 2, 3, 50, 500])
def test_every_cluster_reaches_the_hull(clusters):
    points = convex_clusters(2_000, 0, clusters)
    hull = points[convex_hull(points)]
    owner = np.round(np.arctan2(hull[:, 1], hull[:, 0]) / (2.0 * np.pi / clusters)).astype(int) % clusters
    assert len(np.unique(owner)) == clusters


def test_rows():
    rows = law_rows("clusters", [500], 3, 0, 1)
    assert len(rows) == 6
    assert {row["method"] for row in rows} == {"entreg", "quickhull"}
    for row in rows:
        assert row["entropy_lower"] <= row["entropy"] <= row["entropy_upper"]
        assert row["work"] == pytest.approx(row["n"] * (1.0 + row["entropy"]))
        assert row["seconds_median"] > 0


def test_fit_recovers_a_planted_law():
    rows = [
        {"n": n, "work": n * (1.0 + h), "seconds_median": 1e-3 + 5e-9 * n * (1.0 + h)}
        for n in (1_000, 100_000)
        for h in (0.0, 2.0, 6.0)
    ]
    fit = fit_law(rows)
    assert fit["nanoseconds_per_unit"] == pytest.approx(5.0)
    assert fit["intercept_seconds"] == pytest.approx(1e-3)
    assert fit["r_squared"] == pytest.approx(1.0)
    assert fit["r_squared_n_log_n"] < 0.9
    assert fit["nanoseconds_per_unit_least"] == pytest.approx(5.0 + 1e6 / 700_000)
    assert fit["nanoseconds_per_unit_most"] == pytest.approx(5.0 + 1e6 / 1_000)
    assert fit_law(rows[:3])["r_squared_n_log_n"] is None


def test_records_are_saved_and_found_again(tmp_path):
    settings = {
        "families": ["sorted_runs"],
        "sizes": [200, 400, 5_000],
        "levels": 3,
        "profile": SMOKE,
        "store": tmp_path,
        "command": "test",
    }
    (path,) = run_entropy_law(**settings)
    record = json.loads(path.read_text())
    assert set(record["metrics"]["entreg"]) == {"all_sizes", "n = 200", "n = 400"}
    assert set(record["metrics"]) == {"entreg", "timsort_chain"}
    before = path.read_bytes()
    assert run_entropy_law(**settings) == [path]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"families": ["knots"]}, "unknown family 'knots'"),
        ({"levels": 2}, "at least 3"),
        ({"sizes": [5_000]}, "max_points"),
    ],
)
def test_impossible_settings_give_one_sentence(tmp_path, changes, message):
    settings = {"families": ["clusters"], "sizes": [100], "levels": 3, "profile": SMOKE, "store": tmp_path}
    with pytest.raises(ConfigError, match=message):
        run_entropy_law(**{**settings, **changes}, command="test")
