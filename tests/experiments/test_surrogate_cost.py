"""The cost benchmark at toy size: its record, its memory measure and its errors."""

import json

import pytest
import torch

from entreg.errors import ConfigError
from entreg.experiments import surrogate_cost as regularizer_cost
from entreg.experiments.measuring import peak_memory
from entreg.experiments.surrogate_cost import SURROGATES, cost_cases, run, run_regularizer_cost, surrogate_step

CPU = torch.device("cpu")
PROFILE = {"name": "smoke", "repeats": 1, "seeds": [0]}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    store = tmp_path_factory.mktemp("runs")
    arguments = {"batch": 1, "tokens": [20, 10], "dims": [64], "cells": [4, None], "threads": 1}
    paths = run_regularizer_cost(**arguments, profile=PROFILE, store=store, command="the command")
    written = paths[0].read_text()
    # A second run finds the record.
    assert run_regularizer_cost(**arguments, profile=PROFILE, store=store, command="another") == paths
    assert paths[0].read_text() == written
    return json.loads(written)


def test_the_record_has_a_row_per_case_and_headline_fractions(record):
    rows = record["rows"]
    expected = {(s, n, 64, 4) for s in SURROGATES for n in (20, 10)}
    expected |= {("row_entropy", 20, 64, None), ("key_entropy", 20, 64, None)}
    assert {(row["surrogate"], row["tokens"], row["dim"], row["cells"]) for row in rows} == expected
    assert set(record["metrics"]["fraction_of_block"]) == set(SURROGATES)
    for row in rows:
        assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["fraction_of_block"] == pytest.approx(row["seconds"] / record["model"]["seconds"])
        # At least the gradients of the inputs are held.
        inputs = 1 if row["surrogate"] in ("ball", "halfspace") else 2
        assert row["peak_bytes"] >= 4 * inputs * row["tokens"] * row["dim"]
        assert row["peak_fraction_of_block"] == pytest.approx(row["peak_bytes"] / record["model"]["peak_bytes"])
    assert record["command"] == "the command"
    assert record["scale"] == "smoke"


def test_peak_memory_counts_what_is_live_at_once():
    def step():
        first = torch.ones(1_000_000)  # 4 MB
        first = first + 1  # two at once
        del first
        return torch.ones(500_000)

    assert peak_memory(step, CPU) == pytest.approx(8_000_000, abs=100)


def test_cost_cases_vary_one_thing_at_a_time():
    cases = cost_cases([10, 20], [64, 128], [4, 8, None])
    ball = [(c["tokens"], c["dim"], c["cells"]) for c in cases if c["surrogate"] == "ball"]
    assert ball == [(10, 64, 4), (20, 64, 4), (10, 128, 4), (10, 64, 8)]
    row = [(c["tokens"], c["dim"], c["cells"]) for c in cases if c["surrogate"] == "row_entropy"]
    assert row == [*ball, (10, 64, None)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("cube", 1, 4, 64, 4), "unknown surrogate"),
        (("halfspace", 1, 4, 64, 6), "power of two"),
        (("key_entropy", 1, 4, 65, 4), "multiple of 64"),
    ],
)
def test_impossible_cases_get_one_sentence(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence):
        surrogate_step(*arguments, CPU)


@pytest.mark.parametrize(
    "change", [{"tokens": []}, {"batch": 0}, {"cells": [None, 4]}, {"dims": [64, -1]}, {"cells": [4, 0]}]
)
def test_impossible_configurations_get_one_sentence(change, tmp_path):
    arguments = {"batch": 1, "tokens": [8], "dims": [64], "cells": [4]} | change
    with pytest.raises(ConfigError, match=next(iter(change))):
        run_regularizer_cost(**arguments, profile=PROFILE, store=tmp_path, command="")
    assert list(tmp_path.iterdir()) == []


def test_missing_devices_and_packages_get_one_sentence(monkeypatch):
    config = {"batch": 1, "cases": [], "repeats": 1, "seed": 0, "threads": 1, "device": "cpu"}
    with pytest.raises(ConfigError, match="at least one case"):
        run(config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="CUDA"):
        run({**config, "device": "cuda"})
    monkeypatch.setitem(__import__("sys").modules, "timm.models.vision_transformer", None)
    with pytest.raises(ConfigError, match="timm"):
        regularizer_cost.block_step(1, CPU)
