"""Experiments by family, and what all of them share: studies, timing, printing."""
