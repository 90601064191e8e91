"""Everything that is measured on a trained vision model: accuracy dense and sparse, overlap with masks, robustness."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from entreg.adapters import probe, sparsify
from entreg.data.corrupted_sets import corrupted_dataset
from entreg.data.corruptions import CORRUPTIONS, EXTRA_CORRUPTIONS
from entreg.errors import ConfigError
from entreg.evaluation.classification import evaluate
from entreg.evaluation.localisation import Overlap, kept_patches, localise, overlap, patch_masks
from entreg.sparse import selection_scores, sparsity_from_mapping

Row = dict[str, Any]

_NO_CHOICE = {"level": None, "reduction": None, "score": None}


def expand_plans(plans: Mapping[str, Mapping[str, Any]]) -> list[tuple[Row, dict[str, Any]]]:
    """What the entries of ``evaluation.plans`` stand for.

    Args:
        plans: name to a sparsity as in ``configs/sparsity``; ``levels``, a list of sparsities, ``reductions`` and
            ``scores``, lists of those, stand for one plan each. None in place of a sparsity leaves the plan out.

    Returns:
        For each plan the fields that name it in a record's row (``plan``, ``level``, ``reduction``, ``score``) and its
        mapping.
    """
    expanded = []
    for name, values in plans.items():
        if values is None:
            continue
        plain = dict(values)
        choices = {
            "level": plain.pop("levels", [None]),
            "reduction": plain.pop("reductions", [plain.get("reduction")]),
            "score": plain.pop("scores", [plain.get("score")]),
        }
        for chosen in itertools.product(*choices.values()):
            names = dict(zip(choices, chosen, strict=True))
            given = {"sparsity": names["level"], "reduction": names["reduction"], "score": names["score"]}
            mapping = {**plain, **{key: value for key, value in given.items() if value is not None}}
            expanded.append(({"plan": name, **names}, mapping))
    return expanded


def evaluate_everything(
    model: nn.Module,
    datasets: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    data: Mapping[str, Any],
    gate: nn.Module | None = None,
) -> tuple[dict[str, Any], list[Row]]:
    """Measure a model in every way that a configuration asks for.

    Args:
        model: stock timm model, on its device.
        datasets: the splits to evaluate by name.
        config: the resolved ``evaluation`` part of ``configs/train.yaml``.
        data: the resolved ``data`` part, for corrupted versions of it.
        gate: of a model trained with one; plans with ``score: gate`` are left out without
            its part for their layer.

    Returns:
        metrics (the mean corruption errors, if any) and one row per split and plan.
    """
    rows: list[Row] = []
    for split in config["splits"]:
        rows.append(_accuracy_row(model, datasets[split], config, {"plan": "dense", **_NO_CHOICE}))
        for names, mapping in expand_plans(config["plans"]):
            if names["score"] == "gate" and (gate is None or str(mapping["before_layer"]) not in gate):
                continue
            rows.append(_accuracy_row(model, datasets[split], config, names, mapping, gate))
        if config["localisation"] is not None:
            rows += _localisation_rows(model, datasets[split], config)
        for row in rows:
            row.setdefault("split", split)
    metrics: dict[str, Any] = {}
    if config["robustness"] is not None:
        metrics, corrupted = _robustness(model, config, data)
        rows += corrupted
    return metrics, rows


def _accuracy_row(
    model: nn.Module,
    dataset: Any,
    config: Mapping[str, Any],
    names: Mapping[str, Any],
    mapping: Mapping[str, Any] | None = None,
    gate: nn.Module | None = None,
) -> Row:
    """Accuracy of the model under one plan, what sparsity that was, and how the kept tokens overlap with the mask."""
    handle = None
    if mapping is not None:
        generator = torch.Generator().manual_seed(0)
        handle = sparsify(model, sparsity_from_mapping(mapping), record=True, generator=generator, gate=gate)
    overlaps: list[Overlap] = []

    def observe(batch: Mapping[str, Tensor]) -> None:
        if handle is None or "masks" not in batch or mapping["kind"] != "tokens" or not handle.selections:
            return
        selection = handle.selections[0]
        patches = selection.scores.shape[1] - model.num_prefix_tokens
        kept = kept_patches(selection.kept.cpu(), patches, num_prefix=model.num_prefix_tokens)
        coverage = {} if config["localisation"] is None else {"coverage": config["localisation"]["coverage"]}
        overlaps.append(overlap(kept, patch_masks(batch["masks"], _grid(model), **coverage)))

    try:
        result = evaluate(model, dataset, observe=observe, **_loader(config))
        sparsity = 0.0 if handle is None else handle.realised_sparsity(dataset[0]["images"][None])
    finally:
        if handle is not None:
            handle.remove()
    row = {**names, "sparsity": sparsity, **result.metrics()}
    if overlaps:
        row |= {f"kept_{key}": value for key, value in _mean_overlap(overlaps).items()}
    return row


def _localisation_rows(model: nn.Module, dataset: Any, config: Mapping[str, Any]) -> list[Row]:
    """Overlap of the patches that each score ranks highest with the masks, by layer and for the layers' mean score."""
    scores = config["localisation"]["scores"]
    found: dict[tuple[str, int | str], list[Overlap]] = {}
    captures = probe(model)
    generator = torch.Generator().manual_seed(0)

    def observe(batch: Mapping[str, Tensor]) -> None:
        if "masks" not in batch:
            raise ConfigError("evaluation.localisation needs a data set with masks; set it to null, or data.masks")
        covered = patch_masks(batch["masks"], _grid(model), config["localisation"]["coverage"])
        for score in scores:
            by_layer = []
            for capture in captures.captures:
                ranked = selection_scores(
                    capture.queries,
                    capture.keys,
                    score,
                    num_prefix=capture.num_prefix,
                    num_sampled_queries=None,
                    scale=capture.scale,
                    values=capture.values,
                    features=capture.tokens,
                    generator=generator,
                ).mean(1)[:, capture.num_prefix :]
                by_layer.append(ranked.cpu() / ranked.sum(-1, keepdim=True).cpu())
                found.setdefault((score, capture.layer), []).append(localise(by_layer[-1], covered)["matched_area"])
            mean = torch.stack(by_layer).mean(0)
            found.setdefault((score, "mean"), []).append(localise(mean, covered)["matched_area"])

    try:
        evaluate(model, dataset, observe=observe, **_loader(config))
    finally:
        captures.remove()
    rows = []
    for (score, layer), overlaps in found.items():
        means = _mean_overlap(overlaps)
        rows.append(
            {
                **_NO_CHOICE,
                "plan": "localisation",
                "score": score,
                "layer": layer,
                "iou_matched": means["iou"],
                "iou_random": means["random"],
                "images": means["images"],
            }
        )
    return rows


def _robustness(
    model: nn.Module, config: Mapping[str, Any], data: Mapping[str, Any]
) -> tuple[dict[str, float], list[Row]]:
    """Error on every corruption and severity, dense and under the plan of ``robustness.sparsity``, and its means."""
    settings = config["robustness"]
    rows: list[Row] = []
    metrics = {}
    for setting, mapping in (("dense", None), ("sparse", settings["sparsity"])):
        handle = None if mapping is None else sparsify(model, sparsity_from_mapping(mapping))
        try:
            errors = {}
            for corruption in (*CORRUPTIONS, *(EXTRA_CORRUPTIONS if settings["extra"] else ())):
                for severity in settings["severities"]:
                    dataset = corrupted_dataset(data, corruption, severity, limit=config["limit"])
                    error = 1.0 - evaluate(model, dataset, **_loader(config)).top1
                    errors[corruption, severity] = error
                    rows.append(
                        {
                            **_NO_CHOICE,
                            "plan": "robustness",
                            "split": "test",
                            "setting": setting,
                            "corruption": corruption,
                            "severity": severity,
                            "error": error,
                        }
                    )
        finally:
            if handle is not None:
                handle.remove()
        counted = [error for (corruption, _), error in errors.items() if corruption in CORRUPTIONS]
        metrics[f"mce_{setting}"] = math.fsum(counted) / len(counted)
    return metrics, rows


def _mean_overlap(overlaps: Sequence[Overlap]) -> dict[str, Any]:
    joined = Overlap(*(torch.cat([getattr(one, name) for one in overlaps]) for name in ("iou", "best", "random")))
    return joined.metrics()


def _loader(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in ("batch_size", "precision", "limit")}


def _grid(model: nn.Module) -> tuple[int, int]:
    return tuple(model.patch_embed.grid_size)
