"""Choices on validation, pairing by seed and the newest record, on records whose answers are known by hand."""

import pytest

from entreg.experiments.method_names import label
from entreg.experiments.vision.study import VisionStudy, ours_for
from tests.experiments.vision.samples import accuracies, corrupted, overlaps, setting_a, vision_record


def two_choices(validation: tuple[float, float], test: tuple[float, float]):
    """Setting A by two scores."""
    return [
        accuracies("setting_a", split, top1, score=score)
        for split, values in (("validation", validation), ("test", test))
        for score, top1 in zip(("mixed", "received"), values, strict=True)
    ]


def test_the_choice_is_the_best_on_validation_not_on_test():
    study = VisionStudy([vision_record("plain", 0, two_choices(validation=(0.6, 0.7), test=(0.9, 0.5)))])
    assert study.best_choice("plain", "setting_a") == ("drop", "received")
    assert study.values("plain", "setting_a") == [0.5]
    assert study.values("plain", "setting_a", split="validation") == [0.7]
    assert study.values("plain", "setting_a", "sparsity") == [0.8]


def test_the_choice_is_one_for_all_seeds_by_their_mean():
    study = VisionStudy(
        [
            vision_record("plain", 0, two_choices(validation=(0.9, 0.6), test=(0.1, 0.2))),
            vision_record("plain", 1, two_choices(validation=(0.5, 0.7), test=(0.3, 0.4))),
        ]
    )
    # Means 0.70 and 0.65, though the second wins in seed 1.
    assert study.values("plain", "setting_a") == [0.1, 0.3]


def test_a_choice_that_some_seeds_lack_cannot_win():
    lonely = [accuracies("setting_a", split, 0.99, score="gate") for split in ("validation", "test")]
    study = VisionStudy(
        [
            vision_record("plain", 0, [*two_choices((0.6, 0.5), (0.6, 0.5)), *lonely]),
            vision_record("plain", 1, two_choices((0.6, 0.5), (0.7, 0.5))),
        ]
    )
    assert study.best_choice("plain", "setting_a") == ("drop", "mixed")
    assert study.values("plain", "setting_a") == [0.6, 0.7]


def test_reductions_are_choices_too():
    rows = [
        accuracies("setting_a", split, top1, reduction=reduction)
        for split in ("validation", "test")
        for reduction, top1 in (("drop", 0.5), ("partition", 0.8))
    ]
    assert VisionStudy([vision_record("ours_a", 0, rows)]).best_choice("ours_a", "setting_a") == ("partition", "mixed")


def test_levels_are_kept_apart():
    rows = [
        accuracies("tokens", split, top1, level=level)
        for split in ("validation", "test")
        for level, top1 in ((0.9, 0.4), (0.5, 0.8))
    ]
    study = VisionStudy([vision_record("plain", 0, rows)])
    assert study.levels("tokens") == [0.5, 0.9]
    assert study.values("plain", "tokens", level=0.5) == [0.8]
    assert study.values("plain", "tokens", level=0.9) == [0.4]
    assert study.values("plain", "tokens") == []
    assert study.best_choice("plain", "tokens") is None


def test_pairs_are_of_the_seeds_that_both_have():
    study = VisionStudy(
        [
            *(vision_record("ours_a", seed, setting_a(0.9, 0.9 + seed / 100)) for seed in (3, 1, 0)),
            *(vision_record("plain", seed, setting_a(0.5, 0.5 + seed / 100)) for seed in (1, 2, 3)),
        ]
    )
    assert study.seeds("ours_a") == [0, 1, 3]
    assert study.pairs("ours_a", "plain", "setting_a") == ([0.91, 0.93], [0.51, 0.53])
    assert study.values("plain", "setting_a", seeds=[2, 3]) == [0.52, 0.53]


def test_a_seed_without_the_plan_is_in_no_pair():
    without = [row for row in setting_a(0.9, 0.9) if row["plan"] == "dense"]
    study = VisionStudy(
        [
            vision_record("ours_a", 0, without),
            vision_record("ours_a", 1, setting_a(0.9, 0.8)),
            vision_record("ours_a", 2, setting_a(0.9, 0.7)),
            vision_record("plain", 0, setting_a(0.5, 0.4)),
            vision_record("plain", 1, without),
            vision_record("plain", 2, setting_a(0.5, 0.3)),
        ]
    )
    # As many values on both sides, but of different seeds.
    assert len(study.values("ours_a", "setting_a")) == len(study.values("plain", "setting_a")) == 2
    assert study.pairs("ours_a", "plain", "setting_a") == ([0.7], [0.3])


def test_the_newest_record_of_a_method_and_seed_counts():
    old = vision_record("plain", 0, setting_a(0.5, 0.1), utc="2026-01-01T00:00:00Z")
    new = vision_record("plain", 0, setting_a(0.5, 0.2), utc="2026-01-02T00:00:00Z")
    new["id"] = "newest"
    for records in ([old, new], [new, old]):
        study = VisionStudy(records)
        assert study.values("plain", "setting_a") == [0.2]
        assert study.record_ids == ["newest"]


def test_localisation_is_chosen_on_validation_by_score_and_layer():
    def rows(shift):
        return [
            overlaps("validation", "mixed", 3, 0.6 + shift),
            overlaps("validation", "mixed", "mean", 0.5),
            overlaps("validation", "magnitude", 3, 0.4),
            overlaps("validation", "magnitude", 5, 0.3),
            overlaps("test", "mixed", 3, 0.55 + shift, random=0.2),
            overlaps("test", "mixed", "mean", 0.9),
            overlaps("test", "magnitude", 3, 0.35 + shift, random=0.1),
            overlaps("test", "magnitude", 5, 0.8),
        ]

    study = VisionStudy([vision_record("plain", seed, rows(seed / 10)) for seed in (0, 1)])
    assert study.localisation("plain") == {
        "score": "mixed",
        "layer": 3,
        "seeds": [0, 1],
        "iou": pytest.approx([0.55, 0.65]),
        "random": [0.2, 0.2],
    }
    chosen = study.localisation("plain", scores=("magnitude",))
    assert (chosen["score"], chosen["layer"], chosen["iou"]) == ("magnitude", 3, pytest.approx([0.35, 0.45]))
    assert study.localisation("plain", scores=("received",)) is None


def test_corruption_errors_of_incomplete_measurements_do_not_count():
    study = VisionStudy(
        [
            vision_record("plain", 0, [], mce_dense=0.5, mce_sparse=0.6),
            vision_record("plain", 1, [], mce_dense=None, corrupted_error_dense=0.1),
            vision_record("plain", 2, [], mce_dense=0.7, mce_sparse=0.8),
            vision_record("ours", 1, [], mce_dense=0.3),
            vision_record("ours", 2, [], mce_dense=0.4),
        ]
    )
    assert study.corruption_errors("plain", "dense") == [0.5, 0.7]
    assert study.corruption_errors("plain", "sparse") == [0.6, 0.8]
    assert study.corruption_error_pairs("plain", "ours") == ([0.7], [0.4])


def test_errors_by_corruption_are_means_over_severities_and_seeds():
    study = VisionStudy(
        [
            vision_record("plain", 0, [corrupted("fog", 1, 0.1), corrupted("fog", 2, 0.3), corrupted("snow", 1, 0.5)]),
            vision_record("plain", 1, [corrupted("fog", 1, 0.5), corrupted("fog", 1, 0.9, setting="sparse")]),
        ]
    )
    assert study.errors_by_corruption("plain") == pytest.approx({"fog": 0.3, "snow": 0.5})


def test_methods_come_in_a_fixed_order_with_words():
    study = VisionStudy([vision_record(name, 0, []) for name in ("ours_a", "loop_a", "l1_gate", "plain", "ball")])
    assert study.methods == ["plain", "ball", "l1_gate", "loop_a", "ours_a"]
    assert [label(name) for name in study.methods] == [
        "plain",
        "ball entropy, as published",
        "L1 gate",
        "loop a",
        "ours a",
    ]


@pytest.mark.parametrize(
    ("plan", "methods", "expected"),
    [
        ("setting_a", ["plain", "ours_a", "ours_b", "ours"], "ours_a"),
        ("setting_b", ["plain", "ours_a", "ours_b"], "ours_b"),
        ("robustness", ["plain", "ours"], "ours"),
        ("setting_b", ["plain", "ours_a"], None),
    ],
)
def test_which_method_stands_for_the_project(plan, methods, expected):
    assert ours_for(plan, methods) == expected
