"""The measures of the vision claims on records whose answers are known by hand, up to the verdict."""

import pytest

from entreg.records.claims import judge_all, load_claims
from entreg.records.registry import discover
from entreg.records.vision_claims import corruption_error, mask_overlap, over_l1, top1
from tests.records.vision_samples import accuracies, overlaps, setting_a, vision_record


def verdict(claim_id, records):
    discover()
    claim = next(claim for claim in load_claims() if claim.id == claim_id)
    return judge_all([claim], records)[0][records[0]["scale"]]


@pytest.fixture
def records():
    """Validation and test accuracies of two seeds under setting A."""
    values = {
        "plain": [(0.5, 0.50), (0.5, 0.54)],
        # The better L1 baseline on validation is the worse one on test.
        "l1_logits": [(0.8, 0.70), (0.8, 0.72)],
        "l1_gate": [(0.6, 0.88), (0.6, 0.88)],
        "loop_a": [(0.9, 0.84), (0.9, 0.88)],
        "ours_a": [(0.9, 0.76), (0.9, 0.80)],
    }
    return [
        vision_record(method, seed, setting_a(*pair))
        for method, pairs in values.items()
        for seed, pair in enumerate(pairs)
    ]


def test_top1_is_the_mean_test_accuracy_of_ours(records):
    evidence = top1(records)
    assert evidence.value == pytest.approx(78.0)
    # Two values one standard error of 2 apart: the t quantile with one degree of freedom is 12.706.
    assert evidence.interval == pytest.approx((78.0 - 2 * 12.7062, 78.0 + 2 * 12.7062), abs=1e-3)
    assert (evidence.unit, evidence.scale) == ("%", "offline")
    assert set(evidence.record_ids) == {record["id"] for record in records}
    for words in ("80.0 % of the score entries", "plain dense: 95.0", "plain sparse: 52.0", "loop a sparse: 86.0"):
        assert words in evidence.reason
    assert verdict("vit-top1", records).verdict == "partly"


def test_top1_needs_ours(records):
    assert top1([record for record in records if record["config"]["method"] != "ours_a"]) is None
    assert top1([]) is None


def test_l1_is_the_difference_to_the_baseline_that_is_best_on_validation(records):
    evidence = over_l1(records)
    assert evidence.value == pytest.approx(7.0)
    assert evidence.unit == "points"
    assert "against L1 on logits" in evidence.reason
    assert "without any entropy is worth 15.0 points" in evidence.reason
    assert verdict("vit-l1", records).verdict == "exceeded"


def test_l1_is_paired_by_the_seeds_that_both_have(records):
    more = [vision_record("ours_a", 7, setting_a(0.9, 0.1)), vision_record("l1_logits", 8, setting_a(0.8, 0.99))]
    assert over_l1([*records, *more]).value == pytest.approx(7.0)
    alone = [r for r in records if (r["config"]["method"], r["seed"]) not in {("ours_a", 0), ("l1_logits", 1)}]
    assert over_l1(alone) is None


def test_a_loss_against_l1_is_a_verdict_too(records):
    for record in records:
        if record["config"]["method"] == "ours_a":
            for row in record["rows"]:
                row["top1"] -= 0.1
    assert over_l1(records).value == pytest.approx(-3.0)
    assert verdict("vit-l1", records).verdict == "not reproduced"


def test_no_l1_baseline_no_verdict(records):
    assert over_l1([record for record in records if not record["config"]["method"].startswith("l1")]) is None


@pytest.fixture
def masked():
    def rows(mixed, magnitude):
        return [
            row
            for split in ("validation", "test")
            for row in (overlaps(split, "mixed", 2, mixed), overlaps(split, "magnitude", 4, magnitude, random=0.1))
        ]

    return [
        vision_record("plain", 0, rows(0.50, 0.40)),
        vision_record("plain", 1, rows(0.52, 0.44)),
        vision_record("ours_a", 0, rows(0.60, 0.2)),
        vision_record("ours_a", 1, rows(0.64, 0.2)),
    ]


def test_overlap_is_compared_with_magnitude_on_the_plain_model(masked):
    evidence = mask_overlap(masked)
    assert evidence.value == pytest.approx(0.62)
    assert evidence.alternative == pytest.approx(0.62 - 0.42)
    for words in ("plain model 0.420", "best score 0.510", "random 0.125", "score mixed of layer 2"):
        assert words in evidence.reason
    assert evidence.unit == ""
    assert mask_overlap(masked[2:]) is None
    assert verdict("vit-iou", masked).verdict == "partly"


@pytest.fixture
def cifar():
    numbers = {"plain": [0.50, 0.54, 0.9], "ours": [0.46, 0.48]}
    return [
        vision_record(
            method,
            seed,
            [accuracies("dense", split, accuracy) for split in ("validation", "test")],
            experiment="cifar/digits",
            mce_dense=value,
        )
        for (method, values), accuracy in zip(numbers.items(), (0.92, 0.9), strict=True)
        for seed, value in enumerate(values)
    ]


def test_corruption_error_and_its_reduction_by_shared_seeds(cifar):
    evidence = corruption_error(cifar)
    assert evidence.value == pytest.approx(5.0)
    assert "mCE 47.0 against 52.0 per cent" in evidence.reason
    assert evidence.reason.endswith("clean accuracy 90.0 against 92.0")
    assert verdict("cifar-mce", cifar).verdict == "partly"


def test_the_best_of_the_other_methods_is_named_beside_ours(cifar):
    rivals = {"label_smoothing": 0.44, "ball": 0.45}
    more = [vision_record(name, 0, [], experiment="cifar/digits", mce_dense=value) for name, value in rivals.items()]
    assert corruption_error([*cifar, *more]).reason.endswith("lowest of the other methods: label smoothing, 44.0")


def test_a_mean_over_some_corruptions_gives_no_verdict(cifar):
    for record in cifar:
        record["metrics"] = {"mce_dense": None, "corrupted_error_dense": 0.1}
    assert corruption_error(cifar) is None
