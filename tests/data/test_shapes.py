"""Textured shapes: silhouettes against their closed-form areas, masks against what is painted, determinism."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from entreg.data.shapes import NUM_CLASSES, SILHOUETTES, TEXTURES, TexturedShapes
from entreg.errors import InputError

TRIANGLE = 3 * np.sqrt(3) / 4


def lens(r, s, d):
    """Area common to two disks of radii r and s whose middles are d apart."""
    a = np.arccos((d * d + r * r - s * s) / (2 * d * r))
    b = np.arccos((d * d + s * s - r * r) / (2 * d * s))
    return r * r * (a - np.sin(2 * a) / 2) + s * s * (b - np.sin(2 * b) / 2)


AREAS = {
    "disk": np.pi,
    "ellipse": 0.45 * np.pi,
    "ring": np.pi * (1 - 0.55**2),
    "half_disk": np.pi / 2,
    "crescent": np.pi - lens(1.0, 0.75, 0.5),
    "triangle": TRIANGLE,
    "square": 2.0,
    "hexagon": 2 * TRIANGLE,
    "hexagram": 4 / 3 * TRIANGLE,
    "cross": 2 * 0.6 * 1.9 - 0.36,
}


@pytest.mark.parametrize("name", SILHOUETTES)
def test_silhouettes_have_their_area_and_fit_the_unit_circle(name):
    step = 0.002
    side = np.arange(-1.1, 1.1, step) + step / 3
    u, v = np.meshgrid(side, side)
    inside = SILHOUETTES[name](u, v)
    assert inside.sum() * step**2 == pytest.approx(AREAS[name], rel=0.005)
    assert np.hypot(u, v)[inside].max() < 1.0 + step


def test_textures_differ_and_are_shares():
    p, q = np.meshgrid(np.linspace(-20, 20, 300), np.linspace(-21, 19, 300))
    drawn = [np.asarray(texture(p, q), dtype=float) for texture in TEXTURES.values()]
    for number, one in enumerate(drawn):
        assert 0 <= one.min() <= one.max() <= 1
        assert all(np.abs(one - other).mean() > 0.1 for other in drawn[:number])


def test_masks_hold_one_silhouette_of_the_stated_class():
    dataset = TexturedShapes("test", size=96)
    pixels, labels, masks = dataset.pixels(range(400))
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    plain = np.flatnonzero(labels[:, 0] % len(TEXTURES) == 0)
    assert len(plain) > 20
    for scene in plain:
        # A plain silhouette has one colour, up to noise of 0.04, and its surroundings have others.
        inside, outside = pixels[scene][:, masks[scene]], pixels[scene][:, ~masks[scene]]
        assert inside.std(axis=1).max() < 0.06
        assert outside.std(axis=1).max() > 0.1
    disks = np.flatnonzero(labels[:, 0] // len(TEXTURES) == list(SILHOUETTES).index("disk"))
    y, x = np.mgrid[:96, :96]
    for scene in disks:
        mask = masks[scene]
        radius = np.sqrt(mask.sum() / np.pi)
        distance = np.hypot(y - y[mask].mean(), x - x[mask].mean())
        assert mask[distance < radius - 1].all()
        assert not mask[distance > radius + 1].any()
        assert 0.2 * 96 - 1 < radius < 0.38 * 96 + 1


def test_every_class_and_nearly_every_place_occurs():
    _, labels, masks = TexturedShapes("train", size=32).pixels(range(2000))
    counts = np.bincount(labels[:, 0], minlength=NUM_CLASSES)
    assert len(counts) == NUM_CLASSES == 100
    assert counts.min() >= 5
    assert masks.any(axis=(1, 2)).all()
    assert masks.any(axis=0).mean() > 0.9  # a silhouette inside its circle does not reach the corners


def digest(dataset, indices):
    batch = dataset.batch(indices)
    return hashlib.sha256(b"".join(batch[key].numpy().tobytes() for key in ("images", "labels", "masks"))).hexdigest()


def test_item_depends_on_seed_split_and_index_only():
    dataset = TexturedShapes("train", size=40, seed=3)
    for item, index in zip(dataset.__getitems__([7, 2**40, 0]), [7, 2**40, 0], strict=True):
        alone = TexturedShapes("train", size=40, seed=3)[index]
        assert all(torch.equal(item[key], alone[key]) for key in item)
        assert item["images"].shape == (3, 40, 40)
        assert item["labels"].shape == ()
    seen = {digest(TexturedShapes(split, size=40, seed=seed), [0]) for split in ("train", "test") for seed in (0, 1)}
    assert len(seen) == 4
    code = "from tests.data.test_shapes import *; print(digest(TexturedShapes('train', size=40, seed=3), [5, 9]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == digest(dataset, [5, 9])


def test_sizes_out_of_range_are_one_sentence():
    for size in (31, 1025):
        with pytest.raises(InputError, match=rf"size must lie in \[32, 1024\], got {size}"):
            TexturedShapes("train", size=size)
