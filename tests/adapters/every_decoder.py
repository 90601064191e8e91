"""Every decoder class of the installed transformers, built from a tiny configuration.

What is known of each is committed in ``known_decoders.yaml``; see ``test_every_decoder.py``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.adapters.small_decoders import VOCABULARY, transformers

CLASSES = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Name of the class by type of model."""

KNOWN: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("known_decoders.yaml").read_text(encoding="utf-8"))
"""What is known of each type of model, see the file."""

# What configurations call their sizes; one takes of them what it knows.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "max_seq_len": 128,
    "max_target_positions": 128,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "emb_dim": 32,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "hidden_size_per_layer_input": 4,
    "intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "shared_intermediate_size": 48,
    "dense_intermediate_size": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "n_inner": 48,
    "dff": 48,
    "dim_ff": 48,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "decoder_layers": 4,
    "encoder_layers": 1,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "dim_head": 8,
    "kv_channels": 8,
    "rotary_dim": 4,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "zero_expert_num": 2,
    "first_k_dense_replace": 1,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 24,
    "index_block_size": 4,
    "index_topk_blocks": 3,
    "num_kv_shared_layers": 2,
    "sliding_window": 24,
    "sliding_window_size": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    # Weights large enough that attention is not uniform.
    "initializer_range": 0.3,
}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
# Sizes that depend on each other in a way of their own.
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 4, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in set(_ALTERNATING)},
        "layer_types": _ALTERNATING,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16},
    },
    "dots3_note": {"vision_config": {"adapter_out_dim": 32}, "audio_config": {"adapter_out_dim": 32}},
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "gemma4_text": {"layer_types": _ALTERNATING, "global_head_dim": 8},
    "gemma4_unified_text": {"layer_types": _ALTERNATING, "global_head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_state": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 12,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "zamba": {"layers_block_type": ["hybrid"] * 4},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


def configuration(model_type: str) -> transformers.PreTrainedConfig:
    """A tiny configuration of one type of model; of composite ones the part of the text is tiny."""
    config = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type]
    # Two decoders are named by the configuration of a larger model.
    return _tiny(config.sub_configs.get("decoder", config))


def _tiny(config: type[transformers.PreTrainedConfig]) -> transformers.PreTrainedConfig:
    known = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map)
    sizes = {name: value for name, value in _SIZES.items() if name in known}
    if "kv_lora_rank" in known:
        # Latent attention has as many key heads as heads.
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    text = config.sub_configs.get("text_config")
    if text is not None and dataclasses.is_dataclass(text) and text.model_type:
        sizes["text_config"] = _tiny(text)
    return config(**{**sizes, **_OWN.get(config.model_type, {})})


def build(model_type: str, device: str = "cpu", **options: Any) -> nn.Module:
    """The decoder in evaluation mode, with the same weights every time; options are attributes of its configuration."""
    config = configuration(model_type)
    for name, value in options.items():
        setattr(config.get_text_config(), name, value)
    torch.manual_seed(0)
    with torch.device(device):
        if type(config) in transformers.AutoModelForCausalLM._model_mapping:
            model = transformers.AutoModelForCausalLM.from_config(config)
        else:
            model = getattr(transformers, CLASSES[model_type])(config)
    return model.eval()
