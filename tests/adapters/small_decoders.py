"""Tiny stock transformers decoders for the adapter tests, one of each family that must work."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, DEPTH, HEADS = 61, 2, 4
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    # Weights large enough that attention is not uniform.
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
WINDOW = 24
FAMILIES = {
    "llama": (transformers.LlamaConfig, {"num_key_value_heads": 2}),
    "mistral": (transformers.MistralConfig, {"num_key_value_heads": 2, "sliding_window": WINDOW}),
    "phi": (transformers.PhiConfig, {}),
    "qwen2": (transformers.Qwen2Config, {"num_key_value_heads": 1}),
    "gemma": (transformers.GemmaConfig, {"num_key_value_heads": 2, "head_dim": 16}),
}


def small_decoder(family: str = "llama", **options: object) -> nn.Module:
    """A model in evaluation mode."""
    config, own = FAMILIES[family]
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config(**{**_SIZES, **own, **options})).eval()


def tokens(batch: int = 2, length: int = 40) -> Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def padding(batch: int = 2, length: int = 40, *, side: str, count: int = 7) -> Tensor:
    """Attention mask with so many padding tokens in the first text, and none in the others."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, slice(0, count) if side == "left" else slice(length - count, length)] = 0
    return mask
