"""The sparse path and probes in stock transformers decoders: LLaMA, Mistral, Phi, Qwen2, Gemma and others like them.

Everything goes through transformers' public interfaces for attention and its masks, see
:mod:`entreg.adapters.transformers_attention`; no module and no weight is touched. Models inside a ``peft`` model or
another wrapper are found there; one that is part of a larger model (vision and language) is to be passed itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from entreg.adapters.handles import DecoderSparsifyHandle, ProbeHandle, watched_layers
from entreg.adapters.transformers_attention import Attachment
from entreg.errors import ConfigError, InputError
from entreg.sparse import DecoderSparsity

_SUPPORTED = (
    "transformers' decoders (LlamaForCausalLM and others) whose every layer has one causal attention that SDPA can do"
)


def sparsify(model: nn.Module, sparsity: float | DecoderSparsity, *, record: bool = False) -> DecoderSparsifyHandle:
    """Put the sparse path into a decoder.

    A second call replaces what the first one put in. Layers that stay dense run transformers' own SDPA, whatever the
    model ran before, and so does everything at sparsity 0. Under gradient checkpointing the path must still be there in
    the backward pass, which runs the layers again.

    Args:
        model: stock decoder, see the module.
        sparsity: a number in [0, 1): realised sparsity of the default plan; or a whole configuration.
        record: keep what was chosen in ``handle.selections``, one entry per layer that the plan acts on.

    Returns:
        The handle that lists what changed and undoes it.

    Raises:
        InputError: the model is not supported.
        ConfigError: the plan does not fit the model.
    """
    body, attentions = _supported(model)
    depth = len(attentions)
    settings = _settings(sparsity)
    layers = range(depth) if settings.layers is None else settings.layers
    if max(layers) >= depth:
        raise ConfigError(f"layers must be below {depth}, the number of layers, got {max(layers)}")
    names = {module: name for name, module in model.named_modules()}
    changed = [names[attentions[layer]] for layer in layers]
    earlier = Attachment.of(body)
    if earlier is not None and earlier.sparse is not None:
        earlier.sparse.remove()
    attachment = _attached(body, attentions)
    attachment.watch_head(_decoder(model))
    attachment.sparse = DecoderSparsifyHandle(model, changed, _take_out_path, settings, body, depth, record)
    return attachment.sparse


def probe(model: nn.Module, layers: Sequence[int] | None = None) -> ProbeHandle:
    """Watch queries, keys and values of a decoder's layers.

    Works together with :func:`~entreg.adapters.transformers_decoder.sparsify`, in either order. A new forward pass
    forgets the captures before; under gradient checkpointing, the second run of a layer is not captured. Layers that
    are only watched run transformers' own SDPA.

    Args:
        model: stock decoder, see the module.
        layers: indices from 0; None for all.

    Returns:
        The handle with the captures, each a :class:`~entreg.adapters.handles.DecoderCapture`.

    Raises:
        InputError: the model is not supported, or has no such layer.
    """
    body, attentions = _supported(model)
    chosen = watched_layers(layers, len(attentions))
    attachment = _attached(body, attentions)
    names = {module: name for name, module in model.named_modules()}

    def undo(_: nn.Module) -> None:
        attachment.probes = [entry for entry in attachment.probes if entry[0] is not handle]
        attachment.detach_if_unused()

    handle = ProbeHandle(model, [names[attentions[layer]] for layer in chosen], undo)
    attachment.probes.append((handle, frozenset(chosen)))
    return handle


def _attached(body: nn.Module, attentions: list[nn.Module]) -> Attachment:
    return Attachment.of(body) or Attachment(body, attentions)


def _take_out_path(model: nn.Module) -> None:
    body, _ = _supported(model)
    attachment = Attachment.of(body)
    attachment.sparse = None
    attachment.detach_if_unused()


def _settings(sparsity: float | DecoderSparsity) -> DecoderSparsity:
    if isinstance(sparsity, DecoderSparsity):
        return sparsity
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float):
        raise ConfigError(f"a decoder takes a number in [0, 1) or a DecoderSparsity, got {sparsity!r}")
    return DecoderSparsity(sparsity=float(sparsity))


def _decoder(model: nn.Module) -> PreTrainedModel | None:
    """transformers' model in a model that may wrap it."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def _supported(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """The decoder without its head, and its attention modules in the order of the layers."""

    def refuse(reason: str) -> InputError:
        return InputError(f"{type(model).__name__} {reason}: nothing was changed; supported are {_SUPPORTED}")

    decoder = _decoder(model)
    if decoder is None:
        raise refuse("has no transformers model in it")
    config = decoder.config
    if config.is_encoder_decoder:
        raise refuse("is an encoder with a decoder")
    if any(isinstance(module, PreTrainedModel) and module.config is not config for module in decoder.modules()):
        raise refuse("is made of several models; pass its language model")
    attentions = [
        module
        for module in decoder.modules()
        if getattr(module, "layer_idx", None) is not None and getattr(module, "is_causal", False) is True
    ]
    attentions.sort(key=lambda module: module.layer_idx)
    depth = getattr(config, "num_hidden_layers", 0)
    if depth == 0 or [module.layer_idx for module in attentions] != list(range(depth)):
        raise refuse("does not have one causal attention in every layer")
    if not decoder._supports_sdpa or not decoder._can_set_attn_implementation():
        raise refuse("has attention that SDPA cannot do (a soft cap on the logits, sinks) or that cannot be replaced")
    if any(module.config is not config for module in attentions):
        raise refuse("has layers with configurations of their own")
    return _innermost(decoder, attentions), attentions


def _innermost(decoder: nn.Module, attentions: list[nn.Module]) -> nn.Module:
    """The innermost model with all the layers: some models call a part of their base model, past it."""
    wanted = set(attentions)
    around = [
        module
        for module in decoder.modules()
        if isinstance(module, PreTrainedModel) and wanted <= set(module.modules())
    ]
    return around[-1]
