"""Every decoder class of the installed transformers, built from a tiny configuration.

What is known of each is committed in ``known_decoders.yaml``; see ``test_every_decoder.py``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.adapters.small_decoders import VOCABULARY, transformers

CLASSES = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Name of the class by type of model."""

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
    "index_topk": 12,
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
# Sizes that depend on each other in a way of their own.
_OWN: dict[str, dict[str, Any]] = {}


def configuration(model_type: str) -> transformers.PreTrainedConfig:
    """A tiny configuration of one type of model; parts of composite ones have their own sizes."""
    config = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map)
    sizes = {name: value for name, value in _SIZES.items() if name in known}
    return config(**{**sizes, **_OWN.get(model_type, {})})


def build(model_type: str, device: str = "cpu") -> nn.Module:
    """The decoder in evaluation mode, with the same weights every time."""
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(configuration(model_type)).eval()
