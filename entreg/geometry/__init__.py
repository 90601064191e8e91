"""Algorithms on planar points whose time falls with the entropy of their input, exact for every finite input."""

from entreg.geometry.convex_hull import convex_hull
from entreg.geometry.generators import DISTRIBUTIONS, generate

__all__ = ["DISTRIBUTIONS", "convex_hull", "generate"]
