"""Tiny stock timm models for the adapter tests, one for each kind that must work."""

import timm
import torch
from torch import nn

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
VIT, DEIT = "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"
KINDS = {
    "class token": (VIT, {}),
    "average": (VIT, {"class_token": False, "global_pool": "avg"}),
    "registers": (VIT, {"reg_tokens": 3}),
    "no pooling": (VIT, {"reg_tokens": 3, "global_pool": ""}),
    "qk norm": (VIT, {"qk_norm": True}),
    "layer scale": (VIT, {"init_values": 0.5}),
    "distilled": (DEIT, {}),
}


def small_model(kind: str = "class token", *, fused: bool = True, **options: object) -> nn.Module:
    """A model in evaluation mode whose weights are large enough that its attention is not uniform."""
    name, own = KINDS[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SIZES, **own, **options})
    for block in model.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.4)
        block.attn.fused_attn = fused
    return model.eval()


def images(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))
