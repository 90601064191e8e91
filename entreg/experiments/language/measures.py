"""What is measured on a causal language model: losses per token, greedy continuations, ROUGE-L, effective support.

Every function takes a stock transformers decoder, dense or with the sparse path in it, and leaves it as it was.
Losses are in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from entreg import distributed
from entreg.adapters import probe
from entreg.entropy import attention_row_entropy, effective_support
from entreg.errors import ConfigError, InputError
from entreg.progress import progress

_CHUNK_ELEMENTS = 2**24
"""Float32 logits that are held at once: 64 MiB."""


@torch.no_grad()
def token_losses(model: nn.Module, input_ids: Tensor, *, last: int | None = None) -> Tensor:
    """Loss of each of the last tokens, given all tokens before it.

    The hidden states go through the output layer in chunks, so that logits of the whole length never exist at once.

    Args:
        model: causal language model whose logits are its output layer's, see :func:`require_plain_output`.
        input_ids: (batch, n) int64 on the model's device, n >= 2, without padding.
        last: number of tokens at the end whose loss is wanted, in [1, n - 1]; None for all but the first token.

    Returns:
        (batch, last) float32, nats, on the CPU.

    Raises:
        InputError: ``last`` is out of range.
    """
    length = input_ids.shape[1]
    last = length - 1 if last is None else last
    if not 1 <= last <= length - 1:
        raise InputError(f"the loss can be taken of 1 to {length - 1} tokens of {length}, got {last}")
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[:, -last - 1 : -1]
    targets = input_ids[:, -last:]
    head = model.get_output_embeddings()
    rows = max(1, _CHUNK_ELEMENTS // (len(input_ids) * head.weight.shape[0]))
    losses = [
        F.cross_entropy(_logits(model, head(part)).float().flatten(0, 1), wanted.flatten(), reduction="none").view(
            wanted.shape
        )
        for part, wanted in zip(hidden.split(rows, dim=1), targets.split(rows, dim=1), strict=True)
    ]
    return torch.cat(losses, dim=1).cpu()


def _logits(model: nn.Module, output: Tensor) -> Tensor:
    """Gemma's models squash what leaves the output layer."""
    limit = getattr(model.config, "final_logit_softcapping", None)
    return output if limit is None else torch.tanh(output / limit) * limit


@torch.no_grad()
def require_plain_output(model: nn.Module) -> None:
    """Make sure that a model's logits are what :func:`token_losses` takes them for.

    Raises:
        InputError: the model does something else to its logits than apply its output layer (and Gemma's limit).
    """
    ids = torch.arange(4, device=next(model.parameters()).device)[None]
    stock = model(input_ids=ids, use_cache=False).logits
    head = model.get_output_embeddings()
    ours = None if head is None else _logits(model, head(model.base_model(input_ids=ids, use_cache=False)[0]))
    if ours is None or not torch.allclose(ours.float(), stock.float(), rtol=1e-2, atol=1e-2):
        raise InputError(f"{type(model).__name__} changes its logits after its output layer, which is not supported")


@torch.no_grad()
def greedy_continuation(model: nn.Module, input_ids: Tensor, new_tokens: int) -> Tensor:
    """The model's most likely next tokens, one after the other, by transformers' ``generate`` with its cache.

    Args:
        model: causal language model; may run sparse in prefill, decode or both.
        input_ids: (n,) or (1, n) int64.
        new_tokens: at most so many, at least 1; fewer where the model ends its text.

    Returns:
        (at most new_tokens,) int64 on the CPU.
    """
    from transformers import GenerationConfig

    ids = input_ids.reshape(1, -1).to(next(model.parameters()).device)
    ends = model.generation_config.eos_token_id
    padding = ends[0] if isinstance(ends, list) else ends
    settings = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=new_tokens, eos_token_id=ends, pad_token_id=padding
    )
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return output[0, ids.shape[1] :].cpu()


def rouge_l(references: Sequence[str], candidates: Sequence[str]) -> list[float]:
    """ROUGE-L of each candidate: F1 of the longest common subsequence of stemmed words (Lin, 2004), by rouge-score.

    Returns:
        One number in [0, 100] per pair.

    Raises:
        ConfigError: the package is missing.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer
    except ModuleNotFoundError as error:
        raise ConfigError("ROUGE-L needs the package rouge-score: install entreg[llm]") from error
    # Named, because the package announces on standard error that it takes it by default.
    scorer = RougeScorer(["rougeL"], tokenizer=DefaultTokenizer(use_stemmer=True))
    return [
        100.0 * scorer.score(reference, candidate)["rougeL"].fmeasure
        for reference, candidate in zip(references, candidates, strict=True)
    ]


@torch.no_grad()
def row_supports(
    model: nn.Module, windows: Tensor, *, num_sampled_queries: int | None, seed: int = 0
) -> list[list[float]]:
    """Effective support exp(H) of the attention rows of every layer and head: how many keys a query uses.

    H is the mean row entropy over windows and (sampled) queries, causal; the paper's budget by entropy.

    Args:
        model: stock decoder, dense.
        windows: (count, n) int64.
        num_sampled_queries: rows per window, layer and head; None for all.
        seed: of the sample, the same rows for all layers.

    Returns:
        Number of keys per layer (outer) and query head (inner).
    """
    device = next(model.parameters()).device
    length = windows.shape[1]
    rows = None
    if num_sampled_queries is not None and num_sampled_queries < length:
        order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
        rows = order[:num_sampled_queries]
    handle = probe(model)
    try:
        total = None
        for window in progress(windows, "windows"):
            model.base_model(input_ids=window[None].to(device), use_cache=False)
            entropies = [
                attention_row_entropy(one.queries, one.keys, causal=True, scale=one.scale, query_indices=rows)[0].cpu()
                for one in handle.captures
            ]
            found = torch.stack(entropies).double()
            total = found if total is None else total + found
    finally:
        handle.remove()
    return effective_support(total / len(windows)).tolist()


class SparsityMeter:
    """Realised sparsity of the forward passes that a model makes while a sparse path is in it.

    Args:
        model: the model.
        handle: of :func:`entreg.adapters.sparsify` with ``record``; None for the dense model, whose sparsity is 0.

    Use it as a context. Prefill (several queries) and decode (one query) are told apart; a pass counts once per
    sequence, a layer that ran dense counts as 0. The passes of all processes of a launcher are counted, the same ones
    in the same way whoever made them.
    """

    def __init__(self, model: nn.Module, handle: Any) -> None:
        self._model, self._handle = model, handle
        self._passes: list[tuple[str, int, float]] = []
        self._hook: Any = None

    def __enter__(self) -> SparsityMeter:
        self._hook = self._model.base_model.register_forward_hook(self._saw)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._hook.remove()
        # After an error the other processes would wait in vain.
        if kind is None:
            self._passes = [one for process in distributed.from_all(self._passes) for one in process]

    @property
    def prefill(self) -> float:
        """Mean over the passes of several queries; NaN before the first."""
        return self._mean("prefill")

    @property
    def decode(self) -> float | None:
        """Mean over the passes of one query; None where there were none."""
        mean = self._mean("decode")
        return None if math.isnan(mean) else mean

    def _mean(self, phase: str) -> float:
        weights = [(batch, sparsity) for name, batch, sparsity in self._passes if name == phase]
        count = sum(batch for batch, _ in weights)
        # The exact sum, rounded once: it does not depend on the order.
        return math.fsum(batch * sparsity for batch, sparsity in weights) / count if count else math.nan

    def _saw(self, module: nn.Module, args: Any, output: Any) -> None:
        batch, length, _ = output.last_hidden_state.shape
        sparsity = 0.0
        if self._handle is not None:
            plans = [selection.plan for selection in self._handle.selections if selection.plan is not None]
            sparsity = sum(plan.sparsity for plan in plans) / self._handle.depth
        self._passes.append(("decode" if length == 1 else "prefill", batch, sparsity))
