"""A stock timm ViT and images, small enough to train in seconds."""

import torch

from entreg.adapters import vision_model

OPTIONS = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}


class Images:
    def __init__(self, size=12):
        generator = torch.Generator().manual_seed(3)
        self.images = torch.randn(size, 1, 16, 16, generator=generator)
        self.labels = torch.randint(3, (size,), generator=generator)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"images": self.images[index].clone(), "labels": self.labels[index]}


def transformer():
    torch.manual_seed(0)
    model = vision_model("vit_base_patch16_224", num_classes=3, **OPTIONS)
    with torch.no_grad():
        for block in model.blocks:
            # Random weights attend almost evenly.
            block.attn.qkv.weight.mul_(8)
    return model.eval()
