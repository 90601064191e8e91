"""Everything that is measured on a trained vision model: accuracy dense and sparse, overlap with masks, robustness."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from entreg import distributed
from entreg.adapters import probe, sparsify
from entreg.data.corrupted_sets import corrupted_dataset, open_corrupted
from entreg.data.corruptions import CORRUPTIONS, EXTRA_CORRUPTIONS, SEVERITIES
from entreg.data.digits import SPLITS
from entreg.data.vision_sets import vision_dataset
from entreg.errors import ConfigError
from entreg.experiments.vision.classification import PRECISIONS, evaluate
from entreg.experiments.vision.corruption_errors import CorruptionErrors
from entreg.experiments.vision.entropy_budgets import describe_budgets, kept_per_image, match_sparsity
from entreg.experiments.vision.localisation import Overlap, kept_patches, localise, overlap, patch_masks
from entreg.experiments.vision.overlays import overlays
from entreg.names import require_choice, require_some
from entreg.progress import Progress, progress_bar
from entreg.runs.finished import Finished
from entreg.sparse import Sparsity, TokenSparsity, selection_scores, sparsity_from_mapping
from entreg.sparse.registries import SCORES

Row = dict[str, Any]

_NO_CHOICE = {"level": None, "reduction": None, "score": None}


def expand_plans(plans: Mapping[str, Mapping[str, Any]]) -> list[tuple[Row, dict[str, Any]]]:
    """What the entries of ``evaluation.plans`` stand for.

    Args:
        plans: name to a sparsity as in ``configs/sparsity``; ``levels``, a list of sparsities, ``reductions`` and
            ``scores``, lists of those, stand for one plan each. With an ``entropy_budget`` a level is the mean sparsity
            to which its multiplier is fitted on validation images. None in place of a sparsity leaves the plan out.

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
            given = {"reduction": names["reduction"], "score": names["score"]}
            if "entropy_budget" not in plain:
                given["sparsity"] = names["level"]
            mapping = {**plain, **{key: value for key, value in given.items() if value is not None}}
            expanded.append(({"plan": name, **names}, mapping))
    return expanded


def check_evaluation(config: Mapping[str, Any]) -> None:
    """Refuse what cannot be evaluated, before a model is trained for it.

    Args:
        config: the resolved ``evaluation`` part of ``configs/vision.yaml``.

    Raises:
        ConfigError: an impossible plan, precision, batch size, limit or severity.
    """
    plans = expand_plans(config["plans"])
    if "validation" not in config["splits"] and any(_is_matched(*plan) for plan in plans):
        raise ConfigError("levels of an entropy_budget are fitted on the split validation; add it to evaluation.splits")
    mappings = [mapping for _, mapping in plans]
    robustness = config["robustness"]
    if robustness is not None:
        mappings.append(robustness["sparsity"])
        severities = robustness["severities"]
        if not severities or not set(severities) <= set(SEVERITIES):
            raise ConfigError(f"evaluation.robustness.severities must be some of 1 to 5, got {severities}")
    for mapping in mappings:
        sparsity_from_mapping(mapping)
    if config.get("overlays") is not None and "test" not in config["splits"]:
        raise ConfigError("evaluation.overlays shows scenes of the split test; add it to evaluation.splits")
    require_choice("evaluation.precision", config["precision"], PRECISIONS)
    require_some("evaluation.splits", config["splits"], SPLITS, "split")
    localisation = config["localisation"]
    if localisation is not None:
        # A gate is a part of the model that was trained with it.
        ranking = [name for name, one in SCORES.items() if not one.learned]
        require_some("evaluation.localisation.scores", localisation["scores"], ranking, "score")
    if config["batch_size"] < 1 or (config["limit"] is not None and config["limit"] < 1):
        raise ConfigError(
            f"evaluation.batch_size and limit must be at least 1, got {config['batch_size']} and {config['limit']}"
        )


def open_datasets(config: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The training images and every split that is evaluated, and a look at the corrupted and masked images.

    What is missing or damaged must show before a model is built or trained, not after.

    Args:
        config: the resolved ``evaluation`` part of ``configs/vision.yaml``.
        data: the resolved ``data`` part.

    Returns:
        Data sets by the name of their split.

    Raises:
        ConfigError: no folder where one is needed, or no masks or corruptions where they are to be measured.
        InputError: a value out of range, or images that cannot be corrupted.
        AssetError: files are missing or not what they should be; the sentence says how to get them.
    """
    datasets = {split: vision_dataset(data, split) for split in ("train", *config["splits"])}
    if config["localisation"] is not None and any("masks" not in datasets[split][0] for split in config["splits"]):
        raise ConfigError("evaluation.localisation needs a data set with masks; set it to null, or data.masks")
    if config["robustness"] is not None:
        corrupted, _ = open_corrupted(data, limit=config["limit"])
        lacking = [name for name in _corruptions(config) if name not in corrupted.corruptions]
        if lacking:
            raise ConfigError(f"there are no images under {lacking[0]}; set evaluation.robustness.extra to false")
    return datasets


def evaluate_everything(
    model: nn.Module,
    datasets: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    data: Mapping[str, Any],
    gate: nn.Module | None = None,
    finished: Finished | None = None,
) -> tuple[dict[str, Any], list[Row]]:
    """Measure a model in every way that a configuration asks for.

    Args:
        model: stock timm model, on its device.
        datasets: the splits to evaluate by name.
        config: the resolved ``evaluation`` part of ``configs/vision.yaml``.
        data: the resolved ``data`` part, for corrupted versions of it.
        gate: of a model trained with one; plans with ``score: gate`` are left out without
            its part for their layer.
        finished: what was measured before, which is not measured again; gets what is measured now.

    Returns:
        metrics and one row per split and plan. With corrupted images the metrics are, dense and sparse, the mean
        corruption errors ``mce_...`` (None unless all 15 corruptions were measured at all 5 severities) and
        ``corrupted_error_...``, the mean over those of the 15 that were measured.
    """
    finished = finished or Finished()
    wanted = [
        (names, mapping)
        for names, mapping in expand_plans(config["plans"])
        if names["score"] != "gate" or _has_gate(gate, mapping)
    ]
    splits = {split: _images(datasets[split], config) for split in config["splits"]}
    fitted = sum(_is_matched(*plan) for plan in wanted) * splits.get("validation", 0)
    per_split = 1 + len(wanted) + (config["localisation"] is not None)
    # Corrupted images are those of the test split, or as many as other files hold.
    corrupted = max(splits.values())
    cells = 0 if config["robustness"] is None else 2 * len(_cells(config))
    rows: list[Row] = []
    metrics: dict[str, Any] = {}
    with progress_bar(fitted + per_split * sum(splits.values()) + cells * corrupted, "evaluation") as bar:
        plans = [(names, _matched(model, datasets, config, names, mapping, finished, bar)) for names, mapping in wanted]
        for split, images in splits.items():
            found: list[Row] = []
            for names, plan in [({"plan": "dense", **_NO_CHOICE}, None), *plans]:
                row = functools.partial(_accuracy_row, model, datasets[split], config, names, plan, gate)
                found.append(finished.measure(f"{split}, {_words(names)}", row, bar, images))
            if config["localisation"] is not None:
                overlaps = functools.partial(_localisation_rows, model, datasets[split], config)
                found += finished.measure(f"{split}, localisation", overlaps, bar, images)
            rows += [{**row, "split": split} for row in found]
        if config["robustness"] is not None:
            metrics, found = _robustness(model, config, data, corrupted, finished, bar)
            rows += found
        # Only where the configuration names it: configurations without it have records already.
        if config.get("overlays") is not None:
            shown = functools.partial(
                overlays,
                model,
                datasets["test"],
                config["overlays"],
                expand_plans(config["plans"]),
                precision=config["precision"],
                gate=gate,
                **_coverage(config),
            )
            metrics["overlays"] = finished.measure("overlays", shown, bar, 0.0)
    return metrics, rows


def _words(names: Mapping[str, Any]) -> str:
    return " ".join(str(value) for value in names.values() if value is not None)


def _images(dataset: Any, config: Mapping[str, Any]) -> int:
    return min(len(dataset), config["limit"] or len(dataset))


def _accuracy_row(
    model: nn.Module,
    dataset: Any,
    config: Mapping[str, Any],
    names: Mapping[str, Any],
    plan: Sparsity | None = None,
    gate: nn.Module | None = None,
) -> Row:
    """Accuracy of the model under one plan, what sparsity that was, and how the kept tokens overlap with the mask."""
    handle = None
    generator = torch.Generator()
    if plan is not None:
        handle = sparsify(model, plan, record=True, generator=generator, gate=gate)
    overlaps: list[Overlap] = []
    budgets: list[Tensor] = []
    own_budgets = isinstance(plan, TokenSparsity) and plan.entropy_budget is not None

    def observe(batch: Mapping[str, Tensor]) -> None:
        if not isinstance(plan, TokenSparsity) or not handle.selections:
            return
        if own_budgets:
            budgets.append(kept_per_image(handle, model.num_prefix_tokens))
        # Overlaps of different numbers of patches have no common best possible value.
        if own_budgets or "masks" not in batch:
            return
        selection = handle.selections[0]
        patches = selection.scores.shape[1] - model.num_prefix_tokens
        kept = kept_patches(selection.kept.cpu(), patches, num_prefix=model.num_prefix_tokens)
        overlaps.append(overlap(kept, patch_masks(batch["masks"], _grid(model), **_coverage(config))))

    try:
        result = evaluate(model, dataset, observe=observe, generator=generator, **_loader(config))
        overlaps, budgets = distributed.in_order(overlaps), distributed.in_order(budgets)
        image = dataset[0]["images"][None].to(next(model.parameters()).device)
        generator.manual_seed(0)
        sparsity = 0.0 if handle is None else handle.realised_sparsity(image)
    finally:
        if handle is not None:
            handle.remove()
    row = {**names, "sparsity": sparsity, **result.metrics()}
    if own_budgets:
        tokens = model.num_prefix_tokens + model.patch_embed.num_patches
        row |= describe_budgets(
            torch.cat(budgets), plan, num_tokens=tokens, depth=len(model.blocks), num_prefix=model.num_prefix_tokens
        )
    if overlaps:
        row |= {f"kept_{key}": value for key, value in _mean_overlap(overlaps).items()}
    return row


def _localisation_rows(model: nn.Module, dataset: Any, config: Mapping[str, Any]) -> list[Row]:
    """Overlap of the patches that each score ranks highest with the masks, by layer and for the layers' mean score."""
    scores = config["localisation"]["scores"]
    found: dict[tuple[str, int | str], list[Overlap]] = {}
    captures = probe(model)
    generator = torch.Generator()

    def observe(batch: Mapping[str, Tensor]) -> None:
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
        evaluate(model, dataset, observe=observe, generator=generator, **_loader(config))
    finally:
        captures.remove()
    rows = []
    for score, layer in [(score, layer) for score in scores for layer in (*range(len(model.blocks)), "mean")]:
        means = _mean_overlap(distributed.in_order(found.get((score, layer), [])))
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
    model: nn.Module,
    config: Mapping[str, Any],
    data: Mapping[str, Any],
    images: int,
    finished: Finished,
    bar: Progress,
) -> tuple[dict[str, float | None], list[Row]]:
    """Error on every corruption and severity, dense and under the plan of ``robustness.sparsity``, and its means."""
    settings = config["robustness"]
    rows: list[Row] = []
    metrics: dict[str, float | None] = {}
    generator = torch.Generator()

    def error_of(corruption: str, severity: int) -> dict[str, Any]:
        dataset = corrupted_dataset(data, corruption, severity, limit=config["limit"])
        found = evaluate(model, dataset, generator=generator, **_loader(config))
        return {"error": 1.0 - found.top1, "images": len(dataset)}

    for setting, mapping in (("dense", None), ("sparse", settings["sparsity"])):
        plan = sparsity_from_mapping(mapping) if mapping is not None else None
        handle = None if plan is None else sparsify(model, plan, generator=generator)
        errors: dict[str, dict[int, float]] = {}
        try:
            for corruption, severity in _cells(config):
                error = functools.partial(error_of, corruption, severity)
                found = finished.measure(f"{setting}, {corruption} {severity}", error, bar, images)
                errors.setdefault(corruption, {})[severity] = found["error"]
                rows.append(
                    {
                        **_NO_CHOICE,
                        "plan": "robustness",
                        "split": "test",
                        "setting": setting,
                        "corruption": corruption,
                        "severity": severity,
                        "error": found["error"],
                    }
                )
        finally:
            if handle is not None:
                handle.remove()
        measured = CorruptionErrors(errors, num_images=found["images"])
        metrics[f"mce_{setting}"] = measured.mean_corruption_error if measured.is_complete else None
        metrics[f"corrupted_error_{setting}"] = measured.mean()
    return metrics, rows


def _cells(config: Mapping[str, Any]) -> list[tuple[str, int]]:
    return [(name, severity) for name in _corruptions(config) for severity in config["robustness"]["severities"]]


def _corruptions(config: Mapping[str, Any]) -> tuple[str, ...]:
    return (*CORRUPTIONS, *(EXTRA_CORRUPTIONS if config["robustness"]["extra"] else ()))


def _is_matched(names: Mapping[str, Any], mapping: Mapping[str, Any]) -> bool:
    return "entropy_budget" in mapping and names["level"] is not None


def _matched(
    model: nn.Module,
    datasets: Mapping[str, Any],
    config: Mapping[str, Any],
    names: Mapping[str, Any],
    mapping: Mapping[str, Any],
    finished: Finished,
    bar: Progress,
) -> Sparsity | None:
    """The plan of a mapping, an entropy budget that has a level fitted to it."""
    plan = sparsity_from_mapping(mapping)
    if not _is_matched(names, mapping):
        return plan

    def multiplier() -> float:
        fitted = match_sparsity(model, datasets["validation"], plan, names["level"], **_loader(config))
        return fitted.entropy_budget.multiplier

    images = _images(datasets["validation"], config)
    found = finished.measure(f"fitting {_words(names)}", multiplier, bar, images)
    return replace(plan, entropy_budget=replace(plan.entropy_budget, multiplier=found))


def _has_gate(gate: nn.Module | None, mapping: Mapping[str, Any]) -> bool:
    return gate is not None and str(getattr(sparsity_from_mapping(mapping), "before_layer", None)) in gate


def _mean_overlap(overlaps: Sequence[Overlap]) -> dict[str, Any]:
    joined = Overlap(*(torch.cat([getattr(one, name) for one in overlaps]) for name in ("iou", "best", "random")))
    return joined.metrics()


def _loader(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in ("batch_size", "precision", "limit")}


def _coverage(config: Mapping[str, Any]) -> dict[str, float]:
    """The coverage of a patch that counts as the object's, if the configuration says it."""
    return {} if config["localisation"] is None else {"coverage": config["localisation"]["coverage"]}


def _grid(model: nn.Module) -> tuple[int, int]:
    return tuple(model.patch_embed.grid_size)
