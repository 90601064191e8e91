"""The measures of the vision claims on records whose answers are known by hand, up to the verdict."""

import pytest

from entreg.experiments.vision.claims import corruption_error, mask_overlap, over_l1, top1
from entreg.records.claims import judge_all, load_claims
from entreg.records.registry import discover
from tests.experiments.vision.samples import accuracies, overlaps, setting_a, vision_record


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
        "ours_a": [(0.9, 0.77), (0.9, 0.79)],
    }
    return [
        vision_record(method, seed, setting_a(*pair))
        for method, pairs in values.items()
        for seed, pair in enumerate(pairs)
    ]


def at_the_papers_scale(records):
    return [{**record, "scale": "paper", "id": f"{record['id']}-paper"} for record in records]


def test_top1_at_the_papers_scale_is_the_mean_test_accuracy_of_ours(records):
    evidence = top1(at_the_papers_scale(records))
    assert evidence.value == pytest.approx(78.0)
    # Two values one standard error of 1 apart: the t quantile with one degree of freedom is 12.706.
    assert evidence.interval == pytest.approx((78.0 - 12.7062, 78.0 + 12.7062), abs=1e-3)
    assert (evidence.unit, evidence.scale) == ("%", "paper")
    assert "plain sparse: 52.0" in evidence.reason
    assert verdict("vit-top1", at_the_papers_scale(records)).verdict == "undecided"


def test_top1_of_a_stand_in_is_what_ours_loses_against_the_plain_model_dense(records):
    evidence = top1(records)
    assert evidence.value == pytest.approx(95.0 - 78.0)
    assert (evidence.unit, evidence.scale) == ("points lost", "offline")
    assert set(evidence.record_ids) == {record["id"] for record in records}
    trained = "token dropping, trained with the sparse path: 86.0"
    for words in ("ours keeps 78.0 %, 80.0 % of the score entries", "plain dense: 95.0", "plain sparse: 52.0", trained):
        assert words in evidence.reason


def test_a_stand_in_is_not_judged_by_the_papers_accuracy(records):
    """An easy task: 93 % would exceed ImageNet's 80.1 % although 2 of 95 points are lost, and 85 % lose too much."""
    found = {}
    for kept in (0.94, 0.93, 0.92, 0.85):
        for record in records:
            if record["config"]["method"] == "ours_a":
                for row in record["rows"]:
                    if row["plan"] == "setting_a":
                        row["top1"] = kept
        found[kept] = verdict("vit-top1", records).verdict
    assert found == {0.94: "exceeded", 0.93: "reproduced", 0.92: "partly", 0.85: "not reproduced"}


def test_top1_needs_ours(records):
    assert top1([record for record in records if record["config"]["method"] != "ours_a"]) is None
    assert top1([]) is None


def test_l1_is_the_difference_to_the_baseline_that_is_best_on_validation(records):
    evidence = over_l1(records)
    assert evidence.value == pytest.approx(7.0)
    assert evidence.unit == "points"
    assert "against L1 on logits" in evidence.reason
    # Dropping, trained with the sparse path and without an entropy, gains 15 points over the same baseline.
    assert evidence.control == pytest.approx(15.0)
    assert verdict("vit-l1", records).verdict == "not credited"
    alone = [record for record in records if record["config"]["method"] != "loop_a"]
    assert over_l1(alone).control is None
    assert verdict("vit-l1", alone).verdict == "exceeded"


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
    assert evidence.control == pytest.approx(0.51)
    for words in ("plain model 0.420", "random 0.125", "score mixed of layer 2"):
        assert words in evidence.reason
    assert evidence.unit == ""
    assert mask_overlap(masked[2:]) is None
    # Two seeds leave everything from partly to exceeded open.
    assert verdict("vit-iou", masked).words == "undecided: more seeds"


def test_an_overlap_that_the_plain_model_has_as_well_is_credited_to_nobody(masked):
    def shifted(plain, ours):
        rows = {"plain": plain, "ours_a": ours}
        for one in masked:
            for row in one["rows"]:
                if row["score"] == "mixed":
                    row["iou_matched"] = rows[one["config"]["method"]] + 0.001 * one["seed"]
        return verdict("vit-iou", masked)

    assert shifted(plain=0.766, ours=0.750).verdict == "not credited"
    assert "the plain model's best score: 0.766" in shifted(plain=0.766, ours=0.750).reason
    assert shifted(plain=0.60, ours=0.750).verdict == "reproduced"


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
    evidence = corruption_error(at_the_papers_scale(cifar))
    assert (evidence.value, evidence.unit) == (pytest.approx(5.0), "points")
    evidence = corruption_error(cifar)
    assert (evidence.value, evidence.unit) == (pytest.approx(100 * (4 / 50 + 6 / 54) / 2), "%")
    assert "mCE 47.0 against 52.0 per cent" in evidence.reason
    assert evidence.reason.endswith("clean accuracy 90.0 against 92.0")
    # 5 of 55.4 points would be partly; of 52 two seeds cannot tell.
    assert verdict("cifar-mce", cifar).verdict == "undecided"


def test_the_best_of_the_other_methods_is_named_beside_ours(cifar):
    rivals = {"label_smoothing": 0.44, "ball": 0.45}
    more = [vision_record(name, 0, [], experiment="cifar/digits", mce_dense=value) for name, value in rivals.items()]
    assert corruption_error([*cifar, *more]).reason.endswith("lowest of the other methods: label smoothing, 44.0")


def test_a_mean_over_some_corruptions_gives_no_verdict(cifar):
    for record in cifar:
        record["metrics"] = {"mce_dense": None, "corrupted_error_dense": 0.1}
    assert corruption_error(cifar) is None
