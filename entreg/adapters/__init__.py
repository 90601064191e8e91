"""Put the sparse path and the regulariser's probes into a stock model, and take them out again.

>>> handle = sparsify(model, 0.8)          # the best default plan for this kind of model
>>> logits = model(inputs)
>>> handle.remove()                        # the stock model again, bit for bit

Models are stock timm Vision Transformers and stock transformers decoders; neither library is imported for a model of
the other. The model's weights are never touched. (The paper does not say how its sparsity is applied; all of this is
our choice.)
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import nn

from entreg.adapters.handles import Capture, DecoderCapture, ProbeHandle, Selection, SparsifyHandle
from entreg.adapters.timm_models import vision_model
from entreg.errors import InputError
from entreg.sparse import Sparsity

__all__ = [
    "Capture",
    "DecoderCapture",
    "ProbeHandle",
    "Selection",
    "SparsifyHandle",
    "probe",
    "sparsify",
    "vision_model",
]


def sparsify(model: nn.Module, sparsity: float | Sparsity, *, record: bool = False, **options: Any) -> SparsifyHandle:
    """Put the sparse path into a model.

    A second call replaces what the first one put in.

    Args:
        model: stock timm ViT or stock transformers decoder, the latter also inside a ``peft`` model.
        sparsity: a number in [0, 1): realised sparsity of the default plan; or a whole configuration. 0 leaves the
            stock outputs, of a decoder those with transformers' SDPA attention.
        record: keep what was chosen in ``handle.selections``.
        options: of a ViT only: ``gate`` and ``generator``, see :func:`entreg.adapters.timm_vit.sparsify`.

    Returns:
        The handle that lists what changed and undoes it.

    Raises:
        InputError: the model is not supported; then nothing was changed.
        ConfigError: the plan does not fit the model.
    """
    return _adapter(model).sparsify(model, sparsity, record=record, **options)


def probe(model: nn.Module, layers: Sequence[int] | None = None) -> ProbeHandle:
    """Watch queries, keys and values of a model's layers, of a ViT the outputs of its blocks too.

    Works together with :func:`sparsify`, in either order. A new forward pass forgets the captures before.

    Args:
        model: stock timm ViT or stock transformers decoder, the latter also inside a ``peft`` model.
        layers: indices from 0; None for all.

    Returns:
        The handle with the captures, see :class:`Capture` and :class:`DecoderCapture`.

    Raises:
        InputError: the model is not supported, or has no such layer.
    """
    return _adapter(model).probe(model, layers)


def _adapter(model: nn.Module) -> ModuleType:
    """The adapter for the library that a model is from."""
    if _is_from("timm", model):
        from entreg.adapters import timm_vit

        return timm_vit
    if isinstance(model, nn.Module) and any(_is_from("transformers", module) for module in model.modules()):
        from entreg.adapters import transformers_decoder

        return transformers_decoder
    raise InputError(
        f"{type(model).__name__} is not supported: nothing was changed; supported are timm's Vision Transformers "
        "(vit_*, deit_*) and transformers' decoders (LlamaForCausalLM and others)"
    )


def _is_from(library: str, model: nn.Module) -> bool:
    return any(cls.__module__.partition(".")[0] == library for cls in type(model).__mro__)
