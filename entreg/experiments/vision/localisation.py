"""How well the patches that a method keeps agree with a semantic mask: intersection over union (IoU).

A patch mask says which patches the object covers. Two questions are asked of a method:

- at *matched area* it keeps as many patches as the object covers, so that 1 can be reached and only the choice counts;
- at a *given number* of kept patches, where a small mask caps what is possible: with m patches kept and an object of
  k patches no choice exceeds min(m, k) / max(m, k).

Beside each IoU stand the best possible value and that of a random choice of as many patches (its exact expectation).
The paper states neither the area nor the rule for patches that an object covers partly; both are our choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from entreg.errors import InputError

PATCH_COVERAGE = 0.25


@dataclass(frozen=True)
class Overlap:
    """IoU of kept patches with a semantic mask; NaN where the mask covers no patch.

    Attributes:
        iou: (images, ...), float64; further dimensions (heads, say) are those of the kept patches.
        best: (images, ...): the most that as many kept patches can reach.
        random: (images, ...): the expectation for as many patches chosen at random.
    """

    iou: Tensor
    best: Tensor
    random: Tensor

    @property
    def per_image(self) -> Tensor:
        """IoU of each image, (images,), the mean over heads; NaN where the mask covers no patch."""
        return self.iou.flatten(1).mean(1) if self.iou.dim() > 1 else self.iou

    def metrics(self) -> dict[str, float | int | None]:
        """Means over the images with a mask, for a record; None when there is no such image."""
        judged = ~self.per_image.isnan()
        means = {
            name: getattr(self, name)[judged].mean().item() if judged.any() else None
            for name in ("iou", "best", "random")
        }
        return {**means, "images": int(judged.sum())}


def patch_masks(masks: Tensor, grid: tuple[int, int], coverage: float = PATCH_COVERAGE) -> Tensor:
    """Which patches an object covers.

    Args:
        masks: (batch, height, width), bool or numbers that are 0 outside the object.
        grid: rows and columns of patches; they must divide height and width.
        coverage: fraction of its pixels, in [0, 1], that the object must at least cover in a patch; with 0 one pixel
            is enough. The default is our choice: half a patch loses most of a thin stroke, one pixel counts patches
            that show nothing.

    Returns:
        (batch, patches) bool, rows first.

    Raises:
        InputError: shapes that do not fit, or a coverage out of range.
    """
    rows, columns = grid
    if masks.dim() != 3 or min(grid) < 1 or masks.shape[1] % rows or masks.shape[2] % columns:
        raise InputError(f"masks of shape {tuple(masks.shape)} cannot be divided into {rows} x {columns} patches")
    if not 0 <= coverage <= 1:
        raise InputError(f"coverage must lie in [0, 1], got {coverage}")
    batch, height, width = masks.shape
    tiles = (masks != 0).reshape(batch, rows, height // rows, columns, width // columns)
    covered = tiles.sum((2, 4)).flatten(1)
    pixels = (height // rows) * (width // columns)
    return covered >= max(1, math.ceil(coverage * pixels - 1e-9))


def kept_patches(indices: Tensor, num_patches: int, *, num_prefix: int = 0, valid: Tensor | None = None) -> Tensor:
    """Kept token indices as a mask over patches.

    Args:
        indices: (batch, ..., kept) int64 in the coordinates of all tokens, prefix tokens first.
        num_patches: number of patch tokens.
        num_prefix: number of prefix tokens; kept ones do not count.
        valid: bool like ``indices``: False where an index is only padding.

    Returns:
        (batch, ..., patches) bool.

    Raises:
        InputError: an index out of range.
    """
    total = num_prefix + num_patches
    if valid is not None:
        indices = torch.where(valid, indices, total)
    outside = (indices < 0) | (indices > total if valid is not None else indices >= total)
    if outside.any():
        raise InputError(f"kept indices must lie in [0, {total}), got {int(indices[outside][0])}")
    # Padding falls into a column of its own, which is cut off with the prefix tokens.
    mask = torch.zeros(*indices.shape[:-1], total + 1, dtype=torch.bool, device=indices.device)
    mask.scatter_(-1, indices, True)
    return mask[..., num_prefix:total]


def top_patches(scores: Tensor, keep: int | Tensor) -> Tensor:
    """The patches with the highest scores; of equal scores the earlier patch.

    Args:
        scores: (batch, ..., patches).
        keep: how many, in [0, patches]; a number for all, or one per image, (batch,) int64.

    Returns:
        bool of the scores' shape.

    Raises:
        InputError: a number out of range, or NaN among the scores.
    """
    patches = scores.shape[-1]
    numbers = torch.as_tensor(keep, device=scores.device)
    if int(numbers.min()) < 0 or int(numbers.max()) > patches:
        raise InputError(f"between 0 and {patches} patches can be kept, got {keep}")
    if scores.isnan().any():
        raise InputError("the scores hold NaN")
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    ranks = torch.empty_like(order).scatter_(-1, order, torch.arange(patches, device=scores.device).expand_as(order))
    return ranks < numbers.reshape(-1, *[1] * (scores.dim() - 1))


def overlap(kept: Tensor, covered: Tensor) -> Overlap:
    """IoU of kept patches with the patches that the object covers.

    Args:
        kept: (batch, ..., patches) bool.
        covered: (batch, patches) bool, see :func:`patch_masks`.

    Raises:
        InputError: other dtypes, or shapes that do not fit.
    """
    fits = kept.dim() >= 2 and covered.shape == (kept.shape[0], kept.shape[-1])
    if not fits or kept.dtype != torch.bool or covered.dtype != torch.bool:
        raise InputError(
            f"kept and covered must be bool of shapes (batch, ..., patches) and (batch, patches), got "
            f"{tuple(kept.shape)} and {tuple(covered.shape)}"
        )
    covered = covered.reshape(len(covered), *[1] * (kept.dim() - 2), -1).to(kept.device).expand_as(kept)
    area, size = kept.sum(-1).cpu(), covered.sum(-1).cpu()
    common = (kept & covered).sum(-1).cpu().double()
    iou = common / (area + size - common)
    best = torch.minimum(area, size).double() / torch.maximum(area, size)
    random = _random_table(kept.shape[-1], area, size)
    empty = size == 0
    return Overlap(*(value.masked_fill(empty, math.nan) for value in (iou, best, random)))


def matched_area_overlap(scores: Tensor, covered: Tensor) -> Overlap:
    """IoU when as many patches are kept, by score, as the object covers in that image.

    Args:
        scores: (batch, ..., patches).
        covered: (batch, patches) bool.

    Raises:
        InputError: see :func:`top_patches` and :func:`overlap`.
    """
    return overlap(top_patches(scores, covered.sum(-1).to(scores.device)), covered)


def localise(scores: Tensor, covered: Tensor, keep: Sequence[int] = ()) -> dict[str, Overlap]:
    """IoU at matched area and at given numbers of kept patches.

    Args:
        scores: (batch, ..., patches).
        covered: (batch, patches) bool.
        keep: numbers of kept patches.

    Returns:
        ``"matched_area"`` and ``"keep_<number>"`` to their :class:`Overlap`.

    Raises:
        InputError: see :func:`top_patches` and :func:`overlap`.
    """
    results = {"matched_area": matched_area_overlap(scores, covered)}
    return results | {f"keep_{number}": overlap(top_patches(scores, number), covered) for number in keep}


def random_iou(patches: int, area: int, size: int) -> float:
    """Expected IoU of ``area`` patches chosen at random among ``patches`` with an object of ``size`` patches.

    The number of common patches is hypergeometric; the expectation is summed exactly.
    """
    total = math.comb(patches, area)
    return sum(
        math.comb(size, common) * math.comb(patches - size, area - common) / total * common / (area + size - common)
        for common in range(max(1, area + size - patches), min(area, size) + 1)
    )


def _random_table(patches: int, area: Tensor, size: Tensor) -> Tensor:
    pairs, where = torch.stack([area.flatten(), size.flatten()]).unique(dim=1, return_inverse=True)
    values = [random_iou(patches, int(m), int(k)) if k else math.nan for m, k in pairs.T]
    return torch.tensor(values, dtype=torch.float64)[where].reshape(area.shape)
