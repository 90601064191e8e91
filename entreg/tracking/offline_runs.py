"""What wandb keeps in files: reading it back, looking at it, uploading it. wandb's own commands do all of it."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from entreg.atomic import write_bytes_atomic
from entreg.errors import ConfigError, OutputError

_INSPECT_SECONDS = 120
_BLOCK, _CHUNK_HEADER = 32768, 7
_WRITTEN_EVERY = 60
"""Seconds within which wandb writes to the file of a run that goes on, several times over."""


def run_parts(folder: Path, run_id: str = "*") -> list[Path]:
    """Folders of a run's parts, or of all runs', oldest first.

    Args:
        folder: what a configuration calls ``tracker.directory``.
        run_id: of the run.
    """
    found = [log.parent for log in (folder / "wandb").glob(f"*run-*/run-{run_id}.wandb")]
    return sorted(found, key=lambda part: part.name.removeprefix("offline-"))


def is_empty(part: Path) -> bool:
    """Whether nothing was written, as by a process that was killed in its first seconds."""
    return _log_file(part).stat().st_size <= _CHUNK_HEADER


def log_records(part: Path) -> list[dict[str, Any]]:
    """Everything in the file of a part, as wandb reads it; of a file that ends in the middle, what is whole."""
    command = [*_wandb(), "leet", "inspect", "--json", str(_log_file(part).resolve())]
    output = subprocess.run(
        command,
        cwd=part,
        env={**os.environ, "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=_INSPECT_SECONDS,
        check=False,
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
    return subprocess.run([*_wandb(), "leet", str(folder.resolve() / "wandb")], cwd=folder, check=False).returncode


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
    offline = [part for part in run_parts(folder) if part.name.startswith("offline-") and not is_empty(part)]
    left = [part for part in offline if not _is_uploaded(part)]
    todo = [part for part in left if not _goes_on(part)]
    before, later = len(offline) - len(left), len(left) - len(todo)
    for part in todo:
        _cut_to_whole_records(_log_file(part))
    if todo:
        # wandb itself would try for hours.
        environment = {"WANDB_X_GRAPHQL_RETRY_MAX": "3", **os.environ}
        # It writes logs of its own to wandb/ in the folder where it runs.
        command = [*_wandb(), "sync", *(str(part.resolve()) for part in todo)]
        subprocess.run(command, cwd=folder, env=environment, check=False)
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


def _cut_to_whole_records(path: Path) -> None:
    """Takes off the beginning of a record that a killed process was writing.

    wandb uploads the file of a killed run but does not note it: the next upload would add every step once more.
    """
    data = path.read_bytes()
    whole = _whole_records(data)
    if whole < len(data):
        write_bytes_atomic(path, data[:whole])


def _whole_records(data: bytes) -> int:
    """Length of the part of a LevelDB log that holds whole records.

    Blocks of 32 KiB of chunks: checksum (4 bytes), length (2), type (1: a whole record, 2 to 4: its first, a middle and
    its last part), content. Seven bytes of wandb's own stand before the first chunk.
    """
    place = whole = _CHUNK_HEADER
    while place + _CHUNK_HEADER <= len(data):
        rest = _BLOCK - place % _BLOCK
        if rest < _CHUNK_HEADER:
            place += rest
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        place += _CHUNK_HEADER + length
        if not 1 <= kind <= 4 or place > len(data):
            break
        if kind in (1, 4):
            whole = place
    return whole


def _log_file(part: Path) -> Path:
    return next(part.glob("run-*.wandb"))


def _wandb() -> list[str]:
    return [sys.executable, "-m", "wandb"]


def _require_wandb() -> None:
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("This needs the package wandb: pip install 'entreg[tracking]'")
