import json

import pytest
import yaml

from entreg.cli import CONFIGS
from entreg.errors import ConfigError
from entreg.records.store import REFERENCE_ROOT
from entreg.runs.objective import Objective

ROWS = [
    {"plan": "dense", "split": "validation", "top1": 0.5},
    {"plan": "dense", "split": "validation", "top1": 0.7},
    {"plan": "dense", "split": "test", "top1": 0.1},
    {"plan": "tokens", "split": "validation", "top1": None},
]
RECORD = {"rows": ROWS, "metrics": {"error": 0.25, "broken": float("nan"), "flag": True}}
DENSE = {"name": "x", "value": "top1", "where": {"plan": "dense", "split": "validation"}, "direction": "maximize"}


def test_it_is_the_mean_of_the_rows_that_count():
    objective = Objective.from_mapping(DENSE)
    assert objective.of([RECORD]) == pytest.approx(0.6)
    other = {**RECORD, "rows": [{**ROWS[0], "top1": 0.2}]}
    assert objective.of([RECORD, other]) == pytest.approx(0.4)


def test_it_may_be_one_of_the_metrics():
    assert Objective.from_mapping({**DENSE, "value": "error", "where": None}).of([RECORD]) == 0.25


@pytest.mark.parametrize(
    "change",
    [
        {"where": {"plan": "tokens"}},
        {"where": {"plan": "nothing"}},
        {"value": "top5"},
        {"value": "broken", "where": None},
        {"value": "flag", "where": None},
        {"value": "nothing", "where": None},
    ],
)
def test_a_record_without_such_a_number_has_none(change):
    assert Objective.from_mapping({**DENSE, **change}).of([RECORD]) is None
    assert Objective.from_mapping(DENSE).of([]) is None


def test_the_best_is_the_largest_or_the_smallest():
    assert Objective.from_mapping(DENSE).best([1.0, 3.0, 2.0]) == 3.0
    assert Objective.from_mapping({**DENSE, "direction": "minimize"}).best([1.0, 3.0, 2.0]) == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**DENSE, "direction": "up"}, "objective.direction must be one of maximize, minimize, got 'up'"),
        ({**DENSE, "values": 1}, "an objective has the keys name, value, where, direction"),
        ({"name": "x"}, "an objective has the keys"),
    ],
)
def test_wrong_objectives_are_one_sentence(values, message):
    with pytest.raises(ConfigError, match=message):
        Objective.from_mapping(values)


@pytest.mark.parametrize("path", sorted((CONFIGS / "objective").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_ready_objective_is_a_number_of_the_reference_records(path):
    values = yaml.safe_load(path.read_text())
    objective = Objective.from_mapping(values)
    assert objective.name == path.stem
    families = {
        "dense_accuracy": "vit/digit_scenes",
        "sparse_accuracy": "vit/digit_scenes",
        "corrupted_error": "cifar/digits",
        "dense_perplexity": "llm/smollm2",
        "sparse_perplexity": "llm/smollm2",
        "rewrite_speedup": "geometry/hull",
    }
    paths = list(REFERENCE_ROOT.glob(f"{families[path.stem].replace('/', '__')}__*.json"))
    assert paths
    for one in paths[:3]:
        assert objective.of([json.loads(one.read_text())]) is not None
