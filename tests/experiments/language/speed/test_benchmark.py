"""The language models' speed benchmark on a tiny model: its rows by hand, its parts against stock models."""

import json
import subprocess
import sys

import hydra
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from entreg.adapters import sparsify
from entreg.adapters.language_models import random_language_model
from entreg.cli import CONFIGS
from entreg.errors import ConfigError, EntregError
from entreg.experiments.language.speed import benchmark as language_speed
from entreg.experiments.language.speed import candidates as language_candidates
from entreg.experiments.language.speed.benchmark import run_language_speed
from entreg.experiments.language.speed.candidates import FREE_METHOD, Cell, candidates_of
from entreg.experiments.language.speed.settings import phases_within
from entreg.experiments.language.speed.steps import (
    FREE,
    GROUPED,
    OWN,
    PRODUCTS,
    Choosing,
    DecoderSizes,
    Decoding,
    FilledCache,
    Prefill,
    seen_by_layers,
)
from entreg.experiments.timing import Timing
from entreg.sparse import DecoderSparsity, sparsity_from_mapping
from entreg.sparse.backends import products

OPTIONS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SMALL = {
    "kind": "decoder",
    "sparsity": 0.75,
    "block_size": 16,
    "pool_size": 16,
    "dense_tail_blocks": 0,
    "page_size": 16,
}
MODEL = {
    "source": {"architecture": "smollm2_135m", "options": OPTIONS},
    "plans": {"ours": {**SMALL, "selection": "pooled"}, "other": {**SMALL, "selection": "pooled"}},
    "rivals": {"window": {**SMALL, "selection": "window"}},
}
PHASES = {
    "prefill": {"contexts": [128, 256, 512], "batches": [1]},
    "decode": {"contexts": [512], "batches": [1, 3]},
}
PROFILE = {
    "name": "smoke",
    "repeats": 2,
    "seeds": [0],
    "language": {"plans": ["ours", "window"], "speed": {"max_context": 256}},
}


def arguments(**change):
    values = {
        "models": {"tiny": MODEL},
        "phases": PHASES,
        "dtypes": ["float32"],
        "compilations": ["none"],
        "device": "cpu",
        "threads": 1,
        "eager_up_to": 128,
        "tokens_per_call": 3,
        "cell_seconds": 100,
        "profile": PROFILE,
        "command": "the command",
    }
    return values | change


@pytest.fixture(scope="module")
def model():
    return random_language_model("smollm2_135m", {**OPTIONS, "initializer_range": 0.3}).model


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    store = tmp_path_factory.mktemp("runs")
    paths = run_language_speed(**arguments(), store=store)
    written = [path.read_text() for path in paths]
    assert run_language_speed(**arguments(command="another"), store=store) == paths
    assert [path.read_text() for path in paths] == written
    records = [json.loads(text) for text in written]
    for one in records:
        # One context and batch each, so that a killed benchmark goes on behind the last one that it finished.
        assert len({(row["phase"], row["context"], row["batch"]) for row in one["rows"]}) == 1
    return records[0] | {"rows": [row for one in records for row in one["rows"]]}


def test_every_candidate_has_a_row_with_what_ran(record):
    rows = {(row["phase"], row["context"], row["batch"], row["method"]): row for row in record["rows"]}
    assert len(rows) == len(record["rows"])
    plans = {"ours", "window", FREE_METHOD}
    expected = {(128, name) for name in (*plans, "dense_fused", "dense_eager")}
    expected |= {(256, name) for name in (*plans, "dense_fused")}
    assert {(key[1], row["variant"]) for key, row in rows.items() if key[0] == "prefill"} == expected
    for batch in (1, 3):
        found = {key[3] for key in rows if key[:3] == ("decode", 256, batch)}
        variants = {rows["decode", 256, batch, name]["variant"] for name in found}
        assert found >= plans | {"dense"}
        caches = {f"dense_{kind}_cache" for kind in ("dynamic", "static", "growing")}
        assert variants >= caches | {"dense_grouped_heads", "dense_grouped_products", "dense_own_loops"}
    for (phase, context, batch, _), row in rows.items():
        dense = rows[phase, context, batch, "dense"]
        assert dense["seconds"] == min(r["seconds"] for r in rows.values() if _is_dense_of(r, phase, context, batch))
        assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["speedup_over_dense"] == pytest.approx(dense["seconds"] / row["seconds"])
        assert row["tokens_per_second"] == pytest.approx(
            batch * (context if phase == "prefill" else 1) / row["seconds"]
        )
        assert row["bound"] >= 1.0
        assert row["peak_bytes"] is None
        assert (row["selection_seconds"] is None) == (row["role"] not in ("ours", "rival"))
        if phase == "decode":
            assert row["milliseconds_per_token"] == pytest.approx(1e3 * row["seconds"])
    kernels = {row["variant"]: row["kernel"] for row in rows.values() if row["phase"] == "prefill"}
    assert kernels["dense_fused"] == "2 flash"
    assert kernels["dense_eager"] == "2 math"
    assert rows["decode", 256, 3, "window"]["kernel"] == "2 loops"
    assert record["model"]["weights"] == "random weights: speed only"
    assert record["metrics"]["threads"] == 1
    assert "kvpress" in record["metrics"]["not_run"]


def _is_dense_of(row, *cell):
    return (row["phase"], row["context"], row["batch"], row["role"]) == (*cell, "baseline")


def test_the_sparse_path_with_nothing_left_out_is_a_way_to_run_the_dense_model(model, monkeypatch):
    monkeypatch.setattr(products, "_multiplies_bfloat16", lambda: True)
    config = {**MODEL, "dtype": "bfloat16", "device": "cpu", "compilation": "none", "eager_up_to": 128}
    low = random_language_model("smollm2_135m", {**OPTIONS, "initializer_range": 0.3}, dtype="bfloat16").model
    with torch.no_grad():
        found = list(candidates_of(low, Cell("prefill", 128, 1), config, {}))
    kernels = {one.method: (one.kernel, one.role) for one in found}
    assert kernels["dense_own_products"] == ("2 products", "baseline")
    assert kernels["dense_fused"] == ("2 flash", "baseline")


def test_sparsities_are_those_of_counting_by_hand(record):
    rows = {(row["phase"], row["context"], row["method"]): row for row in record["rows"]}
    # 16 blocks of 16: rows of blocks see at most so many whole blocks, and half of their own.
    dense, blocks = 256 * 257 / 2, 16
    computed = [sum(min(row, count - 1) * 256 + 16 * 17 / 2 for row in range(blocks)) for count in range(1, 17)]
    window = max(entries for entries in computed if entries <= 0.25 * dense)
    assert rows["prefill", 256, "window"]["realised_sparsity"] == pytest.approx(1 - window / dense)
    # Means of blocks: the first eight rows meet eight of them, the others all.
    choosing = 8 * 8 + 8 * blocks
    pooled = max(entries for entries in computed if entries + choosing <= 0.25 * dense) + choosing
    assert rows["prefill", 256, "ours"]["realised_sparsity"] == pytest.approx(1 - pooled / dense)
    # A quarter of 256 keys is four pages; of the default plan one of them pays for the 16 means of pages.
    assert rows["decode", 256, "window"]["realised_sparsity"] == pytest.approx(0.75)
    assert rows["decode", 256, "ours"]["realised_sparsity"] == pytest.approx(1 - (3 * 16 + 16) / 256)
    for phase in ("prefill", "decode"):
        assert rows[phase, 256, "dense"]["realised_sparsity"] == 0.0
        assert rows[phase, 256, FREE_METHOD]["realised_sparsity"] == 1.0


def test_the_fastest_dense_variant_is_the_one_to_beat_and_bounds_follow_from_the_times(monkeypatch, model):
    given = {
        "dense_dynamic_cache": 30.0,
        "dense_static_cache": 21.0,
        "dense_growing_cache": 24.0,
        "dense_grouped_heads": 18.0,
        "dense_own_loops": 17.0,
        "dense_grouped_products": 15.0,
        "ours": 9.0,
        "choosing of ours": 0.5,
        FREE_METHOD: 6.0,
    }
    monkeypatch.setattr(
        language_speed,
        "interleaved_timings",
        lambda steps, **_: {name: Timing((given.get(name, 12.0),)) for name in steps},
    )
    config = {**MODEL, "model": "tiny", "dtype": "float32", "compilation": "none", "repeats": 1, "device": "cpu"}
    config |= {"tokens_per_call": 3, "eager_up_to": 0, "cell_seconds": 100}
    with torch.no_grad():
        rows = language_speed.measure(model, Cell("decode", 256, 1), config, torch.device("cpu"), {})
    by_name = {row["method"]: row for row in rows}
    assert rows[0]["method"] == "dense"
    assert (rows[0]["variant"], rows[0]["cache"]) == ("dense_grouped_products", "static")
    # A call writes three tokens; a choice alone is one step's.
    assert by_name["dense"]["seconds"] == 5.0
    ours = by_name["ours"]
    assert (ours["seconds"], ours["selection_seconds"], ours["speedup_over_dense"]) == (3.0, 0.5, pytest.approx(5 / 3))
    assert ours["speedup_over_fused"] == 2.0
    assert ours["attention_share"] == pytest.approx(9 / 15)
    assert ours["bound"] == pytest.approx(15 / (6 + 9 * (1 - ours["realised_sparsity"])))
    assert by_name[FREE_METHOD]["bound"] == pytest.approx(15 / 6)


def test_rounds_are_fewer_where_a_cell_would_take_too_long(model):
    config = {**MODEL, "model": "tiny", "dtype": "float32", "compilation": "none", "repeats": 9, "device": "cpu"}
    config |= {"tokens_per_call": 1, "eager_up_to": 0}
    rounds = []
    for seconds in (0.0, 1000.0):
        with torch.no_grad():
            rows = language_speed.measure(
                model, Cell("prefill", 64, 1), config | {"cell_seconds": seconds}, torch.device("cpu"), {}
            )
        rounds.append({row["rounds"] for row in rows})
    assert rounds == [{3}, {9}]


@torch.no_grad()
def test_decoding_writes_the_last_tokens_of_the_context_with_every_cache(model):
    filled = FilledCache(model, batch=2, context=20)
    before = [(keys.clone(), values.clone()) for keys, values in filled.parts]
    ids = torch.randint(64, (1, 2, 4), generator=torch.Generator().manual_seed(0))
    outputs = {}
    for kind in ("growing", "dynamic", "static"):
        step = Decoding(model, filled, kind, ids)
        outputs[kind] = step()
        assert torch.equal(step(), outputs[kind])
        assert int(step.cache.get_seq_length()) == 16
    # The truth: all four tokens at once on a cache of the first 16 places.
    cache = Decoding(model, filled, "dynamic", ids).cache
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        layer.keys, layer.values = keys[:, :, :16], values[:, :, :16]
    whole = model(input_ids=ids[0], past_key_values=cache, logits_to_keep=1).logits
    for out in outputs.values():
        assert torch.allclose(out, whole, atol=1e-4)


@torch.no_grad()
def test_attention_implementations_are_what_they_are_called(model):
    filled = FilledCache(model, batch=2, context=20)
    ids = torch.randint(64, (1, 2, 4), generator=torch.Generator().manual_seed(0))
    stock = Decoding(model, filled, "growing", ids)()
    for name in (GROUPED, PRODUCTS, OWN):
        grouped = language_candidates.with_attention(model, name)
        for kind in ("growing", "static"):
            assert torch.allclose(Decoding(grouped, filled, kind, ids)(), stock, atol=1e-5)
        assert torch.equal(Prefill(grouped, ids[0])(), Prefill(model, ids[0])())
    free = language_candidates.with_attention(model, FREE)
    for layer in (silenced := language_candidates.with_attention(model, "sdpa")).model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, out: (torch.zeros_like(out[0]), *out[1:]))
    assert torch.equal(Prefill(free, ids[0])(), Prefill(silenced, ids[0])())
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_choosing_alone_sees_the_queries_and_keys_of_all_layers(model):
    ids = torch.randint(64, (1, 256), generator=torch.Generator().manual_seed(0))
    seen = seen_by_layers(model, Prefill(model, ids))
    assert list(seen) == [0, 1]
    assert seen[0][0].shape == (1, 4, 256, 8)
    assert seen[0][1].shape == (1, 2, 256, 8)
    plan = sparsity_from_mapping({**SMALL, "layers": [1]})
    assert isinstance(plan, DecoderSparsity)
    choosing = Choosing(seen, plan)
    assert list(choosing.seen) == [1]
    choosing()


def test_sizes_of_the_exact_architecture():
    with torch.device("meta"):
        whole = random_language_model("smollm2_135m").model
    sizes = DecoderSizes.of(whole)
    assert sizes.parameters == 134_515_008
    assert (sizes.layers, sizes.heads, sizes.key_heads, sizes.head_dim) == (30, 9, 3, 64)
    assert sizes.cache_bytes(1000) == 2 * 30 * 3 * 64 * 1000 * 4


def test_phases_are_cut_to_a_profiles_context():
    assert phases_within(PHASES, 256, 3)["prefill"] == {"contexts": [128, 256], "batches": [1]}
    assert phases_within({**PHASES, "decode": None}, None, 3) == {"prefill": PHASES["prefill"]}


def source(**options):
    return {"tiny": MODEL | {"source": {"architecture": "smollm2_135m", "options": {**OPTIONS, **options}}}}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"compilations": ["fast"]}, "compilation must be"),
        ({"device": "tpu"}, "device must be"),
        ({"dtypes": ["float8"]}, "dtype must be"),
        ({"models": {}}, "needs a model"),
        ({"models": {"tiny": {"source": {}}}}, "exactly the keys"),
        ({"models": {"tiny": MODEL | {"source": {"architecture": "gpt"}}}}, "source of model 'tiny'"),
        ({"models": {"tiny": MODEL | {"rivals": {"a": {"kind": "none"}}}}}, "plan 'a' of model 'tiny'"),
        ({"models": {"tiny": MODEL | {"plans": {"a": {"kind": "cubes"}}}}}, "cubes"),
        ({"models": source(max_position_embeddings=100)}, "longer than the 100"),
        ({"models": {"tiny": MODEL | {"source": {"architecture": "mistral_7b"}}}}, "sliding window of 4096"),
        ({"models": source(num_attention_heads=0)}, "cannot be made"),
        ({"phases": {"training": None}}, "unknown phase 'training'"),
        ({"phases": {"prefill": None}}, "needs a phase"),
        ({"phases": {"prefill": {"contexts": [], "batches": [1]}}}, "at least one of each"),
        ({"phases": {"decode": {"contexts": [3], "batches": [1]}}}, "at least 4 tokens"),
        ({"phases": {"prefill": {"contexts": [3], "batches": [0]}}}, "at least 1"),
        ({"tokens_per_call": 0}, "at least 1"),
    ],
)
def test_impossible_settings_get_one_sentence(change, sentence, tmp_path):
    with pytest.raises(EntregError, match=sentence):
        run_language_speed(**arguments(**change), store=tmp_path)
    assert list(tmp_path.glob("*.json")) == []


def test_what_does_not_fit_into_memory_is_left_out_and_said(monkeypatch, tmp_path):
    monkeypatch.setattr(language_speed, "device_memory", lambda device: 250_000)
    paths = run_language_speed(**arguments(phases={**PHASES, "prefill": None}), store=tmp_path)
    small, large = (json.loads(path.read_text()) for path in paths)
    assert small["metrics"]["left_out"] == {}
    assert {row["batch"] for row in small["rows"]} == {1}
    # 256 tokens of keys and values of two layers of two heads of eight float32 numbers are 65,536 bytes.
    assert list(large["metrics"]["left_out"]) == ["decode, context 256, batch 3"]
    assert large["rows"] == []


def test_a_path_that_is_not_dense_at_sparsity_0_is_found_out(monkeypatch, model):
    monkeypatch.setattr(
        language_candidates, "sparsify", lambda variant, plan, **options: sparsify(variant, plan or 0.5, **options)
    )
    config = {**MODEL, "model": "tiny", "dtype": "float32", "compilation": "none", "repeats": 1, "device": "cpu"}
    config |= {"tokens_per_call": 3, "eager_up_to": 0, "cell_seconds": 100}
    with torch.no_grad(), pytest.raises(RuntimeError, match="at sparsity 0 differs"):
        language_speed.measure(model, Cell("prefill", 1024, 1), config, torch.device("cpu"), {})


def test_a_dense_variant_that_attends_differently_is_found_out(monkeypatch, model):
    variants = language_candidates.dense_variants

    def with_a_wrong_one(*arguments):
        *others, (method, _, cache) = variants(*arguments)
        wrong = language_candidates.with_attention(model, FREE)
        return [*others, (method, wrong, cache)]

    monkeypatch.setattr(language_candidates, "dense_variants", with_a_wrong_one)
    config = {**MODEL, "model": "tiny", "dtype": "float32", "compilation": "none", "repeats": 1, "device": "cpu"}
    config |= {"tokens_per_call": 3, "eager_up_to": 0, "cell_seconds": 100}
    with torch.no_grad(), pytest.raises(RuntimeError, match="is not that of stock SDPA"):
        language_speed.measure(model, Cell("decode", 256, 2), config, torch.device("cpu"), {})


class _Reached(Exception):
    """All checks that come before a model have passed."""


@pytest.mark.parametrize("name", ["language_speed", "language_speed_gpu"])
@pytest.mark.parametrize("profile", ["smoke", "reproduce", "offline", "paper"])
def test_configurations_are_possible(name, profile, monkeypatch, tmp_path):
    def run(config, loaded, **_):
        assert {"ours", "window"} <= {*config["plans"], *config["rivals"]}
        raise _Reached

    monkeypatch.setattr(language_speed, "run", run)
    monkeypatch.setattr(language_speed, "_load", lambda config: None)
    monkeypatch.setattr(language_speed, "_require_possible_model", lambda loaded, cells: None)
    monkeypatch.setattr(language_speed, "speed_device", torch.device)
    settings = yaml.safe_load((CONFIGS / "benchmark" / f"{name}.yaml").read_text())
    settings.pop("_target_")
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        group = OmegaConf.to_container(hydra.compose("benchmark", [f"profile={profile}"]).profile)
    with pytest.raises(_Reached):
        run_language_speed(**settings, profile=group, store=tmp_path, command="")


def test_it_needs_neither_hydra_nor_trackers():
    blocked = ("hydra", "omegaconf", "wandb", "datasets", "timm", "peft")
    module = "entreg.experiments.language.speed.benchmark"
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport {module}\n"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CONFIGS.parent)


def test_no_cuda_gets_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device"):
        run_language_speed(**arguments(device="cuda"), store=tmp_path)


@pytest.mark.xdist_group("compiling")
@pytest.mark.slow
def test_compiled_candidates_are_measured_when_they_are_compiled(tmp_path):
    models = {"tiny": MODEL | {"plans": {}}}
    phases = {"prefill": {"contexts": [256], "batches": [1]}}
    path = run_language_speed(**arguments(models=models, phases=phases, compilations=["default"]), store=tmp_path)[0]
    rows = json.loads(path.read_text())["rows"]
    assert [row["compilation"] for row in rows] == ["default"] * 3
    # Compiling takes seconds, a pass of the tiny model milliseconds.
    assert max(row["seconds_max"] for row in rows) < 0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_rows_have_peak_memory(tmp_path):
    path = run_language_speed(**arguments(device="cuda", dtypes=["bfloat16"]), store=tmp_path)[0]
    assert all(row["peak_bytes"] > 0 for row in json.loads(path.read_text())["rows"])
