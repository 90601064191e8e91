#!/usr/bin/env bash
# DbrxConfig() of transformers cannot be used: a model built from it has no attention.rope_theta, and with one given, its
# forward pass clamps to [None, None], because clip_qkv is None by default.
# Seen on Python 3.11, torch 2.13.0, transformers 5.23.0: AttributeError, then RuntimeError.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import DbrxConfig, DbrxForCausalLM

cases = (
    ({}, AttributeError, "rope_theta"),
    ({"attn_config": {"rope_theta": 10000.0}}, RuntimeError, "clamp"),
)
for options, kind, word in cases:
    config = DbrxConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=61, ffn_config={"ffn_hidden_size": 16}, **options)
    try:
        DbrxForCausalLM(config)(torch.ones(1, 4, dtype=torch.int64))
    except kind as error:
        print(f"{options}: {type(error).__name__}: {error}")
        if word not in str(error):
            raise SystemExit("changed: the error is another one") from error
    else:
        raise SystemExit(f"changed: DbrxConfig works with {options}")
PYTHON
