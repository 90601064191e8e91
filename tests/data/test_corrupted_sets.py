"""Official corruption files and the choice by configuration, on miniature files in the published layout."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from entreg.data import corrupted_sets
from entreg.data.corrupted_images import GeneratedCorruptions
from entreg.data.corrupted_sets import corrupted_dataset, corrupted_set
from entreg.data.corruptions import ALL_CORRUPTIONS, CORRUPTIONS, EXTRA_CORRUPTIONS, corrupt
from entreg.data.official_corruptions import OfficialCorruptions
from entreg.data.scenes import ClutteredDigits
from entreg.data.vision_sets import vision_dataset
from entreg.errors import AssetError, ConfigError, InputError
from tests.data.official_layouts import random_pixels, write_cifar100, write_corruptions

ROOT = Path(__file__).parents[2]
CIFAR100 = {"name": "cifar100", "preprocessing": {"model": None, "input_size": [3, 32, 32], "crop_pct": 1.0}}


def read_config(name):
    return yaml.safe_load((ROOT / "configs" / "data" / f"{name}.yaml").read_text())


@pytest.fixture(scope="module")
def labels():
    return np.random.default_rng(1).integers(0, 100, 8)


@pytest.fixture
def official(tmp_path, labels):
    """A folder like CIFAR-100-C with 8 instead of 10,000 images per severity."""
    return write_corruptions(tmp_path / "CIFAR-100-C", labels)


def rows_of(folder, corruption):
    return np.load(folder / f"{corruption}.npy")


def test_severity_s_is_the_sth_block_of_rows(official, labels):
    corrupted = OfficialCorruptions(official)
    assert (len(corrupted), corrupted.corruptions) == (8, ALL_CORRUPTIONS)
    assert np.array_equal(corrupted.labels, labels)
    for corruption in ("gaussian_noise", "jpeg_compression"):
        rows = rows_of(official, corruption)
        for severity in (1, 2, 3, 4, 5):
            assert np.array_equal(corrupted.images(corruption, severity), rows[(severity - 1) * 8 : severity * 8])
    assert isinstance(corrupted.images("fog", 1), np.memmap)


def test_extra_corruptions_may_be_missing(official):
    for corruption in EXTRA_CORRUPTIONS[1:]:
        (official / f"{corruption}.npy").unlink()
    corrupted = OfficialCorruptions(official)
    assert corrupted.corruptions == (*CORRUPTIONS, "speckle_noise")
    with pytest.raises(InputError, match="no spatter"):
        corrupted.images("spatter", 1)


def test_revision_follows_the_files(official):
    before = OfficialCorruptions(official).describe()["revision"]
    assert before == OfficialCorruptions(official).describe()["revision"]
    rows = rows_of(official, "snow")
    np.save(official / "snow.npy", rows[::-1])
    assert OfficialCorruptions(official).describe()["revision"] != before


def rewrite(name, change):
    def damage(folder):
        np.save(folder / f"{name}.npy", change(np.load(folder / f"{name}.npy")))

    return damage


def truncate(name):
    def damage(folder):
        path = folder / f"{name}.npy"
        path.write_bytes(path.read_bytes()[:-100])

    return damage


def other_labels_at_one_severity(labels):
    labels[-1] = (labels[-1] + 1) % 100
    return labels


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda folder: (folder / "fog.npy").unlink(), r"lacks fog\.npy; CIFAR-100-C is at https"),
        (lambda folder: (folder / "labels.npy").unlink(), r"lacks labels\.npy"),
        (truncate("fog"), r"fog\.npy is truncated"),
        (truncate("labels"), r"labels\.npy is truncated"),
        (lambda folder: (folder / "frost.npy").write_bytes(b""), r"frost\.npy is truncated or no array"),
        (lambda folder: (folder / "frost.npy").write_text("<html>"), r"frost\.npy is truncated or no array"),
        (rewrite("snow", lambda rows: rows[:-1]), r"snow\.npy must hold uint8 of shape \(40, 32, 32, 3\),.*\(39, "),
        (rewrite("snow", lambda rows: rows.astype(np.float32)), r"snow\.npy must hold uint8 .* has float32"),
        (rewrite("snow", lambda rows: rows.transpose(0, 3, 1, 2)), r"snow\.npy must hold .*\(40, 3, 32, 32\)"),
        (rewrite("speckle_noise", lambda rows: rows[:, :28]), r"speckle_noise\.npy must hold"),
        (rewrite("labels", lambda labels: labels[:-1]), r"labels\.npy must hold integers of shape \(40,\).*\(39,\)"),
        (rewrite("labels", lambda labels: labels[:8]), r"labels\.npy must hold integers of shape \(40,\).*\(8,\)"),
        (rewrite("labels", lambda labels: labels[:, None]), r"labels\.npy must hold integers of shape \(40,\)"),
        (rewrite("labels", lambda labels: labels.astype(float)), r"labels\.npy must hold integers .*float64"),
        (rewrite("labels", lambda labels: labels + 90), "not below 100"),
        (rewrite("labels", other_labels_at_one_severity), "repeat the same 8 labels"),
    ],
)
def test_wrong_files_are_refused_in_one_sentence(official, damage, match):
    damage(official)
    with pytest.raises(AssetError, match=match):
        OfficialCorruptions(official)


def test_wrong_folder_and_count_are_refused_in_one_sentence(official, tmp_path):
    with pytest.raises(AssetError, match=r"no folder .*nowhere.*zenodo"):
        OfficialCorruptions(tmp_path / "nowhere")
    with pytest.raises(AssetError, match=r"shape \(50000, 32, 32, 3\)"):
        OfficialCorruptions(official, images_per_severity=10_000)
    with pytest.raises(AssetError, match="not below 10"):
        OfficialCorruptions(official, num_classes=10)
    assert len(OfficialCorruptions(official, images_per_severity=8)) == 8


# By configuration


def test_configurations_give_official_and_generated_sets(official, tmp_path, monkeypatch):
    monkeypatch.setenv("ENTREG_CACHE", str(tmp_path / "cache"))
    config = read_config("cifar100_c")
    with pytest.raises(ConfigError, match="needs its root"):
        corrupted_set(config)
    assert isinstance(corrupted_set({**config, "root": str(official)}), OfficialCorruptions)
    scenes = _Grey()
    generated = corrupted_set({**read_config("corrupted_digits"), "limit": 3}, scenes)
    assert isinstance(generated, GeneratedCorruptions)
    assert len(generated) == 3
    assert np.array_equal(generated.images("fog", 1), corrupt(scenes.images[:3], "fog", 1))


class _Grey:
    """Smallest thing with clean images."""

    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 1), dtype=np.uint8)

    def __len__(self):
        return len(self.images)

    def pixels(self, indices):
        return self.images[list(indices)].transpose(0, 3, 1, 2) / np.float32(255), np.zeros((len(indices), 1), int)


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        ({}, ConfigError, "unknown corrupted set 'None'"),
        ({"name": "cifar100_p"}, ConfigError, "unknown corrupted set 'cifar100_p', known are"),
        ({"name": "generated", "root": "x"}, ConfigError, "unknown key 'root' of generated"),
        ({"name": "cifar10_c", "seed": 1}, ConfigError, "unknown key 'seed' of cifar10_c"),
        ({"name": "generated", "limit": 0}, InputError, "limit"),
    ],
)
def test_bad_configurations_are_refused_in_one_sentence(config, error, match):
    with pytest.raises(error, match=match):
        corrupted_set(config, _Grey())


def test_corrupted_cifar_is_prepared_as_the_clean_images_are(tmp_path, labels, official):
    pixels = random_pixels(8)
    write_cifar100(tmp_path, (random_pixels(4, seed=1), np.arange(4)), (pixels, labels))
    config = {**CIFAR100, "root": str(tmp_path)}
    # Files whose severity 2 of fog is the clean test set itself: they must come out as its own items.
    rows = rows_of(official, "fog")
    rows[8:16] = pixels
    np.save(official / "fog.npy", rows)
    clean = vision_dataset(config, "test")
    corrupted = corrupted_dataset(config, "fog", 2, limit=6)
    assert len(corrupted) == 6
    for index in range(6):
        assert torch.equal(corrupted[index]["images"], clean[index]["images"])
        assert int(corrupted[index]["labels"]) == int(clean[index]["labels"]) == labels[index]
    with pytest.raises(ConfigError, match="test split, not of 'validation'"):
        corrupted_dataset(config, "fog", 2, split="validation")


def test_cifar_without_its_corrupted_files_says_where_they_are(tmp_path, labels):
    write_cifar100(tmp_path, (random_pixels(4), np.arange(4)), (random_pixels(8), labels))
    with pytest.raises(AssetError, match=r"CIFAR-100-C .*zenodo"):
        corrupted_dataset({**CIFAR100, "root": str(tmp_path)}, "fog", 2)


def test_cifar_can_be_corrupted_here_on_request(tmp_path, labels, monkeypatch):
    monkeypatch.setenv("ENTREG_CACHE", str(tmp_path / "cache"))
    pixels = random_pixels(8)
    write_cifar100(tmp_path, (random_pixels(4), np.arange(4)), (pixels, labels))
    config = {**CIFAR100, "root": str(tmp_path)}
    corrupted = corrupted_dataset(config, "contrast", 1, corruptions={"name": "generated"})
    assert np.array_equal(corrupted.images, corrupt(pixels, "contrast", 1))
    assert np.array_equal(corrupted.labels, labels)


def test_scenes_are_corrupted_here_and_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv("ENTREG_CACHE", str(tmp_path / "cache"))
    corrupted_sets._read.cache_clear()
    config = {"name": "cluttered_mnist", "canvas": 32, "channels": 3}
    scenes = ClutteredDigits("validation", canvas=32, channels=3)
    dataset = corrupted_dataset(config, "pixelate", 2, split="validation", limit=4)
    raw = np.stack([scenes.raw(index) for index in range(4)])
    assert np.array_equal(dataset.images, corrupt(raw, "pixelate", 2))
    assert torch.equal(dataset[2]["images"], scenes.prepare(corrupt(raw, "pixelate", 2)[2]))
    assert [int(dataset[index]["labels"]) for index in range(4)] == [int(scenes[index]["labels"]) for index in range(4)]
    corrupted_dataset(dict(config), "fog", 1, split="validation", limit=4)
    assert corrupted_sets._read.cache_info().misses == 1
