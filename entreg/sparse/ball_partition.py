"""A ball partition of the tokens of every image: each goes to the nearest of a few centres found on the spot."""

from __future__ import annotations

import torch
from torch import Tensor

from entreg.errors import InputError

_CANDIDATES_PER_PART = 8
_ITERATIONS = 2


@torch.no_grad()
def token_parts(points: Tensor, num_parts: int, *, num_prefix: int = 0) -> Tensor:
    """Partition the tokens of each batch element by k-means, without randomness (our choice; the paper gives no rule).

    Centres start at a farthest-first selection among evenly spaced tokens, eight per part, and move twice to the mean
    of their part: O(n x num_parts x c) in all, no n x n distances. Parts are numbered along a chain in which each next
    centre is the nearest one not yet visited, so that neighbouring numbers mean similar tokens.

    Args:
        points: (batch, n, c) floating point, e.g. the keys of all heads side by side.
        num_parts: at least 1; at most one part per token is made.
        num_prefix: leading tokens that belong to no image region; they form a part of their own.

    Returns:
        (batch, n) int64: 0 for the prefix, 1 ... num_parts for the others. A part can be empty.

    Raises:
        InputError: ``num_parts`` below 1.
    """
    if num_parts < 1:
        raise InputError(f"num_parts must be at least 1, got {num_parts}")
    dtype = torch.promote_types(points.dtype, torch.float32)
    patches = points[:, num_prefix:].to(dtype)
    count = min(num_parts, patches.shape[1])
    labels = points.new_zeros(points.shape[:2], dtype=torch.int64)
    if count == 0:
        return labels
    # Distances do not change, and squares lose no digits where all tokens share a large mean.
    patches = patches - patches.mean(1, keepdim=True)
    centers = _farthest_first(patches, count)
    for _ in range(_ITERATIONS):
        member = torch.nn.functional.one_hot(_nearest(patches, centers), count).to(dtype).transpose(1, 2)
        sizes = member.sum(-1, keepdim=True)
        centers = torch.where(sizes > 0, member @ patches / sizes.clamp_min(1.0), centers)
    labels[:, num_prefix:] = _chain_ranks(centers).gather(1, _nearest(patches, centers)) + 1
    return labels


def _nearest(patches: Tensor, centers: Tensor) -> Tensor:
    # |x - c|^2 without |x|^2, which is the same for every centre.
    return (patches @ centers.transpose(1, 2) - 0.5 * centers.square().sum(-1).unsqueeze(1)).argmax(-1)


def _farthest_first(patches: Tensor, count: int) -> Tensor:
    """(batch, count, c): the candidate farthest from the rest, then always the one farthest from those chosen."""
    length = patches.shape[1]
    number = min(length, _CANDIDATES_PER_PART * count)
    sample = patches[:, torch.linspace(0, length - 1, number, device=patches.device).round().long()]
    distances = torch.cdist(sample, sample)
    chosen = [distances.sum(-1).argmax(-1, keepdim=True)]
    nearest = _rows(distances, chosen[0])
    for _ in range(count - 1):
        chosen.append(nearest.argmax(-1, keepdim=True))
        nearest = torch.minimum(nearest, _rows(distances, chosen[-1]))
    index = torch.cat(chosen, dim=1)
    return sample.gather(1, index.unsqueeze(-1).expand(-1, -1, sample.shape[-1]))


def _chain_ranks(centers: Tensor) -> Tensor:
    """(batch, count) rank of each centre along a chain of nearest neighbours that starts at the first centre."""
    distances = torch.cdist(centers, centers)
    current = torch.zeros_like(distances[:, :1, 0], dtype=torch.int64)
    ranks = torch.zeros_like(distances[..., 0], dtype=torch.int64)
    visited = torch.zeros_like(ranks, dtype=torch.bool)
    for rank in range(centers.shape[1]):
        ranks.scatter_(1, current, rank)
        visited.scatter_(1, current, True)
        current = _rows(distances, current).masked_fill(visited, torch.inf).argmin(-1, keepdim=True)
    return ranks


def _rows(matrix: Tensor, index: Tensor) -> Tensor:
    """(batch, columns): one row of every matrix (batch, rows, columns), by index (batch, 1)."""
    return matrix.gather(1, index.unsqueeze(-1).expand(-1, 1, matrix.shape[-1])).squeeze(1)
