"""The digits: against the asset's own file, a peer's resampling, and the promised splits."""

import gzip

import cv2
import numpy as np
import pytest

from entreg.data.assets import asset_path
from entreg.data.digits import SPLITS, digit_pool, load_digits
from entreg.errors import InputError


@pytest.fixture(scope="module")
def table():
    """The file read line by line with Python's own parser."""
    with gzip.open(asset_path("mnist_digits"), "rt") as file:
        return np.array([[int(value) for value in line.split(",")] for line in file])


def test_splits_are_balanced_disjoint_and_hold_every_digit_of_the_file(table):
    rows = []
    for split, size in (("train", 4000), ("validation", 500), ("test", 500)):
        images, labels = load_digits(split)
        assert images.shape == (size, 28, 28)
        assert images.dtype == np.uint8
        assert labels.dtype == np.int64
        assert np.bincount(labels).tolist() == [size // 10] * 10
        rows += [(*image.reshape(-1).tolist(), int(label)) for image, label in zip(images, labels, strict=True)]
    assert sorted(rows) == sorted(map(tuple, table.tolist()))
    places = [place for part in SPLITS.values() for place in part]
    assert len(places) == len(set(places))


def test_first_copy_is_the_digit_scaled_about_its_centre():
    images, labels = load_digits("test")
    pool, pool_labels = digit_pool("test", 16)
    assert np.array_equal(labels, pool_labels)
    # The same map in OpenCV's terms: pixel centres have whole coordinates there, so the centres are 13.5 and 7.5.
    matrix = np.array([[0.8, 0.0, 7.5 - 0.8 * 13.5], [0.0, 0.8, 7.5 - 0.8 * 13.5]])
    for image, ours in zip(images[::50], pool[::50], strict=True):
        theirs = cv2.warpAffine(image.astype(np.float32), matrix, (16, 16), flags=cv2.INTER_LINEAR) / 255
        # OpenCV rounds source coordinates to 1/32 of a pixel.
        assert np.abs(ours - theirs).max() < 2 / 32


def test_original_size_is_the_middle_of_the_original():
    images, _ = load_digits("validation")
    pool, _ = digit_pool("validation", 20)
    assert np.allclose(pool, images[:, 4:24, 4:24] / 255, atol=1e-5)


def test_variants_differ_by_seed_only_beyond_the_first_copy_and_stay_recognisable():
    first, labels = digit_pool("train", 16, 3, 0)
    again, _ = digit_pool("train", 16, 3, 1)
    assert labels.tolist() == load_digits("train")[1].tolist() * 3
    assert np.array_equal(first[:4000], again[:4000])
    assert not np.array_equal(first[4000:8000], first[8000:])
    assert not np.array_equal(first[4000:], again[4000:])
    assert first.min() >= 0
    assert first.max() <= 1
    # A variant resembles its own digit more than another one: nearest originals of variants have the right label.
    originals, variants = first[:4000].reshape(4000, -1), first[4000:4200].reshape(200, -1)
    nearest = ((variants[:, None] - originals[None]) ** 2).sum(-1).argmin(1)
    assert (labels[nearest] == labels[4000:4200]).mean() > 0.95


def test_digits_cannot_be_changed_by_a_user():
    for array in (*load_digits("test"), *digit_pool("test", 16)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("training", 16), "unknown split 'training', known are train, validation, test"),
        (("train", 3), "size >= 4"),
        (("train", 16, 0), "copies >= 1"),
        (("train", 16, 1, -1), "seed >= 0"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        digit_pool(*arguments)
