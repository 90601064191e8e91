"""What wandb keeps in files: reading it back, looking at it, uploading it. wandb's own commands do all of it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from entreg.errors import ConfigError, OutputError

_INSPECT_SECONDS = 120
_WRITTEN_EVERY = 60
"""Seconds within which wandb writes to the file of a run that goes on, several times over."""


def run_parts(folder: Path, run_id: str = "*") -> list[Path]:
    """Folders of a run's parts, or of all runs', oldest first.

    Args:
        folder: what a configuration calls ``tracker.directory``.
        run_id: of the run.
    """
    found = [part for part in (folder / "wandb").glob(f"*run-*-{run_id}") if any(part.glob("run-*.wandb"))]
    return sorted(found, key=lambda part: part.name.removeprefix("offline-"))


def log_records(part: Path) -> list[dict[str, Any]]:
    """Everything in the file of a part, as wandb reads it; of a file that ends in the middle, what is whole."""
    command = [*_wandb(), "leet", "inspect", "--json", str(_log_file(part))]
    environment = {**os.environ, "WANDB_MODE": "offline"}
    output = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=_INSPECT_SECONDS, check=False
    ).stdout
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def open_dashboard(folder: Path) -> int:
    """Look at the runs in a terminal with ``wandb leet`` until the user leaves it.

    Returns:
        Its exit status.

    Raises:
        ConfigError: wandb is not installed, or there are no runs.
    """
    _require_wandb()
    if not run_parts(folder):
        raise ConfigError(
            f"There are no tracked runs in {folder / 'wandb'} yet; python scripts/train.py makes the first one, or "
            "name another folder with TRACKED=..."
        )
    return subprocess.run([*_wandb(), "leet", str(folder / "wandb")], check=False).returncode


def upload(folder: Path) -> str:
    """Upload the offline runs that have not been uploaded yet, the parts of a resumed one in their order.

    A run that is still being written is left for later, since a part is uploaded only once.

    Returns:
        What was done, in one sentence.

    Raises:
        ConfigError: wandb is not installed.
        OutputError: the server did not take a run; wandb has printed why.
    """
    _require_wandb()
    offline = [part for part in run_parts(folder) if part.name.startswith("offline-")]
    left = [part for part in offline if not _is_uploaded(part)]
    todo = [part for part in left if not _goes_on(part)]
    before, later = len(offline) - len(left), len(left) - len(todo)
    if todo:
        # wandb itself would try for hours.
        environment = {"WANDB_X_GRAPHQL_RETRY_MAX": "3", **os.environ}
        subprocess.run([*_wandb(), "sync", *map(str, todo)], env=environment, check=False)
    failed = [part for part in todo if not _is_uploaded(part)]
    if failed:
        raise OutputError(
            f"{len(failed)} of {len(todo)} runs in {folder / 'wandb'} were not uploaded, for the reason that wandb "
            "gave above; the same command tries them again."
        )
    return f"Uploaded {len(todo)} runs; {before} were uploaded before, {later} are still being written."


def _is_uploaded(part: Path) -> bool:
    return _log_file(part).with_suffix(".wandb.synced").exists()


def _goes_on(part: Path) -> bool:
    if time.time() - _log_file(part).stat().st_mtime > _WRITTEN_EVERY:
        return False
    return not any(record["type"] == "exit" for record in log_records(part))


def _log_file(part: Path) -> Path:
    return next(part.glob("run-*.wandb"))


def _wandb() -> list[str]:
    return [sys.executable, "-m", "wandb"]


def _require_wandb() -> None:
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("This needs the package wandb: pip install 'entreg[tracking]'")
