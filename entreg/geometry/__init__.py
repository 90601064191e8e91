"""Algorithms on planar points whose time falls with the entropy of their input, exact for every finite input."""

from entreg.geometry.convex_hull import convex_hull
from entreg.geometry.delaunay import Triangulation, delaunay
from entreg.geometry.generators import DISTRIBUTIONS, generate
from entreg.geometry.pareto import pareto_front

__all__ = ["DISTRIBUTIONS", "Triangulation", "convex_hull", "delaunay", "generate", "pareto_front"]
