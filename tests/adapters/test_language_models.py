"""Loading language models: tiny ones saved here, every way a copy is wrong, published sizes, the packaged model."""

import json
import os
import shutil
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from entreg.adapters.language_models import (
    ARCHITECTURES,
    load_language_model,
    max_context,
    random_language_model,
    require_context,
)
from entreg.errors import AssetError, ConfigError, InputError
from tests.data.small_tokenizers import byte_tokenizer

TINY = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def save_tiny(folder, architecture="smollm2_135m", *, shards=False, **options):
    model = random_language_model(architecture, {**TINY, **options}).model
    model.save_pretrained(folder, **({"max_shard_size": "20KB"} if shards else {}))
    byte_tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_saved_model_is_loaded_bit_by_bit(tmp_path, architecture, shards):
    # Phi turns 0.4 of each head's dimensions.
    options = {"num_key_value_heads": 4, "hidden_size": 40} if architecture == "phi_2" else {}
    model = save_tiny(tmp_path, architecture, shards=shards, **options)
    loaded = load_language_model(str(tmp_path))
    ids = loaded.tokenizer("Some text", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, model(ids).logits)
    assert not loaded.model.training
    assert loaded.tokenizer.decode(ids[0]) == "Some text"
    assert loaded.name == loaded.revision["source"] == str(tmp_path)


def test_dtype_and_attention_are_as_asked_for(tmp_path):
    save_tiny(tmp_path)
    loaded = load_language_model(str(tmp_path), dtype="bfloat16", attention="eager")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.model.config._attn_implementation == "eager"


def test_revision_of_a_folder_changes_with_weights_and_configuration_only(tmp_path):
    model = save_tiny(tmp_path)
    first = load_language_model(str(tmp_path)).revision["sha256"]
    (tmp_path / "README.md").write_text("notes")
    assert load_language_model(str(tmp_path)).revision["sha256"] == first
    with torch.no_grad():
        model.model.norm.weight += 1
    model.save_pretrained(tmp_path)
    assert load_language_model(str(tmp_path)).revision["sha256"] != first


def raised(path):
    """The weights of a file, each one larger."""
    save_file({name: value + 1 for name, value in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize("named", [None, "model.safetensors", "model.safetensors.index.json", "other.safetensors"])
@pytest.mark.parametrize("present", ["single", "shards", "both"])
def test_the_revision_of_a_folder_is_that_of_the_files_that_transformers_reads(tmp_path, present, named):
    """A file counts if and only if the loaded weights change with it."""
    if present != "single":
        save_tiny(tmp_path, shards=True)
    if present != "shards":
        (tmp_path / "one").mkdir()
        save_tiny(tmp_path / "one")
        (tmp_path / "one" / "model.safetensors").rename(tmp_path / "model.safetensors")
        for path in (tmp_path / "one").iterdir():
            path.rename(tmp_path / path.name)
        raised(tmp_path / "model.safetensors")
    if named is not None:
        edit_config(tmp_path, transformers_weights=named)
        if not (tmp_path / named).exists():
            with pytest.raises(AssetError, match=rf"lacks {named}, which its config\.json names"):
                load_language_model(str(tmp_path))
            if named != "other.safetensors" or present == "shards":
                return
            shutil.copy(tmp_path / "model.safetensors", tmp_path / named)

    def loaded():
        found = load_language_model(str(tmp_path))
        return found.revision["sha256"], found.model.state_dict()

    revision, weights = loaded()
    counted = []
    for path in sorted(tmp_path.glob("*.safetensors")):
        content = path.read_bytes()
        raised(path)
        other, changed = loaded()
        assert (other != revision) == any(not torch.equal(weights[one], changed[one]) for one in weights), path.name
        counted += [path.name] * (other != revision)
        # Damage of what is not read is none.
        path.write_bytes(content[:6])
        if other == revision:
            assert loaded()[0] == revision
        else:
            with pytest.raises(AssetError, match="damaged or truncated"):
                loaded()
        path.write_bytes(content)
    assert len({"-of-" in name for name in counted}) == 1


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize(
    ("damage", "error", "match"),
    [
        (lambda folder: (folder / "config.json").unlink(), AssetError, r"holds no config.json \(it holds .*tokenizer"),
        (lambda folder: cut(folder / "config.json", 50), AssetError, "config.json is no configuration"),
        (lambda folder: edit_config(folder, model_type="new"), ConfigError, "architecture 'new', which transformers"),
        (lambda folder: edit_config(folder, model_type="t5"), ConfigError, "not a causal language model"),
        (
            lambda folder: edit_config(folder, architectures=["LlamaForSequenceClassification"]),
            ConfigError,
            "is a LlamaForSequenceClassification, not a causal",
        ),
        (lambda folder: edit_config(folder, hidden_size="many"), AssetError, "does not fit the architecture 'llama'"),
        (lambda folder: edit_config(folder, hidden_size=48), AssetError, "are not of its configuration"),
        (
            lambda folder: edit_config(folder, num_hidden_layers=3),
            AssetError,
            "configuration: they lack model.layers.2",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), AssetError, "holds no model.safetensors"),
        (lambda folder: cut(folder / "model.safetensors", -100), AssetError, "model.safetensors is damaged or trunc"),
        (lambda folder: cut(folder / "model.safetensors", 6), AssetError, "model.safetensors is damaged or truncated"),
        (lambda folder: (folder / "tokenizer.json").unlink(), AssetError, "no tokenizer that can be read"),
        (lambda folder: cut(folder / "tokenizer.json", 900), AssetError, "no tokenizer that can be read"),
    ],
)
def test_every_damaged_folder_is_one_sentence(tmp_path, damage, error, match):
    save_tiny(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=match) as caught:
        load_language_model(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_missing_and_damaged_shards_are_one_sentence(tmp_path):
    save_tiny(tmp_path, shards=True)
    shard = sorted(tmp_path.glob("model-00002-of-*.safetensors"))[0]
    cut(shard, -1)
    with pytest.raises(AssetError, match=rf"{shard.name} is damaged or truncated"):
        load_language_model(str(tmp_path))
    shard.unlink()
    with pytest.raises(AssetError, match=rf"lacks {shard.name}, which its index lists"):
        load_language_model(str(tmp_path))
    cut(tmp_path / "model.safetensors.index.json", 40)
    with pytest.raises(AssetError, match=r"index\.json is no index of weights"):
        load_language_model(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dtype": "int8"}, "unknown dtype 'int8', known are float32, bfloat16, float16"),
        ({"device": "gpu"}, "on the device 'gpu' is impossible here"),
        ({"device": "cuda:99"}, "float32 on the device 'cuda:99' is impossible here"),
        ({"attention": "sparkling"}, "cannot be used with attention=sparkling"),
    ],
)
def test_impossible_wishes_are_one_sentence(tmp_path, options, match):
    save_tiny(tmp_path)
    with pytest.raises(ConfigError, match=match) as caught:
        load_language_model(str(tmp_path), **options)
    assert "\n" not in str(caught.value)


def test_name_that_is_nothing_is_one_sentence(tmp_path):
    for name in (str(tmp_path / "nothing"), "./nothing", "smollm3"):
        with pytest.raises(AssetError, match=r"there is no folder .* with a language model; name one, or smollm2"):
            load_language_model(name)
    with pytest.raises(AssetError, match=r"holds no config\.json \(it is empty\)"):
        load_language_model(str(tmp_path))
    with pytest.raises(AssetError, match=r"there is no file .*nothing\.gguf"):
        load_language_model(str(tmp_path / "nothing.gguf"))


def test_hub_that_cannot_be_reached_is_one_sentence(tmp_path):
    script = (
        "from entreg.adapters.language_models import load_language_model\nfrom entreg.errors import AssetError\n"
        "try:\n    load_language_model('meta-llama/Llama-2-7b-hf')\nexcept AssetError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.count("\n") == 1
    assert "the hub cannot be reached and has left no copy in its cache" in result.stdout
    assert "hf download meta-llama/Llama-2-7b-hf --local-dir FOLDER" in result.stdout


@pytest.mark.parametrize(
    ("architecture", "parameters"),
    # As published: LLaMA-2 7B (Touvron et al., 2023), Mistral 7B (Jiang et al., 2023), Phi-2 and SmolLM2 (model cards).
    [
        ("llama_2_7b", 6_738_415_616),
        ("mistral_7b", 7_241_732_096),
        ("phi_2", 2_779_683_840),
        ("smollm2_135m", 134_515_008),
    ],
)
def test_published_architectures_have_the_published_number_of_parameters(architecture, parameters):
    model = random_language_model(architecture, device="meta").model
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_random_models_follow_their_seed_alone():
    state = torch.get_rng_state()
    one, same, other = (random_language_model("mistral_7b", TINY, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [found.model.lm_head.weight for found in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert one.tokenizer is None
    assert one.revision == {"source": "mistral_7b, random weights", "seed": "1"}
    made = random_language_model("phi_2", {**TINY, "num_key_value_heads": 4}, dtype="bfloat16").model
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}


def test_wrong_random_models_are_one_sentence():
    with pytest.raises(ConfigError, match="unknown architecture 'gpt_5', known are llama_2_7b, mistral_7b, phi_2"):
        random_language_model("gpt_5")
    with pytest.raises(ConfigError, match="the configuration of phi_2 has no field 'layers'"):
        random_language_model("phi_2", {"layers": 3})
    with pytest.raises(ConfigError, match="cannot be made") as caught:
        random_language_model("llama_2_7b", {**TINY, "num_attention_heads": 5})
    assert "\n" not in str(caught.value)


def test_context_longer_than_the_model_is_one_sentence():
    model = random_language_model("smollm2_135m", TINY).model
    assert max_context(model) == 64
    require_context(model, 64)
    with pytest.raises(InputError, match="a context of 65 tokens is longer than the 64 that tiny is made for"):
        require_context(model, 65, "tiny")


def write_gguf(path, model, *, without=()):
    """A LLaMA in the GGUF format, by the format's own writer, half its matrices in 8 bits; returns its state."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = byte_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    # The format wants a merge at least.
    writer.add_token_list([*sorted(vocabulary, key=vocabulary.get), "ab"])
    writer.add_token_types([3] * 3 + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    state = {}
    for name, value in model.state_dict().items():
        if name in ("lm_head.weight", *without):
            continue
        array = value.numpy()
        if "mlp" in name:
            packed = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            state[name] = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
            array = packed
        else:
            state[name] = array
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            for part, count in heads.items():
                if part in name:
                    # The format keeps the two halves of RoPE's pairs side by side.
                    array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        raw = gguf.GGMLQuantizationType.Q8_0 if "mlp" in name else None
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return state


def test_gguf_file_becomes_a_stock_model_that_can_be_saved(tmp_path, monkeypatch):
    monkeypatch.setenv("ENTREG_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    state = write_gguf(path, random_language_model("smollm2_135m", {**TINY, "vocab_size": 260}).model)
    loaded = load_language_model(str(path))
    found = loaded.model.state_dict()
    for name, value in state.items():
        assert np.array_equal(found[name].numpy(), value), name
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
    assert not hasattr(loaded.model.config, "quantization_config")
    loaded.model.to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    # The second time it is read from the cache, whose damage is noticed.
    monkeypatch.setattr("entreg.adapters.language_models._read_gguf", lambda path: pytest.fail("converted again"))
    assert torch.equal(load_language_model(str(path)).model.state_dict()[name], found[name].float())
    (weights,) = (tmp_path / "cache").rglob("model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(AssetError, match=r"is damaged .*; delete it and run again"):
        load_language_model(str(path))


@pytest.mark.parametrize("keep", [0, 3, 500, -1000])
def test_truncated_gguf_file_is_one_sentence(tmp_path, monkeypatch, keep):
    monkeypatch.setenv("ENTREG_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    write_gguf(path, random_language_model("smollm2_135m", {**TINY, "vocab_size": 260}).model)
    cut(path, keep)
    with pytest.raises(AssetError, match="cannot be read, truncated or of an unsupported kind") as caught:
        load_language_model(str(path))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_gguf_file_that_lacks_weights_is_not_filled_with_random_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("ENTREG_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    model = random_language_model("smollm2_135m", {**TINY, "vocab_size": 260}).model
    write_gguf(path, model, without=["model.norm.weight"])
    with pytest.raises(AssetError, match=r"tiny\.gguf are not of its configuration: they lack model\.norm\.weight"):
        load_language_model(str(path))


@pytest.mark.slow
def test_packaged_model_writes_english():
    loaded = load_language_model("smollm2")
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == 134_515_008
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt")
    new = loaded.model.generate(**ids, max_new_tokens=1, do_sample=False)[0, -1]
    assert loaded.tokenizer.decode([new]) == " Paris"
    assert max_context(loaded.model) == 8192
