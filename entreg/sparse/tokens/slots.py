"""Which tokens remain, and the row copies and sums behind every token reduction."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Slots:
    """Where the m remaining tokens come from.

    Attributes:
        positions: (batch, m) original position of each slot, prefix first; 0 where padded.
        order: (batch, patches) positions of all patch tokens by falling score; None after a bipartite merge.
        valid: (batch, m) bool, False where padded; None if nothing is.
    """

    positions: Tensor
    order: Tensor | None
    valid: Tensor | None

    @property
    def kept(self) -> Tensor:
        return self.positions if self.valid is None else self.positions.masked_fill(~self.valid, -1)

    def ones(self, x: Tensor) -> Tensor:
        return x.new_ones(self.positions.shape, dtype=wide_dtype(x))

    def masked(self, values: Tensor) -> Tensor:
        """(batch, m, ...) values with zeros where padded."""
        if self.valid is None:
            return values
        return values.masked_fill(~self.valid.reshape(self.valid.shape + (1,) * (values.dim() - 2)), 0)

    def numbered(self, n: int, otherwise: int) -> Tensor:
        """(batch, n) number of the slot of each original token, ``otherwise`` for those without."""
        batch, m = self.positions.shape
        numbers = torch.arange(m, device=self.positions.device).expand(batch, m)
        table = self.positions.new_full((batch, n + 1), otherwise)
        # Padded slots write to a column of their own, which is cut off.
        target = self.positions if self.valid is None else self.positions.masked_fill(~self.valid, n)
        return table.scatter(1, target, numbers)[:, :n]


def choose_slots(scores: Tensor, keep: int | Tensor, num_prefix: int) -> Slots:
    batch, n = scores.shape
    order = scores.detach()[:, num_prefix:].argsort(dim=1, descending=True, stable=True) + num_prefix
    prefix = torch.arange(num_prefix, device=scores.device).expand(batch, -1)
    if isinstance(keep, int):
        return Slots(torch.cat((prefix, order[:, :keep].sort(dim=1).values), 1), order, None)
    longest = int(keep.max())
    within = torch.arange(longest, device=scores.device) < keep.to(scores.device)[:, None]
    # Sorted with a position beyond the last, padding comes after every token.
    chosen = order[:, :longest].masked_fill(~within, n).sort(dim=1).values
    valid = torch.cat((torch.ones_like(prefix, dtype=torch.bool), chosen < n), 1)
    return Slots(torch.cat((prefix, chosen.masked_fill(chosen == n, 0)), 1), order, valid)


def nearest_anchors(features: Tensor, others: Tensor, slots: Slots, num_prefix: int) -> Tensor:
    """(batch, others) number among the anchors (patch slots) of the nearest one to each of the others."""
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        points = features.detach().to(wide_dtype(features))
        # Nearness does not change with the origin; from the mean nothing large cancels below.
        mean = points[:, num_prefix:].mean(1, keepdim=True)
        anchors = rows_at(points, slots.positions[:, num_prefix:]).sub_(mean)
        # |x - c|^2 is smallest where 2 x.c - |c|^2 is largest.
        offset = anchors.square().sum(-1)
        if slots.valid is not None:
            offset = offset.masked_fill(~slots.valid[:, num_prefix:], math.inf)
        closeness = torch.baddbmm(offset.unsqueeze(1), rows_at(points, others).sub_(mean), anchors.mT, beta=-1, alpha=2)
        return closeness.max(-1).indices


def merge_rows(x: Tensor, sizes: Tensor | None, slots: Slots, others: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Means, weighted by sizes, of the slots' own tokens and the ``others`` that join the slots ``targets``.

    Returns:
        (batch, m, c) means in the dtype of x, (batch, m) sizes.
    """
    wide = x.to(wide_dtype(x))
    sizes = None if sizes is None else sizes.detach().to(wide.dtype)
    # Row copies are fresh, and changed in place: on a CPU, new memory costs more than the arithmetic.
    joining = rows_at(wide, others)
    own_sizes = slots.masked(slots.ones(x) if sizes is None else sizes.gather(1, slots.positions))
    other_sizes = own_sizes.new_ones(others.shape) if sizes is None else sizes.gather(1, others)
    if slots.valid is not None:
        # Anchors that were listed among the others join themselves: they count once.
        other_sizes = other_sizes.masked_fill(slots.positions.gather(1, targets) == others, 0.0)
    total = own_sizes.scatter_add(1, targets, other_sizes)
    summed = rows_at(wide, slots.positions)
    if sizes is None and slots.valid is None:
        means = add_rows(summed, targets, joining).div_(total.unsqueeze(-1))
    else:
        # Weights before the sum: a part of one token has weight exactly 1 and keeps its value bit for bit.
        safe = total if slots.valid is None else total.masked_fill(~slots.valid, 1.0)
        weights = (other_sizes / safe.gather(1, targets)).unsqueeze(-1)
        means = add_rows(summed.mul_((own_sizes / safe).unsqueeze(-1)), targets, joining.mul_(weights))
    return means.to(x.dtype), total


def rows_at(x: Tensor, positions: Tensor) -> Tensor:
    """(batch, k, c): the tokens at (batch, k) positions. Whole rows are copied, much faster than by gather."""
    batch, n, width = x.shape
    step, uneven = divmod(x.stride(0), max(width, 1))
    if batch > 1 and step > n and not uneven and x.stride()[1:] == (width, 1):
        # Part of something larger, such as a cache with room behind its keys: a reshape would copy all of it.
        rows, n = x.as_strided(((batch - 1) * step + n, width), (width, 1)), step
    else:
        rows = x.reshape(batch * n, width)
    return rows.index_select(0, _flat(positions, n)).view(batch, positions.shape[1], width)


def add_rows(x: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """``x`` with the (batch, k, c) values added in place at (batch, k) positions."""
    batch, n, width = x.shape
    flat = _flat(positions, n)
    return x.view(batch * n, width).index_add_(0, flat, values.reshape(-1, width)).view(batch, n, width)


def _flat(positions: Tensor, n: int) -> Tensor:
    starts = torch.arange(0, len(positions) * n, n, device=positions.device)
    return (positions + starts[:, None]).flatten()


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums and sizes: float32, or float64 for float64 tokens."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
