"""The speed benchmark on a tiny model: its rows by hand, its parts against the stock model, its configurations."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from torch import nn

from entreg.adapters import sparsify, vision_model
from entreg.cli import CONFIGS
from entreg.errors import ConfigError
from entreg.experiments.measuring import amdahl_bound, shared_copy, speed_device
from entreg.experiments.timing import Timing
from entreg.experiments.vision.speed import benchmark as vision_speed
from entreg.experiments.vision.speed.benchmark import run_vision_speed
from entreg.experiments.vision.speed.models import (
    Geometry,
    counted_tokens,
    give_columns,
    set_fused_attention,
    speed_model,
    without_attention,
    without_blocks,
)
from entreg.sparse import sparsity_from_mapping

OPTIONS = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
MODEL = {
    "name": "vit_base_patch16_224",
    "options": OPTIONS,
    "unfused": ["few", "columns"],
    "plans": {
        "few": {"kind": "tokens", "keep": 4, "before_layer": 1, "score": "magnitude"},
        "columns": {"kind": "columns", "sparsity": 0.5, "num_sampled_queries": 1, "score": "received"},
    },
    "rivals": {"merging": {"kind": "token_merging", "r": 2}},
}
PROFILE = {"name": "smoke", "repeats": 2, "seeds": [0], "vision": {"speed": {"max_batch": 2}}}


def arguments(**change):
    values = {
        "models": {"tiny": MODEL},
        "batches": [1, 2, 4],
        "dtypes": ["float32"],
        "compilations": ["none"],
        "device": "cpu",
        "threads": 1,
        "profile": PROFILE,
        "command": "the command",
    }
    return values | change


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return speed_model("vit_base_patch16_224", OPTIONS, "float32", torch.device("cpu"))


@pytest.fixture
def images(model):
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    store = tmp_path_factory.mktemp("runs")
    paths = run_vision_speed(**arguments(), store=store)
    written = [path.read_text() for path in paths]
    assert run_vision_speed(**arguments(command="another"), store=store) == paths
    assert [path.read_text() for path in paths] == written
    records = [json.loads(text) for text in written]
    # One batch each, so that a killed benchmark goes on behind the last one that it finished.
    assert [{row["batch"] for row in one["rows"]} for one in records] == [{1}, {2}]
    return records[0] | {"rows": [row for one in records for row in one["rows"]]}


def test_every_candidate_has_a_row_with_what_ran(record):
    rows = {(row["batch"], row["method"], row["cell"]): row for row in record["rows"]}
    expected = {("dense", "dense"), ("dense", "dense + fused"), ("merging", "sparse + fused")}
    expected |= {(name, cell) for name in ("few", "columns") for cell in ("sparse", "sparse + fused")}
    expected |= {("columns_given", "sparse + fused")}
    assert set(rows) == {(batch, *pair) for batch in (1, 2) for pair in expected}
    for (batch, _, cell), row in rows.items():
        assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["images_per_second"] == pytest.approx(batch / row["seconds"])
        for name, column in (("dense", "speedup_over_dense"), ("dense + fused", "speedup_over_dense_fused")):
            assert row[column] == pytest.approx(rows[batch, "dense", name]["seconds"] / row["seconds"])
        # The attention over all tokens is fused exactly where the cell says so.
        assert ("flash" in row["kernel"]) == cell.endswith("+ fused")
        assert row["peak_bytes"] is None
    assert rows[1, "dense", "dense"]["kernel"] == "3 math"
    assert rows[1, "dense", "dense + fused"]["kernel"] == "3 flash"
    assert record["model"]["weights"] == "random weights: speed only"
    assert record["metrics"]["threads"] == 1


def test_sparsities_and_tokens_are_those_of_counting_by_hand(record):
    rows = {row["method"]: row for row in record["rows"]}
    n = 17
    assert rows["dense"]["realised_sparsity"] == 0.0
    assert rows["dense"]["tokens_per_layer"] == [n] * 3
    assert rows["few"]["tokens_per_layer"] == [n, 5, 5]
    assert rows["few"]["realised_sparsity"] == pytest.approx(1 - (n**2 + 2 * 5**2) / (3 * n**2))
    assert rows["merging"]["tokens_per_layer"] == [15, 13, 11]
    assert rows["merging"]["realised_sparsity"] == pytest.approx(1 - (17**2 + 15**2 + 13**2) / (3 * n**2))
    # Half of 17 keys, one of which is spent on the row of the sampled query.
    assert rows["columns"]["realised_sparsity"] == pytest.approx(1 - (7 + 1) / n)
    assert rows["columns_given"]["realised_sparsity"] == pytest.approx(1 - 8 / n)


def test_shares_and_bounds_follow_from_the_times(monkeypatch, model):
    given = {"dense, unfused": 10.0, "dense, fused": 8.0, vision_speed._FREE: 6.0, vision_speed._REST: 1.0}

    def timings(steps, **_):
        return {name: Timing((given.get(name, 2.0),)) for name in steps}

    monkeypatch.setattr(vision_speed, "interleaved_timings", timings)
    config = {**MODEL, "model": "tiny", "dtype": "float32", "compilation": "none", "repeats": 1}
    with torch.inference_mode():
        rows = vision_speed.measure(model, 1, config, torch.device("cpu"))
    few = {row["cell"]: row for row in rows if row["method"] == "few"}
    entries, tokens = 1 - few["sparse"]["realised_sparsity"], (17 + 5 + 5) / (3 * 17)
    for cell, dense in (("sparse", 10.0), ("sparse + fused", 8.0)):
        row = few[cell]
        assert row["attention_share"] == pytest.approx((dense - 6) / dense)
        assert row["blocks_share"] == pytest.approx((dense - 1) / dense)
        assert row["bound_attention_alone"] == pytest.approx(dense / (6 + (dense - 6) * entries))
        assert row["bound"] == pytest.approx(dense / (1 + (dense - 6) * entries + 5 * tokens))
        assert (row["speedup_over_dense"], row["speedup_over_dense_fused"]) == (5.0, 4.0)


def test_amdahls_bound():
    assert amdahl_bound((0.5, 0.2)) == pytest.approx(1 / (0.5 + 0.5 * 0.2))
    assert amdahl_bound((0.3, 0.0), (0.5, 0.5)) == pytest.approx(1 / (0.2 + 0.25))
    assert amdahl_bound() == 1.0
    assert amdahl_bound((1.2, 0.0)) == pytest.approx(1000.0)


def test_copies_share_weights_and_nothing_else(model, images):
    twin = shared_copy(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    set_fused_attention(model, True)
    set_fused_attention(twin, False)
    assert model.blocks[0].attn.fused_attn
    sparsify(twin, sparsity_from_mapping(MODEL["plans"]["few"]))
    with torch.no_grad():
        assert torch.allclose(set_fused_attention(shared_copy(model), False)(images), model(images), atol=1e-5)
        assert not torch.allclose(twin(images), model(images), atol=1e-5)


def test_parts_of_the_model_are_what_they_are_called(model, images, monkeypatch):
    fused = set_fused_attention(shared_copy(model), True)
    with torch.no_grad():
        free, rest = without_attention(model)(images), without_blocks(model)(images)
        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", lambda q, k, v, **_: v)
        assert torch.allclose(free, fused(images), atol=1e-6)
        stem = model._pos_embed(model.patch_embed(images))
        assert torch.allclose(rest, model.forward_head(model.norm(stem)), atol=1e-6)
        assert isinstance(model.blocks[0].attn, type(fused.blocks[0].attn))


def test_given_columns_keep_prefix_tokens_and_all_of_them_are_dense(model, images):
    given = shared_copy(model)
    assert give_columns(given, 2, 0.0, "gather") == 0.0
    few = shared_copy(model)
    assert give_columns(few, 2, 0.99, "gather") == pytest.approx(16 / 17)
    plan = few.blocks[0].attn.attend.keywords["plan"]
    assert plan.keys.eq(0).all()
    with torch.no_grad():
        assert torch.allclose(given(images), model(images), atol=1e-5)


def test_tokens_are_counted_where_they_are_used(model, images):
    sparse = shared_copy(model)
    sparsify(sparse, sparsity_from_mapping({"kind": "tokens", "keep": 3, "before_layer": 2}))
    with torch.no_grad(), counted_tokens(sparse) as tokens:
        sparse(images)
    assert tokens == [17, 17, 4]
    with torch.no_grad():
        sparse(images)
    assert len(tokens) == 3
    assert Geometry.of(model) == Geometry(tokens=17, prefix=1, dim=32, heads=2, depth=3, image=(3, 16, 16))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"compilations": ["fast"]}, "compilation must be"),
        ({"device": "tpu"}, "device must be"),
        ({"dtypes": ["float16"]}, "dtype must be"),
        ({"batches": []}, "batch of at least 1"),
        ({"batches": [4]}, "batch of at least 1"),
        ({"models": {}}, "needs a model"),
        ({"models": {"tiny": {"name": "x"}}}, "exactly the keys"),
        ({"models": {"tiny": MODEL | {"unfused": ["nothing"]}}}, "unknown plan 'nothing'"),
        ({"models": {"tiny": MODEL | {"rivals": {"a": {"kind": "none"}}}}}, "must not be dense"),
        ({"models": {"tiny": MODEL | {"plans": {"few": {"kind": "cubes"}}}}}, "cubes"),
    ],
)
def test_impossible_settings_get_one_sentence(change, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        run_vision_speed(**arguments(**change), store=tmp_path)
    assert list(tmp_path.glob("*.json")) == []


def test_missing_devices_and_switches_get_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device"):
        speed_device("cuda")
    with pytest.raises(ConfigError, match="no attention"):
        set_fused_attention(nn.Linear(1, 1), True)


@pytest.mark.parametrize("name", ["vision_speed", "vision_speed_gpu"])
def test_every_configured_plan_fits_its_model(name):
    settings = yaml.safe_load((CONFIGS / "benchmark" / f"{name}.yaml").read_text())
    for model in settings["models"].values():
        with torch.device("meta"):
            empty = vision_model(model["name"], **model["options"])
        plans = {**model["plans"], **model["rivals"]}
        assert set(model["unfused"]) <= set(plans)
        for plan in plans.values():
            handle = sparsify(empty, sparsity_from_mapping(plan))
            handle.remove()


def test_benchmarks_need_neither_hydra_nor_trackers():
    blocked = ("hydra", "omegaconf", "wandb", "datasets")
    code = (
        f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
        "import entreg.experiments.vision.speed.benchmark, entreg.experiments.vision.speed.training_cost\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CONFIGS.parent)


@pytest.mark.xdist_group("compiling")
@pytest.mark.slow
def test_compiled_candidates_are_measured_too(tmp_path):
    small = MODEL | {"unfused": [], "plans": {"few": MODEL["plans"]["few"]}, "rivals": {}}
    paths = run_vision_speed(**arguments(models={"tiny": small}, compilations=["default"], batches=[1]), store=tmp_path)
    rows = json.loads(paths[0].read_text())["rows"]
    assert [row["compilation"] for row in rows] == ["default"] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_rows_have_peak_memory(tmp_path):
    paths = run_vision_speed(**arguments(device="cuda", dtypes=["bfloat16"]), store=tmp_path)
    assert all(row["peak_bytes"] > 0 for row in json.loads(paths[0].read_text())["rows"])
