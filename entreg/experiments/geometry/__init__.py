"""Geometry: convex hulls and triangulations, learned and exact."""
