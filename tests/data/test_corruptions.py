"""Corruptions: against published libraries at ImageNet-C's constants, closed forms at CIFAR-C's, and as promised."""

import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy import ndimage

from entreg.data import corruption_functions, corruptions
from entreg.data.corruptions import (
    ALL_CORRUPTIONS,
    CONSTANTS,
    CORRUPTIONS,
    EXTRA_CORRUPTIONS,
    SEVERITIES,
    constants_for,
    corrupt,
)
from entreg.errors import InputError
from tests.data.corruption_samples import REFERENCE_SEED, REFERENCE_STRIDE, reference_image


@pytest.fixture(scope="module")
def reference():
    with np.load(Path(__file__).parent / "corruption_reference.npz") as arrays:
        return dict(arrays)


def natural_images(count=24, size=32, channels=3, seed=0):
    """Smooth random images of full range: coarse noise, enlarged."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, channels), dtype=np.uint8)
    enlarged = [cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC) for image in coarse]
    return np.stack(enlarged).reshape(count, size, size, channels)


def with_constants(monkeypatch, corruption, settings):
    """Lets ``corrupt`` use other constants for one corruption of CIFAR-C."""
    changed = {**CONSTANTS["cifar_c"], corruption: settings}
    monkeypatch.setattr(corruptions, "CONSTANTS", {**CONSTANTS, "cifar_c": changed})


def distances(images, corruption, **keywords):
    return [
        np.abs(corrupt(images, corruption, severity, **keywords).astype(int) - images).mean() for severity in SEVERITIES
    ]


# The libraries compute in float32 in places: where a value lies on a whole grey level, cutting its decimals off then
# gives the level below. Elsewhere every pixel agrees.
MAY_DIFFER_BY_ONE = {"zoom_blur", "brightness", "saturate"}


@pytest.mark.parametrize("corruption", ALL_CORRUPTIONS)
def test_published_libraries_make_the_same_images_at_the_constants_of_imagenet_c(reference, corruption):
    images = reference_image()[None]
    for severity in SEVERITIES:
        setting = CONSTANTS["imagenet_c"][corruption][severity - 1]
        if corruption == "elastic_transform":
            setting = tuple(value * 224 / 244 for value in setting)  # The library mends the published number.
        # The libraries draw from numpy's legacy generator, for impulse noise from its newer one.
        bits = np.random.PCG64(REFERENCE_SEED) if corruption == "impulse_noise" else REFERENCE_SEED
        generator = np.random.RandomState(bits)
        ours = getattr(corruption_functions, corruption)(images, setting, [generator]).astype(np.uint8)[0]
        difference = np.abs(
            ours[::REFERENCE_STRIDE, ::REFERENCE_STRIDE].astype(int) - reference[corruption][severity - 1]
        )
        if corruption in MAY_DIFFER_BY_ONE:
            assert difference.max() <= 1
            assert (difference > 0).mean() < 0.05
        else:
            assert difference.max() == 0


def test_benchmark_is_15_corruptions_and_4_extra_ones_at_5_severities_in_both_families():
    assert (len(CORRUPTIONS), len(EXTRA_CORRUPTIONS), len(set(ALL_CORRUPTIONS))) == (15, 4, 19)
    for family in CONSTANTS.values():
        assert set(family) == set(ALL_CORRUPTIONS)
        assert all(len(settings) == 5 for settings in family.values())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
@pytest.mark.parametrize("corruption", ALL_CORRUPTIONS)
def test_images_depend_on_their_own_index_alone(corruption, size, channels):
    images = natural_images(6, max(size), channels)[:, : size[0], : size[1]]
    whole = corrupt(images, corruption, 5, seed=3)
    assert whole.shape == images.shape
    assert whole.dtype == np.uint8
    order = [4, 0, 5]
    assert np.array_equal(corrupt(images[order], corruption, 5, seed=3, indices=order), whole[order])
    assert np.array_equal(corrupt(images, corruption, 5, seed=3, num_threads=3), whole)


def test_chunks_do_not_change_the_images(monkeypatch):
    images = natural_images(7)
    whole = {name: corrupt(images, name, 3) for name in ALL_CORRUPTIONS}
    monkeypatch.setattr(corruptions, "_CHUNK_VALUES", 2 * images[0].size)
    for name, expected in whole.items():
        assert np.array_equal(corrupt(images, name, 3), expected)


RANDOM = [
    *("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "glass_blur", "motion_blur", "snow", "frost"),
    *("fog", "spatter", "elastic_transform"),
]


@pytest.mark.parametrize("corruption", ALL_CORRUPTIONS)
def test_seed_index_and_severity_decide_random_corruptions_and_nothing_else(corruption):
    images = np.repeat(natural_images(1), 8, axis=0)
    first, again, other = (corrupt(images, corruption, 4, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert np.array_equal(first, other) == (corruption not in RANDOM)
    assert (np.unique(first, axis=0).shape[0] > 1) == (corruption in RANDOM)


# The published constants of the others do not grow in every respect: elastic's affine map shrinks while its
# displacements grow, saturate first fades and then saturates, glass and frost trade two constants against each other.
GROWING = [
    name for name in ALL_CORRUPTIONS if name not in {"elastic_transform", "saturate", "glass_blur", "frost", "spatter"}
]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("corruption", GROWING)
def test_distance_to_the_clean_image_grows_with_severity(corruption, channels):
    grown = distances(natural_images(48, channels=channels), corruption)
    assert grown[0] > 0
    # Motion's fourth step changes next to nothing (radius 6 to 8 pixels at a sigma of 2), and pixelating to 28 and
    # to 27 pixels is nearly the same.
    tolerance = 0.95 if corruption in ("motion_blur", "pixelate") else 1.0
    assert all(after > tolerance * before for before, after in itertools.pairwise(grown))
    assert grown[4] > 1.5 * grown[0]


def test_every_image_of_every_corruption_changes_at_the_highest_severity():
    images = natural_images(16)
    for corruption in ALL_CORRUPTIONS:
        changed = (corrupt(images, corruption, 5) != images).any(axis=(1, 2, 3))
        # At CIFAR-C's constants some images get no splash of mud.
        assert changed.all() or (corruption == "spatter" and changed.mean() > 0.5)


# Closed forms at the constants that the authors give for CIFAR-C


@pytest.mark.parametrize(("severity", "deviation"), list(enumerate([0.04, 0.06, 0.08, 0.09, 0.10], 1)))
def test_gaussian_noise_has_the_published_deviation(severity, deviation):
    grey = np.full((20, 32, 32, 3), 127, np.uint8)
    noise = corrupt(grey, "gaussian_noise", severity).astype(float) + 0.5 - 127.0  # Decimals were cut off.
    standard_error = 255 * deviation / np.sqrt(2 * noise.size)
    assert abs(noise.std() - np.hypot(255 * deviation, 12**-0.5)) < 4 * standard_error
    assert abs(noise.mean()) < 4 * 255 * deviation / np.sqrt(noise.size) + 0.01


@pytest.mark.parametrize(("severity", "photons"), list(enumerate([500, 250, 100, 75, 50], 1)))
def test_shot_noise_has_the_variance_of_photons(severity, photons):
    grey = np.full((20, 32, 32, 3), 102, np.uint8)
    noisy = corrupt(grey, "shot_noise", severity) / 255.0
    assert noisy.var() == pytest.approx(0.4 / photons, rel=0.05)


@pytest.mark.parametrize(("severity", "fraction"), list(enumerate([0.01, 0.02, 0.03, 0.05, 0.07], 1)))
def test_impulse_noise_flips_the_published_fraction_half_to_white(severity, fraction):
    grey = np.full((40, 32, 32, 3), 100, np.uint8)
    noisy = corrupt(grey, "impulse_noise", severity)
    assert set(np.unique(noisy)) <= {0, 99, 100, 255}
    black, white = (noisy == 0).mean(), (noisy == 255).mean()
    assert black == pytest.approx(fraction / 2, rel=0.1)
    assert white == pytest.approx(fraction / 2, rel=0.1)


@pytest.mark.parametrize(("severity", "amount"), list(enumerate([0.05, 0.1, 0.15, 0.2, 0.3], 1)))
def test_brightness_raises_the_largest_channel_by_the_published_amount(severity, amount):
    images = natural_images(4)
    bright = corrupt(images, "brightness", severity)
    expected = np.minimum(images.max(axis=3) + 255 * amount, 255)
    assert np.abs(bright.max(axis=3) + 0.5 - expected).max() <= 0.5 + 1e-6
    # Hue and saturation stay: the channels keep their ratios.
    ratio = images / np.maximum(images.max(axis=3, keepdims=True), 1)
    assert np.abs(bright - ratio * expected[..., None])[images.max(axis=3) > 0].max() <= 1 + 1e-6


@pytest.mark.parametrize(("severity", "factor"), list(enumerate([0.75, 0.5, 0.4, 0.3, 0.15], 1)))
def test_contrast_scales_the_deviation_of_each_channel(severity, factor):
    images = natural_images(4)
    flat = corrupt(images, "contrast", severity).astype(float)
    assert np.allclose(flat.std(axis=(1, 2)), factor * images.std(axis=(1, 2)), atol=0.5)
    assert np.allclose(flat.mean(axis=(1, 2)), images.mean(axis=(1, 2)), atol=1.0)


@pytest.mark.parametrize(("severity", "sigma"), list(enumerate([0.4, 0.6, 0.7, 0.8, 1.0], 1)))
def test_gaussian_blur_of_a_point_is_a_gaussian(severity, sigma):
    point = np.zeros((1, 33, 33, 1), np.uint8)
    point[0, 16, 16] = 255
    blurred = corrupt(point, "gaussian_blur", severity)[0, ..., 0].astype(float)
    steps = np.arange(-16, 17)
    weights = np.exp(-(steps**2) / (2 * sigma**2)) * (np.abs(steps) <= int(4 * sigma + 0.5))
    line = weights / weights.sum()
    assert np.abs(blurred + 0.5 - 255 * np.outer(line, line)).max() <= 0.5 + 1e-6


def test_motion_blur_of_a_point_is_a_one_sided_gaussian_along_a_ray():
    point = np.zeros((40, 65, 65, 1), np.uint8)
    point[:, 32, 32] = 255
    for severity, (radius, sigma) in enumerate([(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)], 1):
        blurred = corrupt(point, "motion_blur", severity).astype(float)[..., 0]
        weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
        assert np.allclose(blurred[:, 32, 32], np.rint(255 / weights.sum()))  # Only the ray's origin lands there.
        assert np.allclose(blurred.sum(axis=(1, 2)), 255, atol=6)
        rows, columns = np.mgrid[:65, :65] - 32
        # The point is seen by the pixels that look along the ray: all on its far side, within 45 degrees of the row.
        assert not blurred[:, (columns > 0) | (np.abs(rows) > 1 - columns)].any()


def test_fog_keeps_the_brightest_value_within_reach_and_veils_black():
    images = natural_images(8)
    veiled = corrupt(images, "fog", 5)
    assert (veiled.max(axis=(1, 2, 3)) <= images.max(axis=(1, 2, 3))).all()
    black = np.zeros((4, 32, 32, 1), np.uint8)
    black[:, 5, 5] = 255
    clouds = corrupt(black, "fog", 5, seed=1)[..., 0]
    clouds[:, 5, 5] = clouds[:, 5, 6]
    # Thickness 1.5: the map's maximum 1 becomes 1.5 / (1 + 1.5) of white; its minimum, black.
    assert np.allclose(clouds.max(axis=(1, 2)), 153, atol=1)
    assert (clouds.min(axis=(1, 2)) == 0).all()


@pytest.mark.parametrize(("severity", "quality"), list(enumerate([80, 65, 58, 50, 40], 1)))
def test_jpeg_is_that_of_opencv(severity, quality):
    images = natural_images(4, channels=1)
    for image, ours in zip(images, corrupt(images, "jpeg_compression", severity), strict=True):
        _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
        theirs = cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE)
        assert np.abs(theirs.astype(int) - ours[..., 0]).max() <= 2


@pytest.mark.parametrize(("severity", "side"), list(enumerate([30, 28, 27, 24, 20], 1)))
def test_pixelate_leaves_blocks_of_the_published_number(severity, side):
    noise = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    for image in corrupt(noise, "pixelate", severity):
        assert len(np.unique(image, axis=0)) == side
        assert len(np.unique(image, axis=1)[0]) == side
        assert image.mean() == pytest.approx(127.5, abs=5)


def test_zoom_blur_is_the_mean_of_zooms_by_scipy():
    image = natural_images(1)
    total, factors = image[0] / 255.0, np.arange(1, 1.26, 0.01)
    for factor in factors:
        side = int(np.ceil(32 / factor))
        start = (32 - side) // 2
        zoomed = ndimage.zoom(
            image[0, start : start + side, start : start + side] / 255.0, (factor, factor, 1), order=1
        )
        trim = (len(zoomed) - 32) // 2
        total = total + zoomed[trim : trim + 32, trim : trim + 32]
    expected = total / (len(factors) + 1) * 255
    assert np.abs(corrupt(image, "zoom_blur", 5)[0] + 0.5 - expected).max() <= 0.5 + 1e-6


def test_elastic_transform_without_strength_and_reach_is_the_identity(monkeypatch):
    with_constants(monkeypatch, "elastic_transform", ((0.0, 1.0, 0.0),) * 5)
    images = natural_images(3)
    assert np.abs(corrupt(images, "elastic_transform", 1).astype(int) - images).max() <= 1


def test_saturation_keeps_value_and_fades_or_deepens_colour():
    images = natural_images(6)
    spread = images.max(axis=3).astype(float) - images.min(axis=3)
    for severity, factor in ((1, 0.3), (2, 0.1)):
        faded = corrupt(images, "saturate", severity)
        assert np.abs(faded.max(axis=3).astype(int) - images.max(axis=3)).max() <= 1
        assert np.abs((faded.max(axis=3).astype(float) - faded.min(axis=3)) - factor * spread).max() <= 1.0
    deep = corrupt(images, "saturate", 3)
    assert (deep.max(axis=3).astype(float) - deep.min(axis=3)).mean() > spread.mean()


# Grey images


@pytest.mark.parametrize("corruption", [name for name in ALL_CORRUPTIONS if not name.endswith("_noise")])
def test_grey_images_fare_as_grey_colour_images_do(corruption):
    """Without draws for each channel, one channel gives what three equal ones give."""
    grey = natural_images(6, channels=1)
    three = corrupt(np.repeat(grey, 3, axis=3), corruption, 3).astype(float)
    luma = three @ [0.299, 0.587, 0.114]
    # Colour images lose decimals per channel before the luma is taken, and JPEG rounds colours on its way.
    assert np.abs(corrupt(grey, corruption, 3)[..., 0] - luma).max() <= 2.0


# Bad input


@pytest.mark.parametrize(
    ("images", "arguments", "match"),
    [
        (np.zeros((2, 32, 32, 3)), ("fog", 1), "uint8"),
        (np.zeros((2, 32, 32, 4), np.uint8), ("fog", 1), "1 or 3"),
        (np.zeros((32, 32, 3), np.uint8), ("fog", 1), "shape"),
        (np.zeros((2, 8, 32, 3), np.uint8), ("fog", 1), "16 pixels"),
        (np.zeros((2, 32, 32, 3), np.uint8), ("mist", 1), "unknown corruption 'mist'"),
        (np.zeros((2, 32, 32, 3), np.uint8), ("fog", 0), "1 to 5"),
        (np.zeros((2, 32, 32, 3), np.uint8), ("fog", 6), "1 to 5"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(images, arguments, match):
    with pytest.raises(InputError, match=match):
        corrupt(images, *arguments)


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"seed": -1}, "seed"),
        ({"num_threads": 0}, "num_threads"),
        ({"constants": "mnist_c"}, "cifar_c or imagenet_c"),
        ({"indices": [0]}, "2 integers"),
        ({"indices": [0, -1]}, "2 integers"),
        ({"indices": [0.5, 1.0]}, "2 integers"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(keywords, match):
    with pytest.raises(InputError, match=match):
        corrupt(np.zeros((2, 32, 32, 3), np.uint8), "contrast", 1, **keywords)


def test_no_images_give_no_images():
    assert corrupt(np.zeros((0, 32, 32, 3), np.uint8), "snow", 1).shape == (0, 32, 32, 3)


def test_images_get_the_constants_of_their_size():
    assert (constants_for(32, 32), constants_for(48, 56), constants_for(224, 224)) == (
        *("cifar_c", "cifar_c", "imagenet_c"),
    )
    images = natural_images(2)
    assert not np.array_equal(corrupt(images, "contrast", 3), corrupt(images, "contrast", 3, constants="imagenet_c"))
    assert np.array_equal(corrupt(images, "contrast", 3), corrupt(images, "contrast", 3, constants="cifar_c"))
