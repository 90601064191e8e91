"""Training of language models: next-token loss, penalties and distillation for the one loop, full or low-rank.

A whole training of a stock transformers decoder:

>>> model = prepare_language_training(model, {"kind": "lora", "rank": 16, "alpha": 32})     # or {"kind": "full"}
>>> captures = probe(model) if penalties.need_captures else None
>>> objective = LanguageObjective(penalties, captures=captures)
>>> train(model, objective, TokenWindows(windows), settings, folder, extra_parameters=penalties.parameters())
>>> captures.remove()
>>> model = merge_low_rank(model)                                           # a stock model again, for evaluation

``prepare_language_training`` changes the model in place and leaves its class: probes, the sparse path and ``generate``
see the stock model. Weights that are trained are float32 always, ``precision: bfloat16`` of the settings is autocast.
Frozen weights stay in the dtype they were loaded in, and out of the checkpoints: to read one, prepare the same stock
model in the same way, call :func:`entreg.training.checkpoints.load_model_weights`, then merge. A teacher is a
:func:`entreg.weights.frozen_copy` of the model, made before anything is attached to it or trained; partition
penalties choose their anchors by :func:`entreg.training.penalties.prepare_penalties` with a batch of tokens.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from entreg.errors import ConfigError, InputError
from entreg.names import require_choice, require_known
from entreg.training.penalties import Penalties
from entreg.training.vision import distillation_loss

# Logits held at once: 128 MiB of float32.
_CHUNK_ELEMENTS = 2**25


class TokenWindows(Dataset):
    """Windows of text for :func:`entreg.training.loop.train`, which draws their order from its seed.

    Args:
        windows: (count, length) int64 token numbers, at least 2 each, without padding.
        loss_mask: (count, length) bool, True for the tokens that are to be predicted; None for all but the first.

    Raises:
        InputError: other shapes or dtypes.
    """

    def __init__(self, windows: Tensor, loss_mask: Tensor | None = None) -> None:
        if windows.dim() != 2 or windows.dtype != torch.int64 or windows.shape[1] < 2:
            raise InputError(
                "windows must be int64 of shape (count, length) with a length of at least 2, got "
                f"{windows.dtype} {tuple(windows.shape)}"
            )
        if loss_mask is not None and (loss_mask.shape != windows.shape or loss_mask.dtype != torch.bool):
            raise InputError(
                f"loss_mask must be bool of the windows' shape {tuple(windows.shape)}, got {loss_mask.dtype} "
                f"{tuple(loss_mask.shape)}"
            )
        self._parts = {"input_ids": windows} if loss_mask is None else {"input_ids": windows, "loss_mask": loss_mask}

    def __len__(self) -> int:
        return len(self._parts["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: part[index] for name, part in self._parts.items()}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        return [self[index] for index in indices]


class LanguageObjective:
    """Next-token cross-entropy, plus penalties, plus distillation from the dense model; called per (micro-)batch.

    Logits are made from the last hidden states in chunks that are recomputed in the backward pass, so that memory does
    not grow with tokens x vocabulary. Losses are means over the predicted tokens of the (micro-)batch, in nats, in
    float32.

    Args:
        penalties: see :class:`entreg.training.penalties.Penalties`.
        captures: the :class:`~entreg.adapters.ProbeHandle` on the model, or None when no penalty needs it.
        sparse: the :class:`~entreg.adapters.SparsifyHandle` that is active in training, or None; if it records, its
            realised sparsity, the mean over its layers, is logged.
        teacher: dense model whose predictions are distilled, frozen; None for no distillation.
        distillation: weight of the distillation in [0, 1]; the cross-entropy has the rest.
        temperature: of both distributions in the distillation, above 0.
        chunk_size: tokens whose logits are held at once; by default so many that 2^25 logits are.

    Raises:
        ConfigError: a penalty that a decoder cannot have, or penalties without a probe; a value out of range.
    """

    def __init__(
        self,
        penalties: Penalties,
        *,
        captures: Any = None,
        sparse: Any = None,
        teacher: nn.Module | None = None,
        distillation: float = 0.0,
        temperature: float = 1.0,
        chunk_size: int | None = None,
    ) -> None:
        penalties.require_decoder()
        if penalties.need_captures and captures is None:
            raise ConfigError("penalties of a language model need a probe: give captures=probe(model)")
        if not 0 <= distillation <= 1 or not 0 < temperature < math.inf:
            raise ConfigError(
                f"distillation must be in [0, 1] and temperature above 0, got {distillation} and {temperature}"
            )
        if distillation > 0 and teacher is None:
            raise ConfigError(f"a distillation of {distillation} needs a teacher, a frozen copy of the dense model")
        self.penalties = penalties
        self.captures = captures
        self.sparse = sparse
        self.teacher = teacher
        self.distillation = distillation
        self.temperature = temperature
        self.chunk_size = chunk_size
        self._checked: set[int] = set()

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], step: int) -> tuple[Tensor, dict[str, Any]]:
        """Loss of one batch and its parts for the log.

        Args:
            model: the stock decoder, prepared or not, or a wrapper around it.
            batch: ``input_ids`` (batch, n) int64; optionally ``loss_mask`` (batch, n), true for the tokens that are to
                be predicted, and ``attention_mask`` (batch, n), 0 for padding, which is neither predicted nor
                predicted from.
            step: number of the optimiser step, from 0.

        Raises:
            InputError: no token of the batch is to be predicted, or an entropy is not finite.
            ConfigError: the model is no decoder of transformers with a linear head, or penalties meet windows that are
                longer than its sliding window.
        """
        chosen, targets = _predictions(batch)
        distils = self.distillation > 0
        wanted, teach = None, None
        if distils:
            with torch.no_grad():
                wanted, teach = self._last_states(self.teacher, batch)
                wanted = _rows(wanted, chosen)
        states, head = self._last_states(model, batch)
        task, distance = self._sums(_rows(states, chosen), targets, head, wanted, teach) / len(targets)
        parts: dict[str, Any] = {"task": task.detach()}
        loss = task
        if distils:
            parts["distillation"] = distance.detach()
            loss = (1.0 - self.distillation) * task + self.distillation * distance
        if self.sparse is not None and self.sparse.record:
            plans = [selection.plan for selection in self.sparse.selections]
            realised = [0.0 if plan is None else float(plan.sparsity) for plan in plans]
            parts["realised_sparsity"] = sum(realised) / max(1, len(realised))
        captures = () if self.captures is None else self.captures.captures
        if "attention_mask" not in batch and any(capture.mask is not None for capture in captures):
            raise ConfigError(
                "penalties take attention for plainly causal, and some layers see less: the windows of text are longer "
                "than the model's sliding window, make them shorter"
            )
        penalty, numbers = self.penalties(captures, (), step)
        if penalty is not None:
            loss = loss + penalty
        return loss, {**parts, **numbers}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the controllers of the penalties."""
        regularizer = self.penalties.regularizer
        return {} if regularizer is None else {"regularizer": regularizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        if self.penalties.regularizer is not None:
            self.penalties.regularizer.load_state_dict(state["regularizer"])

    def _last_states(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, nn.Module]:
        """(batch, n, d) hidden states that the head reads, and the head."""
        decoder = _stock_decoder(model)
        head = decoder.get_output_embeddings()
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        seen: list[Tensor] = []
        hook = decoder.base_model.register_forward_hook(lambda module, args, output: seen.append(output[0]))
        try:
            # Through the model's own forward, which wrappers for several processes must see, with one row of logits.
            last = model(**inputs, use_cache=False, logits_to_keep=1).logits
        finally:
            hook.remove()
        (states,) = seen
        if id(decoder) not in self._checked:
            with torch.no_grad():
                same = torch.allclose(head(states[:, -1:]).float(), last.float(), rtol=1e-3, atol=1e-5)
            if not same and torch.isfinite(last).all():
                raise ConfigError(
                    f"{type(decoder).__name__} does more than a linear map to get its logits, which training does not "
                    "support"
                )
            self._checked.add(id(decoder))
        return states, head

    def _sums(
        self, states: Tensor, targets: Tensor, head: nn.Module, wanted: Tensor | None, teach: nn.Module | None
    ) -> Tensor:
        """(2,): cross-entropy and distillation, summed over the predicted tokens."""

        def part(states: Tensor, targets: Tensor, wanted: Tensor | None) -> Tensor:
            logits = head(states)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            task = F.cross_entropy(logits, targets, reduction="sum")
            if wanted is None:
                return torch.stack((task, torch.zeros_like(task)))
            with torch.no_grad():
                answers = teach(wanted)
            return torch.stack((task, distillation_loss(logits, answers, self.temperature) * len(targets)))

        size = self.chunk_size or max(1, _CHUNK_ELEMENTS // head.weight.shape[0])
        pieces = states.split(size)
        others = [None] * len(pieces) if wanted is None else wanted.split(size)
        total = None
        for piece in zip(pieces, targets.split(size), others, strict=True):
            recomputed = len(pieces) > 1 and torch.is_grad_enabled()
            value = checkpoint(part, *piece, use_reentrant=False) if recomputed else part(*piece)
            total = value if total is None else total + value
        return total


def _predictions(batch: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor]:
    """Which of the batch x (n - 1) positions predict their next token (None: all), and these tokens, (count,)."""
    targets = batch["input_ids"][:, 1:].flatten()
    masks = []
    if "loss_mask" in batch:
        masks.append(batch["loss_mask"][:, 1:].bool())
    if "attention_mask" in batch:
        present = batch["attention_mask"].bool()
        masks += [present[:, 1:], present[:, :-1]]
    if not masks:
        return None, targets
    chosen = functools.reduce(torch.logical_and, masks).flatten()
    targets = targets[chosen]
    if len(targets) == 0:
        raise InputError("loss_mask and attention_mask leave no token of the batch to be predicted")
    return chosen, targets


def _rows(states: Tensor, chosen: Tensor | None) -> Tensor:
    rows = states[:, :-1].flatten(0, 1)
    return rows if chosen is None else rows[chosen]


def _stock_decoder(model: nn.Module) -> nn.Module:
    """The transformers decoder with a head in a model that may be a wrapper around it."""
    try:
        from transformers import PreTrainedModel
    except ModuleNotFoundError as error:
        raise ConfigError("training language models needs transformers: install entreg[llm]") from error
    decoder = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if decoder is None or decoder.get_output_embeddings() is None or decoder.base_model is decoder:
        raise ConfigError(
            f"{type(model).__name__} is no causal language model of transformers, such as LlamaForCausalLM"
        )
    return decoder


def prepare_language_training(model: nn.Module, adaptation: Mapping[str, Any]) -> nn.Module:
    """Make a stock decoder ready to be trained, in place.

    Args:
        model: as loaded, on any device.
        adaptation: ``kind``: ``full``, see :func:`full`, or ``lora`` with the arguments of :func:`low_rank`.

    Returns:
        The same model.

    Raises:
        ConfigError: an unknown kind or key, a value out of range, or a model that is no decoder of transformers; the
            model is unchanged.
    """
    check_adaptation(adaptation)
    _stock_decoder(model)
    options = {name: value for name, value in adaptation.items() if name != "kind"}
    return full(model) if adaptation["kind"] == "full" else low_rank(model, **options)


def check_adaptation(adaptation: Mapping[str, Any]) -> None:
    """Refuse an impossible adaptation, see :func:`prepare_language_training`, before any model is loaded.

    Raises:
        ConfigError: an unknown kind or key, a value out of range, or peft is needed and not installed.
    """
    kinds = {"full": (), "lora": ("rank", "alpha", "targets", "dropout", "seed")}
    kind = adaptation.get("kind")
    require_choice("the adaptation of a language model", kind, kinds)
    known = ("kind", *kinds[kind])
    require_known(adaptation, known, "key", f"the adaptation {kind}")
    if kind == "lora":
        _check_low_rank(**{name: adaptation[name] for name in ("rank", "alpha", "dropout") if name in adaptation})


def full(model: nn.Module) -> nn.Module:
    """Train all weights, in float32; in place."""
    return model.float().requires_grad_(True)


def low_rank(
    model: nn.Module,
    rank: int = 16,
    alpha: float = 32.0,
    targets: str | Sequence[str] = "attention",
    *,
    dropout: float = 0.0,
    seed: int = 0,
) -> nn.Module:
    """Train low-rank additions to linear layers, through peft, and freeze all else; in place.

    LoRA of Hu et al. (2021): W x + (alpha / rank) B A x with A (rank, in) random and B (out, rank) zero at first, so
    that the prepared model computes what the stock model does. A and B are float32; W stays as it was loaded. (The
    paper fine-tunes without saying how; rank, alpha and targets are our choice.)

    Args:
        model: stock transformers decoder.
        rank: at least 1.
        alpha: above 0.
        targets: ``attention`` for the linear layers of the attention modules, ``linear`` for all but the head, or the
            ends of module names, for example ``["q_proj", "k_proj"]``.
        dropout: of the additions' input, in [0, 1).
        seed: of A.

    Returns:
        The same model.

    Raises:
        ConfigError: a value out of range, a target that the model does not have, additions that are there already, or
            peft is not installed; the model is unchanged.
    """
    _check_low_rank(rank, alpha, dropout)
    from peft import LoraConfig, inject_adapter_in_model

    if next(_additions(model), None) is not None:
        raise ConfigError("the model has low-rank additions already; merge_low_rank makes them part of its weights")
    names = _target_names(model, targets)
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=dropout, bias="none")
        model = inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _check_low_rank(rank: int = 16, alpha: float = 32.0, dropout: float = 0.0) -> None:
    numbers = all(isinstance(value, int | float) for value in (alpha, dropout))
    if not isinstance(rank, int) or not numbers or rank < 1 or not 0 < alpha < math.inf or not 0 <= dropout < 1:
        raise ConfigError(
            "low-rank training needs a whole rank of at least 1, alpha above 0 and dropout in [0, 1), got "
            f"{rank}, {alpha} and {dropout}"
        )
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("low-rank training needs peft: install entreg[llm]")


@torch.no_grad()
def merge_low_rank(model: nn.Module) -> nn.Module:
    """Add the low-rank additions to the weights and put the stock layers back, in place; a model without stays as is.

    Returns:
        The same model, with the modules, names and dtypes of the stock model.
    """
    additions = list(_additions(model))
    for name, layer in additions:
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    if additions and hasattr(model, "peft_config"):
        del model.peft_config
    return model


def _additions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every layer with a low-rank addition."""
    if importlib.util.find_spec("peft") is None:
        return iter(())
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _target_names(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Full names of the linear layers that ``targets`` stands for."""
    decoder = _stock_decoder(model)
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not decoder.get_output_embeddings()
    }
    if targets == "linear":
        return list(linear)
    if targets == "attention":
        names = [name for name in linear if _parent_class(model, name).endswith("Attention")]
        if not names:
            raise ConfigError(f"{type(decoder).__name__} has no module named ...Attention; name the targets")
        return names
    wanted = [targets] if isinstance(targets, str) else list(targets)
    found: list[str] = []
    for target in wanted:
        matching = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not matching:
            ends = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(
                f"the model has no linear layer '{target}'; targets may be attention, linear, {', '.join(ends)}"
            )
        found += matching
    if not found:
        raise ConfigError("low-rank training needs at least one target")
    return sorted(set(found))


def _parent_class(model: nn.Module, name: str) -> str:
    return type(model.get_submodule(name.rpartition(".")[0])).__name__
