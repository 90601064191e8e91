"""A folder of run records: one JSON file per experiment and configuration."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entreg.atomic import write_text_atomic
from entreg.errors import InputError, RecordError
from entreg.records.environment import REPOSITORY
from entreg.records.record import checksum, config_hash, parse, schema_problem, serialise

REFERENCE_ROOT = REPOSITORY / "results" / "runs"
"""The committed reference records."""

USER_ROOT = REPOSITORY / "outputs" / "runs"
"""Where a user's own runs go unless asked otherwise."""


class RecordStore:
    """Saves, finds and loads the records in one folder.

    Args:
        root: the folder; made at the first save.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def path_for(self, experiment: str, config: Mapping[str, Any]) -> Path:
        """The file that holds, or would hold, the record of that experiment and configuration."""
        return self.root / _file_name(experiment, config_hash(config))

    def save(self, record: Mapping[str, Any]) -> Path:
        """Checks a record, adds its checksum and writes it in one step, replacing an older run of the same kind.

        Raises:
            InputError: the record does not fit the schema.
            OutputError: the file cannot be written; what was there is intact.
        """
        sealed = dict(record)
        problem = schema_problem(sealed)
        if problem is not None:
            raise InputError(f"This record does not fit the schema and was not saved: {problem}.")
        sealed["checksum"] = checksum(sealed)
        path = self.root / _file_name(sealed["experiment"], sealed["config_hash"])
        text = serialise(sealed)
        # Reading back what is about to be written: a file that load_all refuses must never come to be.
        parse(text, path.name)
        return write_text_atomic(path, text)

    def find(self, experiment: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record of that experiment and configuration, or None when it has not been run.

        Raises:
            RecordError: the record exists but is damaged.
        """
        path = self.path_for(experiment, config)
        return load_record(path) if path.exists() else None

    def load_all(self, experiment_prefix: str | None = None) -> list[dict[str, Any]]:
        """All records whose experiment's name begins with ``experiment_prefix``, ordered by identifier.

        An empty or missing folder gives an empty list. Every file is checked, also
        those that the prefix leaves out.

        Raises:
            RecordError: a file is damaged, renamed, or a copy of another.
        """
        records = [load_record(path) for path in sorted(self.root.glob("*.json"))] if self.root.is_dir() else []
        chosen = [r for r in records if experiment_prefix is None or r["experiment"].startswith(experiment_prefix)]
        return sorted(chosen, key=lambda record: record["id"])


def _file_name(experiment: str, config_digest: str) -> str:
    return f"{experiment.replace('/', '__')}__{config_digest}.json"


def load_record(path: Path) -> dict[str, Any]:
    """One record from its file.

    Raises:
        RecordError: the file cannot be read, is damaged, renamed, or a copy of another.
    """
    try:
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise RecordError(
            f"The record {path} is damaged (not UTF-8 text); restore it from version control or run again."
        ) from error
    except OSError as error:
        raise RecordError(f"The record {path} cannot be read: {error.strerror or error}.") from error
    record = parse(text, str(path))
    expected = _file_name(record["experiment"], record["config_hash"])
    if path.name != expected:
        raise RecordError(
            f"The file {path} holds the record {record['id']}, whose file is {expected}: a copy or a renamed "
            "file; delete it or give it its name back."
        )
    return record
