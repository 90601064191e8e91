"""timm models by name, with one sentence for whatever can be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from entreg.errors import AssetError, ConfigError
from entreg.names import nearest
from entreg.weights import load_weights


def require_architecture(name: str) -> None:
    """Make sure that timm has an architecture, without making a model.

    Args:
        name: as for :func:`vision_model`.

    Raises:
        ConfigError: it has not, or is not installed.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ConfigError("vision models need timm: install entreg[vision]") from error
    if not timm.is_model(name):
        raise ConfigError(f"timm has no model {name!r}{nearest(name, timm.list_models())}")


def vision_model(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    fused_attention: bool | None = None,
    **options: Any,
) -> nn.Module:
    """A timm model.

    Args:
        name: of the architecture, e.g. ``vit_base_patch16_224``, with or without a tag of pretrained weights.
        pretrained: fetch timm's weights from the hub.
        checkpoint: local safetensors file with the model's weights instead.
        fused_attention: whether attention goes through PyTorch's fused kernels; None for timm's choice. (On a CPU the
            fused backward pass of short sequences in bfloat16 takes three times as long as the plain one.)
        options: passed on to ``timm.create_model``, e.g. ``img_size``, ``num_classes``.

    Raises:
        ConfigError: unknown architecture or option, or both ``pretrained`` and ``checkpoint``.
        AssetError: weights cannot be fetched, or are missing, damaged or another model's.
    """
    require_architecture(name)
    import timm

    fetch = pretrained and checkpoint is None
    try:
        model = timm.create_model(name, pretrained=fetch, **options)
    except TypeError as error:
        raise ConfigError(f"the model {name} cannot be built with these options: {error}") from error
    except Exception as error:
        if not fetch:
            raise
        raise AssetError(
            f"the pretrained weights of {name} cannot be fetched ({type(error).__name__}); with a network run again, "
            "or give a local safetensors file as model.checkpoint"
        ) from error
    if fused_attention is not None:
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused_attention
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return model
