#!/usr/bin/env bash
# Some models of transformers select the keys that a query attends to themselves (DeepSeek V3.2, GLM MoE DSA, A.X K2,
# dots3 note, MiniMax M3). They apply their selection only where the attention implementation is called "eager" or "sdpa";
# under any other name they hand it over as an argument. A function registered with AttentionInterface as the
# documentation describes, even SDPA's own under another name, ignores that argument: the model is dense, without a word.
# Seen on Python 3.11, torch 2.13.0, transformers 5.23.0: logits are off by 6.75, and are exactly those without selection.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DeepseekV32Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

AttentionInterface.register("mine", sdpa_attention_forward)
AttentionMaskInterface.register("mine", sdpa_mask)
config = DeepseekV32Config(
    vocab_size=61, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    first_k_dense_replace=1, index_head_dim=16, index_n_heads=2, index_topk=12, initializer_range=0.3,
)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config).eval()
x = torch.randint(2, 61, (1, 40))
with torch.no_grad():
    stock = model(x).logits
    model.set_attn_implementation("mine")
    renamed = model(x).logits
    for module in model.modules():
        if hasattr(module, "index_topk"):
            module.index_topk = 40
    model.set_attn_implementation("sdpa")
    dense = model(x).logits
print("sdpa against the same function by another name:", (stock - renamed).abs().max().item())
print("the other name against sdpa without selection: ", (dense - renamed).abs().max().item())
if torch.allclose(stock, renamed, atol=1e-3) or not torch.allclose(dense, renamed, atol=1e-3):
    raise SystemExit("changed: another name no longer means a dense model")
PYTHON
