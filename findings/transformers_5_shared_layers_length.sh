#!/usr/bin/env bash
# Where layers share keys (Gemma 3n, Gemma 4), a layer that reads another's keys cannot ask the cache how many there are:
# get_seq_length(layer) is 0 with DynamicCache(), and a ValueError with DynamicCache(config=...), for a layer that has just
# attended to seven keys. In a static cache, whose keys end in empty places, nothing else says how many are filled.
# Seen on Python 3.11, torch 2.13.0, transformers 5.23.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import DynamicCache, Gemma3nForCausalLM, Gemma3nTextConfig

config = Gemma3nTextConfig(
    vocab_size=61, vocab_size_per_layer_input=61, hidden_size=32, hidden_size_per_layer_input=4, intermediate_size=48,
    num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_kv_shared_layers=2,
    layer_types=["full_attention"] * 4, activation_sparsity_pattern=[0.0] * 4,
)
model = Gemma3nForCausalLM(config).eval()
seen = {}
for name, cache in (("DynamicCache()", DynamicCache()), ("DynamicCache(config)", DynamicCache(config=config))):
    with torch.no_grad():
        model(torch.ones(1, 7, dtype=torch.int64), past_key_values=cache)
    for layer in range(4):
        try:
            seen[name, layer] = cache.get_seq_length(layer)
        except ValueError as error:
            seen[name, layer] = f"ValueError: {error}"
        print(f"{name}, layer {layer}: {seen[name, layer]}")
if seen["DynamicCache()", 3] != 0 or "DummyLayer" not in str(seen["DynamicCache(config)", 3]):
    raise SystemExit("changed: layers that share keys give another length")
PYTHON
