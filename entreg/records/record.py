"""The run record: one dictionary of plain JSON values that says what ran, on what, and what came out."""

import datetime
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import PurePath
from typing import Any, Literal

import jsonschema
import numpy as np

from entreg.errors import InputError, RecordError
from entreg.records import environment

Scale = Literal["smoke", "reproduce", "offline", "paper"]
SCALES: tuple[str, ...] = ("smoke", "reproduce", "offline", "paper")
"""Names of the profiles, the smallest first."""
SCHEMA_VERSION = 1

# The order in which a file shows the fields: what a reader asks first comes first.
_FIELDS = (
    "schema_version",
    "id",
    "experiment",
    "scale",
    "command",
    "seed",
    "repeats",
    "wall_seconds",
    "utc",
    "config_hash",
    "dataset",
    "model",
    "code",
    "device",
    "versions",
    "config",
    "metrics",
    "rows",
    "checksum",
)

_SCALARS = (str, int, float, bool, type(None))


def new_record(
    *,
    experiment: str,
    scale: Scale,
    config: Mapping[str, Any],
    command: str,
    dataset: Mapping[str, Any],
    model: Mapping[str, Any] | None = None,
    seed: int | None,
    repeats: int,
    metrics: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    wall_seconds: float,
) -> dict[str, Any]:
    """Puts together the record of a finished run, adding code version, library versions, device and UTC time.

    Args:
        experiment: lower-case name, families separated by slashes, for example ``geometry/hull``.
        scale: ``smoke`` (seconds, tests), ``reproduce`` (key rows of ``offline`` in minutes), ``offline`` (embedded
            data, the reference) or ``paper`` (its own scale).
        config: everything that decides the result, the seed included; equal configurations replace each other.
            Leave output folders and verbosity out.
        command: what to type to repeat the run.
        dataset: at least ``name``; version, checksum, size and split where they exist.
        model: at least ``name``, or None when no model took part.
        seed: the run's seed, or None when nothing is random.
        repeats: how many times each measurement was repeated, at least 1.
        metrics: summary numbers of the run.
        rows: long-format measurements, one dictionary of scalars or lists per measurement.
        wall_seconds: duration of the whole run.

    Returns:
        A dictionary that fits the schema; its ``id`` is the experiment's name, a hyphen and the config's hash.

    Raises:
        InputError: a value is not plain JSON (NaN and infinity included), or does not fit the schema.
    """
    plain_config = to_plain(config, "config")
    config_digest = config_hash(config)
    record = {
        "schema_version": SCHEMA_VERSION,
        "id": record_id(experiment, config_digest),
        "experiment": experiment,
        "scale": scale,
        "command": to_plain(command, "command"),
        "seed": to_plain(seed, "seed"),
        "repeats": to_plain(repeats, "repeats"),
        "wall_seconds": to_plain(wall_seconds, "wall_seconds"),
        "utc": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "config_hash": config_digest,
        "dataset": to_plain(dataset, "dataset"),
        "model": to_plain(model, "model"),
        "code": environment.git_state(),
        "device": environment.device_description(),
        "versions": environment.library_versions(),
        "config": plain_config,
        "metrics": to_plain(metrics, "metrics"),
        "rows": to_plain(rows, "rows"),
    }
    problem = schema_problem(record)
    if problem is not None:
        raise InputError(f"The record of {experiment!r} does not fit the schema: {problem}.")
    return record


def config_hash(config: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that name a configuration.

    Independent of key order, of 1 against 1.0, of tuples against lists, of NumPy scalars against Python ones,
    and of where the checkout lies. OmegaConf containers hash like the dictionaries they resolve to.

    Raises:
        InputError: a value is not plain JSON.
    """
    if not isinstance(config, Mapping):
        raise InputError(f"A configuration must be a mapping, not {type(config).__name__}.")
    plain = _whole_floats_to_int(to_plain(config, "config"))
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:12]


def record_id(experiment: str, config_digest: str) -> str:
    """The identifier of the record of ``experiment`` run with the configuration of that hash."""
    return f"{experiment}-{config_digest}"


def checksum(record: Mapping[str, Any]) -> str:
    """SHA-256 over everything in the record but the checksum itself."""
    content = {key: value for key, value in record.items() if key != "checksum"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def serialise(record: Mapping[str, Any]) -> str:
    """The one text form of a record: fields in a fixed order, one measurement per line, for readable diffs."""
    lines = []
    for field in [*(name for name in _FIELDS if name in record), *sorted(set(record) - set(_FIELDS))]:
        value = record[field]
        if isinstance(value, dict) and value:
            inner = ",\n".join(f"  {_dumps(str(key))}: {_dumps(item)}" for key, item in value.items())
            text = f"{{\n{inner}\n }}"
        elif isinstance(value, list) and value:
            text = "[\n" + ",\n".join(f"  {_dumps(item)}" for item in value) + "\n ]"
        else:
            text = _dumps(value)
        lines.append(f" {_dumps(field)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def parse(text: str, name: str) -> dict[str, Any]:
    """Reads a record and makes sure that not a byte of it was lost or changed.

    Args:
        text: what :func:`serialise` wrote for a record with a checksum.
        name: the file's name, for the error's sentence.

    Raises:
        RecordError: the text is truncated or damaged, or does not fit the schema.
    """
    remedy = "restore it from version control or delete it and run its command again"
    try:
        record = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"The record {name} is truncated or damaged (not valid JSON); {remedy}.") from error
    if not isinstance(record, dict):
        raise RecordError(f"The record {name} is damaged (not a JSON object); {remedy}.")
    if record.get("schema_version") != SCHEMA_VERSION:
        found = record.get("schema_version")
        raise RecordError(
            f"The record {name} has schema version {found!r}, this entreg reads {SCHEMA_VERSION}; {remedy}."
        )
    if record.get("checksum") != checksum(record) or serialise(record) != text:
        raise RecordError(f"The record {name} was changed after it was written (checksum differs); {remedy}.")
    problem = schema_problem(record)
    if problem is not None:
        raise RecordError(f"The record {name} does not fit the schema ({problem}); {remedy}.")
    if record["id"] != record_id(record["experiment"], record["config_hash"]) or record["config_hash"] != config_hash(
        record["config"]
    ):
        raise RecordError(f"The record {name} carries an identifier that is not its configuration's; {remedy}.")
    return record


def schema_problem(record: Any) -> str | None:
    """What is wrong with a record, in a few words, or None when it fits the schema."""
    checked = record
    if isinstance(record, dict) and _are_cells(record.get("rows")) and _is_value(record.get("metrics")):
        # Thousands of measurements that are what the schema's "cell" and "value" say: asking it of each takes seconds.
        checked = {**record, "rows": [], "metrics": {}}
    error = jsonschema.exceptions.best_match(_validator().iter_errors(checked))
    if error is None:
        return None
    place = "/".join(str(part) for part in error.absolute_path) or "the record"
    message = error.message if len(error.message) <= 200 else error.message[:197] + "..."
    return f"{place}: {message}"


def to_plain(value: Any, place: str) -> Any:
    """Turns NumPy and torch scalars, arrays, tuples, paths and OmegaConf containers into plain JSON values.

    Paths inside the checkout become relative to it, so that records do not tell where somebody's checkout lies.

    Args:
        value: anything made of mappings, sequences and scalars.
        place: where the value stands, for the error's sentence.

    Raises:
        InputError: NaN, infinity, a key that is not a string, or an object without a JSON form.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str | PurePath):
        return _without_checkout(str(value))
    if isinstance(value, np.generic) or (hasattr(value, "item") and getattr(value, "ndim", None) == 0):
        return to_plain(value.item(), place)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InputError(f"{place} is {value}, which a record cannot hold; write None for a missing value.")
        return float(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InputError(f"{place} has the key {key!r}; keys of a record must be strings.")
        return {str(key): to_plain(item, f"{place}.{key}") for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [to_plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
    raise InputError(f"{place} is a {type(value).__name__}, which has no JSON form; use numbers, text or lists.")


def _are_cells(rows: Any) -> bool:
    return type(rows) is list and all(type(row) is dict and all(map(_is_cell, row.values())) for row in rows)


def _is_cell(value: Any) -> bool:
    return type(value) in _SCALARS or (type(value) is list and all(map(_is_cell, value)))


def _is_value(metrics: Any) -> bool:
    """Whether it is an object of the schema's values."""
    return type(metrics) is dict and all(_is_cell(value) or _is_value(value) for value in metrics.values())


@functools.cache
def _validator() -> jsonschema.Draft202012Validator:
    text = resources.files("entreg.records").joinpath("record.schema.json").read_text(encoding="utf-8")
    return jsonschema.Draft202012Validator(json.loads(text))


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _finite(text: str) -> float:
    """A number as JSON writes it; refuses NaN, infinity, and what is too large, which Python reads as infinity."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number of JSON")
    return value


def _whole_floats_to_int(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _whole_floats_to_int(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole_floats_to_int(item) for item in value]
    return value


def _without_checkout(text: str) -> str:
    root = str(environment.REPOSITORY)
    if text == root:
        return "."
    return text.replace(root + "/", "")


def current_records(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record per experiment: the largest scale, and of that the newest."""
    best: dict[str, dict[str, Any]] = {}
    for record in sorted(records, key=lambda r: (SCALES.index(r["scale"]), r["utc"], r["id"])):
        best[record["experiment"]] = record
    return [best[name] for name in sorted(best)]


def told_records(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the records that tables, figures and verdicts may rest on, in the order of their identifiers.

    Smoke runs mean nothing. A quick run (``reproduce``) counts only where no larger one of its experiment is there, so
    that the two are never mixed.
    """
    usable = [dict(record) for record in records if record["scale"] != "smoke"]
    studied = {record["experiment"] for record in usable if record["scale"] != "reproduce"}
    kept = [one for one in usable if one["scale"] != "reproduce" or one["experiment"] not in studied]
    return sorted(kept, key=lambda record: record["id"])
