"""Scenes: determinism over processes and batches, endless training, disjoint splits, masks against a repainting."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from entreg.data.digits import load_digits
from entreg.data.indexed_scenes import LENGTHS
from entreg.data.scene_painting import SceneRecipe, num_uniform, paint
from entreg.data.scenes import MEAN, STANDARD_DEVIATION, ClutteredDigits, DigitScenes, Scenes
from entreg.errors import InputError

INDICES = [5, 0, 999, 17]


def digest(dataset, indices):
    batch = dataset.batch(indices)
    return hashlib.sha256(b"".join(batch[key].numpy().tobytes() for key in ("images", "labels", "masks"))).hexdigest()


def test_shapes_types_and_lengths():
    scenes, single = DigitScenes("validation", channels=3), ClutteredDigits("test", canvas=32)
    item = scenes[3]
    assert {key: (tuple(value.shape), value.dtype) for key, value in item.items()} == {
        "images": ((3, 48, 48), torch.float32),
        "labels": ((4,), torch.int64),
        "masks": ((48, 48), torch.bool),
    }
    assert single[0]["labels"].shape == ()
    assert single[0]["images"].shape == (1, 32, 32)
    assert (len(scenes), len(single), len(DigitScenes("train", length=7))) == (1000, 2000, 7)
    # torch's own loader takes it as it is.
    batch = next(iter(torch.utils.data.DataLoader(single, batch_size=3)))
    assert batch["labels"].shape == (3,)
    assert torch.equal(batch["masks"], single.batch([0, 1, 2])["masks"])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("task", [DigitScenes, ClutteredDigits])
def test_scene_depends_on_seed_split_and_index_only(task, channels):
    dataset = task("train", channels=channels, seed=4)
    together = dataset.__getitems__(INDICES)
    for index, item in zip(INDICES, together, strict=True):
        alone = task("train", channels=channels, seed=4)[index]
        assert all(torch.equal(item[key], alone[key]) for key in item)
    images = [dataset[0]["images"], dataset[1]["images"], task("train", channels=channels, seed=5)[0]["images"]]
    images.append(task("validation", channels=channels, seed=4)[0]["images"])
    for one in range(4):
        for other in range(one):
            assert not torch.equal(images[one], images[other])


def test_another_process_makes_the_same_scenes():
    code = (
        "from tests.data.test_scenes import *; "
        "print(digest(DigitScenes('train', seed=2), INDICES), digest(ClutteredDigits('test', channels=3), INDICES))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = [digest(DigitScenes("train", seed=2), INDICES), digest(ClutteredDigits("test", channels=3), INDICES)]
    assert result.stdout.split() == expected


def test_training_is_endless_and_evaluation_is_not():
    train = DigitScenes("train", length=10)
    late = train[10 + 3]["images"]
    assert not torch.equal(late, train[3]["images"])
    assert torch.equal(late, DigitScenes("train")[13]["images"])
    assert train[2**62]["images"].shape == (1, 48, 48)
    for dataset, index in ((train, -1), (DigitScenes("test"), LENGTHS["test"])):
        with pytest.raises(IndexError, match=f"scene {index} of"):
            dataset[index]


def repainted(recipe, pool, labels, uniform):
    """Ink, labels and mask of one scene, pixel by pixel, from the documented order of the random numbers."""
    ink = np.zeros((recipe.canvas, recipe.canvas))
    names = []
    for digit in range(recipe.cells**2):
        which, down, right = uniform[3 * digit : 3 * digit + 3]
        image = pool[int(which * len(pool))]
        names.append(labels[int(which * len(pool))])
        corner = (recipe.cell - recipe.digit_size) // 2 - recipe.max_offset
        top = (digit // recipe.cells) * recipe.cell + corner + int(down * (2 * recipe.max_offset + 1))
        left = (digit % recipe.cells) * recipe.cell + corner + int(right * (2 * recipe.max_offset + 1))
        for y in range(recipe.digit_size):
            for x in range(recipe.digit_size):
                ink[top + y, left + x] = image[y, x]
    return ink, names, ink > 0.3


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("cells", [1, 2])
def test_masks_labels_and_ink_equal_a_repainting_of_every_pixel(cells, channels):
    recipe = SceneRecipe(40, cells, 12, 4, 9, channels=channels)
    rng = np.random.default_rng(0)
    pool, labels = rng.random((7, 12, 12), dtype=np.float32), np.arange(7)
    uniform = rng.random((6, num_uniform(recipe)))
    silent = SceneRecipe(40, cells, 12, 4, 9, grating=(0.0, 0.0), noise=0.0, channels=channels)
    normal = rng.standard_normal((6, channels, 40, 40), dtype=np.float32)
    pixels, names, masks = paint(recipe, pool, labels, uniform, normal.copy())
    quiet, _, _ = paint(silent, pool, labels, uniform, normal.copy())
    for scene in range(6):
        ink, expected, mask = repainted(recipe, pool, labels, uniform[scene])
        assert names[scene].tolist() == expected
        assert np.array_equal(masks[scene], mask)
        # Where a digit is the image shows that digit, in one colour per digit; next to it there is no clutter.
        shown = quiet[scene][:, mask]
        if channels == 1:
            assert np.array_equal(shown[0], ink[mask].astype(np.float32))
        else:
            ratio = shown / ink[mask]
            assert ratio.min() >= 0.5 - 1e-6
            assert ratio.max() <= 1 + 1e-6
            assert len({tuple(row) for row in ratio.T.round(4)}) <= cells**2
        padded = np.pad(mask, 1)
        beside = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
        assert quiet[scene][:, beside & (ink == 0)].sum() == 0
        assert quiet[scene][:, ~beside & (ink == 0)].sum() > 0
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    assert not np.array_equal(pixels, quiet)


def test_grating_and_noise_have_the_stated_size():
    # No digit ink at all: what is left is the grating, whose values sweep [0, amplitude], and the noise.
    recipe = SceneRecipe(64, 1, 12, 0, 0, grating=(0.5, 0.5), noise=0.0)
    blank, labels = np.zeros((1, 12, 12), dtype=np.float32), np.zeros(1, dtype=np.int64)
    uniform = np.random.default_rng(1).random((8, num_uniform(recipe)))
    pixels, _, masks = paint(recipe, blank, labels, uniform, np.zeros((8, 1, 64, 64), dtype=np.float32))
    assert not masks.any()
    assert np.allclose(pixels.min(axis=(1, 2, 3)), 0, atol=0.01)
    assert np.allclose(pixels.max(axis=(1, 2, 3)), 0.5, atol=0.01)
    y, x = np.mgrid[:64, :64]
    direction, length, phase = uniform[:, 6] * np.pi, 5 + 9 * uniform[:, 7], 2 * np.pi * uniform[:, 8]
    for scene in range(8):
        along = np.cos(direction[scene]) * x + np.sin(direction[scene]) * y
        wave = 0.25 + 0.25 * np.sin(2 * np.pi * along / length[scene] + phase[scene])
        assert np.abs(pixels[scene, 0] - wave).max() < 1e-4
    noisy = SceneRecipe(64, 1, 12, 0, 0, grating=(0.5, 0.5), noise=0.05)
    normal = np.random.default_rng(2).standard_normal((8, 1, 64, 64), dtype=np.float32)
    difference = paint(noisy, blank, labels, uniform, normal.copy())[0] - pixels
    inside = (pixels > 0.25) & (pixels < 0.75)
    assert np.allclose(difference[inside], 0.05 * normal[inside], atol=1e-6)


def test_clutter_changes_neither_digits_nor_places_and_colour_changes_no_shape():
    plain, cluttered = (DigitScenes("validation", num_fragments=number).batch(range(8)) for number in (0, 30))
    coloured = DigitScenes("validation", channels=3).batch(range(8))
    for other in (cluttered, coloured):
        assert torch.equal(plain["masks"], other["masks"])
        assert torch.equal(plain["labels"], other["labels"])
    assert cluttered["images"].mean() > plain["images"].mean() + 0.1
    assert not torch.equal(coloured["images"][:, 0], coloured["images"][:, 1])


def test_splits_show_only_their_own_digits():
    # Without clutter and offset the middle of each cell is one digit of the split's own file.
    for split in ("validation", "test"):
        own = {image.tobytes() for image in load_digits(split)[0][:, 4:24, 4:24]}
        recipe = SceneRecipe(20, 1, 20, 0, 0, grating=(0.0, 0.0), noise=0.0)
        pixels, _, _ = Scenes(recipe, split, length=300).pixels(range(300))
        shown = {image.tobytes() for image in np.rint(pixels[:, 0] * 255).astype(np.uint8)}
        assert shown <= own
        assert len(shown) > 150


def test_batches_are_normalised_pixels_with_about_the_stated_statistics():
    dataset = DigitScenes("train")
    pixels = dataset.pixels(range(256))[0]
    batch = dataset.batch(range(256))["images"]
    assert torch.allclose(batch, (torch.from_numpy(pixels) - MEAN) / STANDARD_DEVIATION, atol=1e-6)
    assert abs(batch.mean()) < 0.2
    assert 0.7 < batch.std() < 1.3


def test_every_place_and_every_class_is_used():
    scenes = ClutteredDigits("train", canvas=40)
    batch = scenes.batch(range(2000))
    used = batch["masks"].any(0)
    assert used.float().mean() > 0.9  # only the corners are out of reach of round digits
    assert all(edge.any() for edge in (used[0], used[-1], used[:, 0], used[:, -1]))
    assert (torch.bincount(batch["labels"], minlength=10) > 130).all()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: DigitScenes("val"), "unknown split 'val', known are train, validation, test"),
        (lambda: DigitScenes("train", canvas=49), "a canvas of 49 pixels cannot be divided into 2 cells per side"),
        (lambda: DigitScenes("train", canvas=30), r"digit_size must be in \[4, 15\]"),
        (lambda: DigitScenes("train", max_offset=5), r"max_offset must be in \[0, 4\]"),
        (lambda: DigitScenes("train", num_fragments=-1), "num_fragments must be at least 0, got -1"),
        (lambda: DigitScenes("train", channels=2), "channels must be 1 or 3, got 2"),
        (lambda: DigitScenes("train", length=0), "length must be at least 1, got 0"),
        (lambda: DigitScenes("train", seed=-1), "seed must be at least 0, got -1"),
        (lambda: SceneRecipe(48, 1, 16, 0, 1, grating=(0.3, 0.2)), "grating must be two increasing amplitudes"),
        (lambda: SceneRecipe(48, 1, 16, 0, 1, noise=float("nan")), "noise must be at least 0"),
        (lambda: SceneRecipe(48, 1, 9, 0, 1), r"fragment_size must be in \[1, 5\]"),
    ],
)
def test_bad_values_are_one_sentence(make, sentence):
    with pytest.raises(InputError, match=sentence):
        make()
