"""Overlap with masks against sets in plain Python, enumeration of all choices, and scipy's distribution."""

import itertools
import math

import pytest
import torch
from scipy.stats import hypergeom

from entreg.errors import InputError
from entreg.experiments.vision.localisation import (
    kept_patches,
    localise,
    matched_area_overlap,
    overlap,
    patch_masks,
    random_iou,
    top_patches,
)


def test_a_patch_counts_from_its_covered_fraction_on():
    masks = torch.zeros(1, 4, 6, dtype=torch.bool)
    masks[0, 0, 0] = True  # one of four pixels of patch 0
    masks[0, 2:4, 2:4] = True  # all of patch 4
    assert patch_masks(masks, (2, 3)).tolist() == [[True, False, False, False, True, False]]
    assert patch_masks(masks, (2, 3), coverage=0.0).tolist() == [[True, False, False, False, True, False]]
    assert patch_masks(masks, (2, 3), coverage=0.26).tolist() == [[False, False, False, False, True, False]]
    # Three tenths of ten pixels are three, whatever 0.3 * 10 is in floating point.
    tenth = torch.zeros(1, 1, 10)
    tenth[0, 0, :3] = 255
    assert patch_masks(tenth, (1, 1), coverage=0.3).item()


def test_overlap_agrees_with_sets():
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(20, 3, 12, generator=generator) < 0.4
    covered = torch.rand(20, 12, generator=generator) < 0.3
    covered[0] = False
    result = overlap(kept, covered)
    for image, head in itertools.product(range(1, 20), range(3)):
        ours = {i for i in range(12) if kept[image, head, i]}
        theirs = {i for i in range(12) if covered[image, i]}
        if not theirs:
            assert result.iou[image].isnan().all()
            continue
        assert result.iou[image, head].item() == pytest.approx(len(ours & theirs) / len(ours | theirs))
        sizes = sorted((len(ours), len(theirs)))
        assert result.best[image, head].item() == pytest.approx(sizes[0] / sizes[1])
    judged = covered.any(1)
    assert result.metrics()["images"] == int(judged.sum())
    assert result.metrics()["iou"] == pytest.approx(result.iou[judged].mean().item())
    assert result.per_image.shape == (20,)
    nothing = overlap(kept, torch.zeros_like(covered)).metrics()
    assert nothing == {"iou": None, "best": None, "random": None, "images": 0}


def test_random_value_is_the_mean_over_all_choices():
    for patches, area, size in [(6, 2, 3), (6, 5, 4), (5, 1, 5), (7, 3, 1), (4, 0, 2)]:
        values = []
        for choice in itertools.combinations(range(patches), area):
            common = len(set(choice) & set(range(size)))
            values.append(common / (area + size - common))
        assert random_iou(patches, area, size) == pytest.approx(sum(values) / len(values))


def test_random_value_of_many_patches_agrees_with_scipy():
    patches, area, size = 196, 39, 57
    expected = hypergeom(patches, size, area).expect(lambda common: common / (area + size - common))
    kept = torch.zeros(1, patches, dtype=torch.bool)
    kept[0, :area] = True
    covered = torch.zeros(1, patches, dtype=torch.bool)
    covered[0, :size] = True
    assert overlap(kept, covered).random.item() == pytest.approx(expected, rel=1e-9)


def test_top_patches_takes_the_highest_and_of_equals_the_first():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.9], [1.0, 1.0, 1.0, 1.0]])
    assert top_patches(scores, 2).tolist() == [[False, True, False, True], [True, True, False, False]]
    ragged = top_patches(scores, torch.tensor([1, 3]))
    assert ragged.tolist() == [[False, True, False, False], [True, True, True, False]]
    heads = scores[:, None].expand(2, 3, 4)
    assert torch.equal(top_patches(heads, torch.tensor([1, 3])), ragged[:, None].expand(2, 3, 4))
    assert top_patches(scores, 0).sum() == 0
    assert top_patches(scores, 4).all()


def test_at_matched_area_the_mask_itself_is_perfect_and_its_opposite_worst():
    covered = torch.zeros(2, 10, dtype=torch.bool)
    covered[0, 2:5] = True
    covered[1, :6] = True
    perfect = matched_area_overlap(covered.float(), covered)
    assert perfect.iou.tolist() == [1.0, 1.0]
    assert perfect.best.tolist() == [1.0, 1.0]
    # Six of ten cannot avoid two of the six.
    assert matched_area_overlap(-covered.float(), covered).iou.tolist() == pytest.approx([0.0, 2 / 10])


def test_given_numbers_are_capped_by_the_masks_area():
    covered = torch.zeros(1, 10, dtype=torch.bool)
    covered[0, :2] = True
    results = localise(torch.arange(10, 0, -1).float()[None], covered, keep=(1, 2, 8))
    assert {name: value.iou.item() for name, value in results.items()} == {
        "matched_area": 1.0,
        "keep_1": 0.5,
        "keep_2": 1.0,
        "keep_8": 0.25,
    }
    assert results["keep_8"].best.item() == 0.25


def test_kept_indices_lose_prefix_tokens_and_padding():
    indices = torch.tensor([[[0, 2, 5], [1, 3, 0]]])
    kept = kept_patches(indices, 4, num_prefix=2)
    assert kept.tolist() == [[[True, False, False, True], [False, True, False, False]]]
    valid = torch.tensor([[[True, True, False], [True, True, True]]])
    assert kept_patches(indices, 4, num_prefix=2, valid=valid)[0, 0].tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: patch_masks(torch.zeros(1, 5, 4), (2, 2)), "cannot be divided"),
        (lambda: patch_masks(torch.zeros(1, 4, 4), (2, 2), coverage=1.5), "coverage"),
        (lambda: top_patches(torch.zeros(1, 4), 5), "between 0 and 4"),
        (lambda: top_patches(torch.tensor([[math.nan, 0.0]]), 1), "NaN"),
        (lambda: overlap(torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.bool)), "must be bool"),
        (lambda: overlap(torch.zeros(2, 4) > 0, torch.zeros(2, 5) > 0), "shapes"),
        (lambda: kept_patches(torch.tensor([[4]]), 4), "lie in"),
        (lambda: kept_patches(torch.tensor([[-1]]), 4, valid=torch.tensor([[True]])), "lie in"),
    ],
)
def test_what_does_not_fit_gets_one_sentence(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()
