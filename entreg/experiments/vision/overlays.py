"""What a token plan keeps of single images, in a form that a record can hold and a figure can draw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from entreg.adapters import Selection, sparsify
from entreg.errors import ConfigError
from entreg.experiments.vision.classification import evaluation_mode
from entreg.experiments.vision.localisation import PATCH_COVERAGE, patch_masks
from entreg.sparse import sparsity_from_mapping
from entreg.training.vision import answer_logits


def overlays(
    model: nn.Module,
    dataset: Any,
    count: int,
    plans: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]],
    *,
    precision: str = "float32",
    coverage: float = PATCH_COVERAGE,
    gate: nn.ModuleDict | None = None,
) -> dict[str, Any]:
    """The first images of a data set, and what becomes of their patches under each token plan.

    Args:
        model: stock timm model, on its device.
        dataset: of items ``{"images", "labels"[, "masks"]}``, with ``raw(index)``, the image as (h, w, c) uint8,
            shown where it is not resized or cropped for the model.
        count: number of images, in [1, length of the data set].
        plans: pairs of the fields that name a plan and its mapping, as
            :func:`entreg.experiments.vision.evaluation.expand_plans` gives them; only those of kind ``tokens`` count.
        precision: ``float32``, or ``bfloat16`` through autocast.
        coverage: of a patch that belongs to the mask, see :func:`entreg.experiments.vision.localisation.patch_masks`.
        gate: of a model trained with one.

    Returns:
        ``grid``: rows and columns of patches; one entry per image each: pixels ``image`` as the model sees them,
        (h, w) or (h, w, c) in 0 ... 255; ``labels``, the ``answers`` of the dense model, and ``mask``, the patches of
        the semantic mask (None without masks). ``plans``: for each plan, under its words, the fields that name it and
        one entry per image each: ``answers``; ``kept``, the patches that stay or that stand for a part;
        ``assignment``, for each patch the place in ``kept`` of the one that stands for it (-1: dropped); ``mass``, each
        patch's share of the selection score. Patches are numbered row by row.

    Raises:
        ConfigError: a count out of range, or no token plan that chooses anything.
    """
    if not 1 <= count <= len(dataset):
        raise ConfigError(f"evaluation.overlays must lie in [1, {len(dataset)}], the images of the split, got {count}")
    items = [dataset[index] for index in range(count)]
    images = torch.stack([item["images"] for item in items])
    labels = torch.stack([torch.as_tensor(item["labels"]) for item in items]).reshape(count, -1)
    grid = tuple(model.patch_embed.grid_size)
    covered: list[list[int] | None] = [None] * count
    if "masks" in items[0]:
        masks = patch_masks(torch.stack([item["masks"] for item in items]), grid, coverage)
        covered = [mask.nonzero().flatten().tolist() for mask in masks]
    result: dict[str, Any] = {
        "grid": list(grid),
        "image": [_picture(dataset.raw(index), seen) for index, seen in enumerate(images)],
        "labels": labels.tolist(),
        "answers": _answers(model, images, labels, precision).tolist(),
        "mask": covered,
        "plans": {},
    }
    for names, mapping in plans:
        if mapping["kind"] != "tokens":
            continue
        with sparsify(model, sparsity_from_mapping(mapping), record=True, gate=gate) as handle:
            answers = _answers(model, images, labels, precision)
            selections = list(handle.selections)
        if selections:
            words = " ".join(str(value) for value in names.values() if value is not None)
            shown = _shown(selections[0], model.num_prefix_tokens)
            result["plans"][words] = {**names, "answers": answers.tolist(), **shown}
    if not result["plans"]:
        raise ConfigError("evaluation.overlays needs a plan of kind tokens that keeps fewer tokens than there are")
    return result


def _answers(model: nn.Module, images: Tensor, labels: Tensor, precision: str) -> Tensor:
    """(images, answers) classes that the model names."""
    device = next(model.parameters()).device
    with (
        evaluation_mode(model),
        torch.no_grad(),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        logits = model(images.to(device))
    classes = answer_logits(logits, labels if labels.shape[1] > 1 else labels[:, 0]).argmax(-1)
    return classes.reshape(labels.shape).cpu()


def _shown(selection: Selection, prefix: int) -> dict[str, list[Any]]:
    scores = selection.scores[:, prefix:].detach().double().cpu()
    mass = scores / scores.sum(-1, keepdim=True)
    assignment = selection.assignment[:, prefix:].cpu()
    return {
        # Places that only pad an image which keeps fewer than others are negative and come last.
        "kept": [patches[patches >= 0].tolist() for patches in selection.kept[:, prefix:].cpu() - prefix],
        "assignment": torch.where(assignment < 0, -1, assignment - prefix).tolist(),
        "mass": [[round(share, 6) for share in shares] for shares in mass.tolist()],
    }


def _picture(raw: Any, seen: Tensor) -> list[Any]:
    """The raw image, or, where the model sees another part of it, (c, h, w) that it sees, stretched to 0 ... 255."""
    if raw.shape[:2] != seen.shape[1:]:
        span = (seen.max() - seen.min()).clamp_min(1e-12)
        raw = ((seen - seen.min()) / span * 255.0).round().byte().permute(1, 2, 0).numpy()
    return (raw[..., 0] if raw.shape[-1] == 1 else raw).tolist()
