"""Curves, tables and pictures of a run in wandb or TensorBoard, beside the JSON lines that every run writes.

A tracker is a convenience: it opens at its first row, never raises into a run, and what it cannot take is in the run's
``metrics.jsonl`` and record all the same. Neither wandb nor TensorBoard is imported before a run is tracked.
"""

from entreg.tracking.records import track_record
from entreg.tracking.settings import TrackerSettings, tracker_settings_from_mapping
from entreg.tracking.tracker import NoTracker, Tracker, open_tracker, say, tracked

__all__ = [
    "NoTracker",
    "Tracker",
    "TrackerSettings",
    "open_tracker",
    "say",
    "track_record",
    "tracked",
    "tracker_settings_from_mapping",
]
