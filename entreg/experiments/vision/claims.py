"""What the vision claims of the paper come to, computed from the records of the vision experiments.

"Ours" is the method that an experiment names ``ours_a`` (or ``ours``); everything is the mean over seeds on images
that chose nothing: selection scores, layers and weights were chosen on validation images. At the offline scale the
data are digit scenes and corrupted digits; no verdict there is one on ImageNet or CIFAR.
"""

from __future__ import annotations

import statistics
from typing import Any

from entreg.experiments.method_names import label
from entreg.experiments.vision.study import L1_METHODS, VisionStudy, ours_for
from entreg.experiments.vision.tables import VIT, main_study
from entreg.records.claims import Evidence, register_measure
from entreg.records.formatting import number
from entreg.records.statistics import Estimate, mean_and_interval, paired_difference

Records = list[dict[str, Any]]

PLAN = "setting_a"
"""The plan of about 80 % sparsity that the claims on accuracy are judged by."""

CONTROL = "loop_a"
"""Token dropping trained with the sparse path, with neither an entropy nor our partition."""


def _evidence(study: VisionStudy, records: Records, value: Estimate, unit: str, reason: str, **more: Any) -> Evidence:
    return Evidence(
        value=value.mean,
        interval=value.interval,
        scale=records[0]["scale"],
        record_ids=study.record_ids,
        reason=reason,
        unit=unit,
        **more,
    )


def _ours(records: Records, plan: str) -> tuple[VisionStudy, str] | None:
    study = main_study(records)
    ours = None if study is None else ours_for(plan, study.methods)
    return None if ours is None else (study, ours)


@register_measure("vit-top1", experiments=VIT)
def top1(records: Records) -> Evidence | None:
    """At about 80 % realised sparsity: accuracy of ours on the paper's data, elsewhere points below the plain model.

    The plain model is the dense one of the same seed, fine-tuned for as long without a penalty.
    """
    found = _ours(records, PLAN)
    if found is None or not found[0].values(found[1], PLAN):
        return None
    study, ours = found
    own = study.values(ours, PLAN)
    reasons = [
        f"ours keeps {number(100 * statistics.fmean(own))} %, {_sparsity(study, ours)} of the score entries saved"
    ]
    if records[0]["scale"] == "paper":
        value, unit = mean_and_interval([100 * one for one in own]), "%"
    else:
        sparse, dense = study.shared((ours, PLAN), ("plain", "dense"))
        if not dense:
            return None
        value, unit = paired_difference([100 * one for one in dense], [100 * one for one in sparse]), "points lost"
    others = {
        "plain dense": ("plain", "dense"),
        "plain sparse": ("plain", PLAN),
        "token dropping, trained with the sparse path": (CONTROL, PLAN),
    }
    for words, (method, plan) in others.items():
        values = study.values(method, plan)
        if values:
            reasons.append(f"{words}: {number(100 * statistics.fmean(values))}")
    return _evidence(study, records, value, unit, "; ".join(reasons))


@register_measure("vit-l1", experiments=VIT)
def over_l1(records: Records) -> Evidence | None:
    """Accuracy of ours over the best L1 baseline, both at about 80 % realised sparsity."""
    found = _ours(records, PLAN)
    if found is None:
        return None
    study, ours = found
    # The strongest of the L1 baselines, chosen on validation.
    means = {
        name: statistics.fmean(study.values(name, PLAN, split="validation"))
        for name in study.methods
        if name in L1_METHODS and study.values(name, PLAN, split="validation")
    }
    if not means:
        return None
    rival = max(means, key=means.get)
    first, second = study.pairs(ours, rival, PLAN)
    if not first:
        return None
    value = paired_difference([100 * one for one in first], [100 * one for one in second])
    loop, without = study.pairs(CONTROL, rival, PLAN)
    control = 100 * (statistics.fmean(loop) - statistics.fmean(without)) if loop else None
    return _evidence(study, records, value, "points", f"against {label(rival)}", control=control)


@register_measure("vit-iou", experiments=VIT)
def mask_overlap(records: Records) -> Evidence | None:
    """Matched-area overlap of ours, and its gain over magnitude selection on the plain model."""
    found = _ours(records, PLAN)
    if found is None:
        return None
    study, ours = found
    own, magnitude = study.localisation(ours), study.localisation("plain", scores=("magnitude",))
    if own is None or magnitude is None or not own["iou"] or not magnitude["iou"]:
        return None
    value = mean_and_interval(own["iou"])
    plain = statistics.fmean(study.localisation("plain")["iou"])
    reason = (
        f"magnitude on the plain model {number(statistics.fmean(magnitude['iou']))}, random "
        f"{number(statistics.fmean(own['random']))}; as many patches kept as the mask covers, score {own['score']} of "
        f"layer {own['layer']}"
    )
    gain = value.mean - statistics.fmean(magnitude["iou"])
    return _evidence(study, records, value, "", reason, alternative=gain, control=plain)


@register_measure("cifar-mce", experiments=("cifar/",))
def corruption_error(records: Records) -> Evidence | None:
    """By how many points ours lowers the plain model's mean corruption error, seeds paired.

    Except at the paper's scale in per cent of the plain model's error, because easier data leave fewer points to win.
    """
    found = _ours(records, "robustness")
    if found is None:
        return None
    study, ours = found
    own, plain = study.corruption_error_pairs(ours, "plain")
    if not own or min(plain) == 0:
        return None
    if records[0]["scale"] == "paper":
        gain, unit = paired_difference([100 * one for one in plain], [100 * one for one in own]), "points"
    else:
        shares = [100 * (theirs - ours_) / theirs for theirs, ours_ in zip(plain, own, strict=True)]
        gain, unit = mean_and_interval(shares), "%"
    errors = [number(100 * statistics.fmean(values)) for values in (own, plain)]
    clean = [number(100 * statistics.fmean(values)) for values in study.pairs(ours, "plain", "dense")]
    reason = (
        f"mCE {errors[0]} against {errors[1]} per cent of the plain model, {len(own)} seeds; clean accuracy {clean[0]} "
        f"against {clean[1]}"
    )
    others = [name for name in study.methods if name not in (ours, "plain") and study.corruption_errors(name, "dense")]
    if others:
        means = {name: statistics.fmean(study.corruption_errors(name, "dense")) for name in others}
        best = min(means, key=means.get)
        reason += f"; lowest of the other methods: {label(best)}, {number(100 * means[best])}"
    return _evidence(study, records, gain, unit, reason)


def _sparsity(study: VisionStudy, method: str) -> str:
    return f"{100 * statistics.fmean(study.values(method, PLAN, 'sparsity')):.1f} %"
