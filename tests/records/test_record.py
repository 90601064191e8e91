import copy
import datetime
import json
import pathlib
from importlib import resources

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from entreg.errors import InputError, RecordError
from entreg.records import config_hash, environment, new_record
from entreg.records.record import checksum, parse, schema_problem, serialise, to_plain, told_records
from tests.records.samples import sample_record

# Surrogates have no UTF-8 form.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


BASE = sample_record()


def sealed(record):
    record = dict(record)
    record["checksum"] = checksum(record)
    return record


def test_new_record_has_every_field_and_fits_the_schema():
    record = sample_record()
    assert schema_problem(record) is None
    assert record["id"] == f"geometry/hull-{record['config_hash']}"
    assert set(record) == {
        *("schema_version", "id", "experiment", "scale", "command", "seed", "repeats", "wall_seconds", "utc"),
        *("config_hash", "config", "dataset", "model", "code", "versions", "device", "metrics", "rows"),
    }
    written = datetime.datetime.strptime(record["utc"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=datetime.UTC)
    assert abs((datetime.datetime.now(datetime.UTC) - written).total_seconds()) < 60


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(TEXT, PLAIN, max_size=3), st.lists(st.dictionaries(TEXT, PLAIN, max_size=3) | PLAIN, max_size=3))
def test_what_fits_the_schema_is_what_json_schema_says(metrics, rows):
    text = resources.files("entreg.records").joinpath("record.schema.json").read_text(encoding="utf-8")
    record = {**BASE, "metrics": metrics, "rows": rows}
    assert (schema_problem(record) is None) == jsonschema.Draft202012Validator(json.loads(text)).is_valid(record)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scale": "huge"}, "scale"),
        ({"experiment": "Geometry"}, "does not match"),
        ({"experiment": "a__b"}, "experiment|id"),
        ({"experiment": "../escape"}, "experiment|id"),
        ({"repeats": 0}, "repeats"),
        ({"wall_seconds": -1.0}, "wall_seconds"),
        ({"wall_seconds": float("nan")}, "wall_seconds is nan"),
        ({"command": ""}, "command"),
        ({"dataset": {}}, "name"),
        ({"model": {"name": ""}}, "model"),
        ({"seed": 0.5}, "seed"),
        ({"rows": [{"a": {"nested": 1}}]}, "rows"),
        ({"rows": [{"a": float("inf")}]}, r"rows\[0\].a is inf"),
        ({"metrics": {"x": object()}}, "metrics.x is a object"),
        ({"metrics": {1: 2}}, "keys of a record must be strings"),
        ({"config": [1, 2]}, "must be a mapping"),
    ],
)
def test_new_record_refuses_bad_values_in_one_sentence(change, words):
    arguments = {
        "experiment": "geometry/hull",
        "scale": "smoke",
        "config": {"n": 1},
        "command": "python x",
        "dataset": {"name": "square"},
        "seed": None,
        "repeats": 1,
        "metrics": {},
        "rows": [],
        "wall_seconds": 0.0,
    }
    assert new_record(**arguments)["model"] is None
    with pytest.raises(InputError, match=words) as caught:
        new_record(**{**arguments, **change})
    assert "\n" not in str(caught.value)


def test_numpy_torch_path_and_omegaconf_values_become_plain():
    value = {
        "f32": np.float32(0.5),
        "i": np.int64(3),
        "flag": np.bool_(True),
        "array": np.arange(3),
        "matrix": np.eye(2),
        "tensor": torch.tensor([1.5, 2.0]),
        "scalar": torch.tensor(2),
        "tuple": (1, (2,)),
        "path": pathlib.PurePosixPath("a/b"),
        "omega": OmegaConf.create({"a": 2, "b": "${.a}", "c": [1, "${..a}"]}),
    }
    expected = {
        "f32": 0.5,
        "i": 3,
        "flag": True,
        "array": [0, 1, 2],
        "matrix": [[1.0, 0.0], [0.0, 1.0]],
        "tensor": [1.5, 2.0],
        "scalar": 2,
        "tuple": [1, [2]],
        "path": "a/b",
        "omega": {"a": 2, "b": 2, "c": [1, 2]},
    }
    plain = to_plain(value, "value")
    assert plain == expected
    assert json.loads(json.dumps(plain)) == expected


def test_paths_inside_the_checkout_do_not_tell_where_it_lies():
    root = environment.REPOSITORY
    assert to_plain(root / "outputs" / "runs", "x") == "outputs/runs"
    assert to_plain(f"python {root}/scripts/geometry.py", "x") == "python scripts/geometry.py"
    assert to_plain(str(root), "x") == "."
    assert config_hash({"store": str(root / "outputs")}) == config_hash({"store": "outputs"})


def test_config_hash_ignores_order_and_spelling_but_nothing_else():
    base = config_hash({"a": 1, "b": {"c": [1, 2.5], "d": None}})
    assert base == config_hash({"b": {"d": None, "c": (1.0, np.float64(2.5))}, "a": np.int32(1)})
    assert base == config_hash(OmegaConf.create({"b": {"d": None, "c": [1, 2.5]}, "a": 1}))
    others = [
        {"a": 2, "b": {"c": [1, 2.5], "d": None}},
        {"a": 1, "b": {"c": [2.5, 1], "d": None}},
        {"a": 1, "b": {"c": [1, 2.5]}},
        {"a": True, "b": {"c": [1, 2.5], "d": None}},
        {"a": "1", "b": {"c": [1, 2.5], "d": None}},
    ]
    assert len({base, *(config_hash(other) for other in others)}) == 6


def test_config_hash_is_the_same_in_every_version():
    # A changed hash would orphan every committed record: change it only together with the schema version.
    assert config_hash({"n": 1000, "points": "square", "alpha": 0.5, "seeds": [0, 1], "none": None}) == "4773ec3872b6"


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(TEXT, PLAIN, max_size=4))
def test_any_plain_content_survives_writing_and_reading(config):
    digest = config_hash(config)
    record = sealed({**BASE, "config": config, "config_hash": digest, "id": f"geometry/hull-{digest}"})
    assert parse(serialise(record), "x") == record


def test_serialised_form_is_one_measurement_per_line():
    record = sealed(sample_record(rows=[{"n": 1, "t": 0.5}, {"n": 2, "t": 1.0}]))
    lines = serialise(record).splitlines()
    assert '  {"n": 1, "t": 0.5},' in lines
    assert '  {"n": 2, "t": 1.0}' in lines
    assert serialise(json.loads(serialise(record))) == serialise(record)


def test_every_truncation_is_detected():
    text = serialise(sealed(sample_record()))
    for length in range(len(text)):
        with pytest.raises(RecordError, match=r"the_file\.json"):
            parse(text[:length], "the_file.json")


def test_every_changed_field_is_detected():
    record = sealed(sample_record())
    changes = {
        "seed": 1,
        "repeats": 8,
        "wall_seconds": 1.25,
        "command": "python other.py",
        "scale": "paper",
        "metrics": {**record["metrics"], "speedup": 45},
        "rows": [],
        "utc": "2020-01-01T00:00:00Z",
        "code": {"commit": None, "dirty": None},
    }
    for field, value in changes.items():
        changed = copy.deepcopy(record)
        changed[field] = value
        with pytest.raises(RecordError, match="was changed after it was written"):
            parse(serialise(changed), "x")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "truncated or damaged"),
        ("[]", "not a JSON object"),
        ("{}", "schema version None"),
        ('{"schema_version": 2}', "schema version 2"),
        ('{"schema_version": 1}', "checksum differs"),
        ('{"schema_version": NaN}', "not valid JSON"),
        ('{"schema_version": ' + "1" * 5000 + "}", "not valid JSON"),
        ("[" * 100_000, "truncated or damaged"),
        ("\x00", "truncated or damaged"),
    ],
)
def test_what_is_no_record_is_refused_in_one_sentence(text, words):
    with pytest.raises(RecordError, match=words) as caught:
        parse(text, "x.json")
    assert "x.json" in str(caught.value)
    assert "run its command again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_record_without_checksum_or_with_a_foreign_identifier_is_refused():
    record = sample_record()
    with pytest.raises(RecordError, match="checksum"):
        parse(serialise(record), "x")
    for change in ({"config": {"n": 2}}, {"id": "geometry/other-" + record["config_hash"]}):
        with pytest.raises(RecordError, match="identifier"):
            parse(serialise(sealed({**record, **change})), "x")


def test_an_intact_record_of_another_shape_is_refused():
    for change in ({"extra": 1}, {"repeats": 0}, {"device": {}}):
        with pytest.raises(RecordError, match="does not fit the schema") as caught:
            parse(serialise(sealed({**sample_record(), **change})), "x.json")
        assert "\n" not in str(caught.value)


def test_a_quick_run_counts_only_where_nothing_larger_of_its_experiment_is_there():
    scales = {"geometry/a": ["smoke", "reproduce"], "geometry/b": ["reproduce", "offline"], "geometry/c": ["smoke"]}
    records = [sample_record(name, scale=scale) for name, found in scales.items() for scale in found]
    told = [(record["experiment"], record["scale"]) for record in told_records(records)]
    assert told == [("geometry/a", "reproduce"), ("geometry/b", "offline")]
