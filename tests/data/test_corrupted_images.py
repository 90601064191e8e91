"""Generated corruptions: what is cached, when it is made again, and what the data sets return."""

import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from entreg.data import corrupted_images, corruptions
from entreg.data.corrupted_images import CorruptedImages, GeneratedCorruptions, clean_images, preparation_of
from entreg.data.corruptions import ALL_CORRUPTIONS, corrupt
from entreg.data.scenes import ClutteredDigits, DigitScenes
from entreg.data.shapes import TexturedShapes
from entreg.errors import InputError


@pytest.fixture
def clean():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, 6)


@pytest.fixture
def count_calls(monkeypatch):
    calls = []

    def counted(images, corruption, severity, **keywords):
        calls.append((corruption, severity))
        return corrupt(images, corruption, severity, **keywords)

    monkeypatch.setattr(corrupted_images, "corrupt", counted)
    return calls


def test_images_are_those_of_corrupt_whatever_the_threads(clean, tmp_path):
    corrupted = GeneratedCorruptions(*clean, seed=2, folder=tmp_path, num_threads=2)
    assert (len(corrupted), corrupted.corruptions) == (6, ALL_CORRUPTIONS)
    for corruption in ("shot_noise", "fog", "jpeg_compression"):
        images = corrupted.images(corruption, 4)
        assert np.array_equal(images, corrupt(clean[0], corruption, 4, seed=2))
        assert not images.flags.writeable


def test_cache_is_filled_once_and_read_by_later_sets(clean, tmp_path, count_calls):
    first = GeneratedCorruptions(*clean, folder=tmp_path).images("fog", 2)
    again = GeneratedCorruptions(*clean, folder=tmp_path)
    assert np.array_equal(again.images("fog", 2), first)
    assert again.images("fog", 2) is again.images("fog", 2)
    assert count_calls == [("fog", 2)]
    assert sorted(path.name for path in again.folder.iterdir()) == ["fog-2.json", "fog-2.npy"]


def test_default_cache_lies_in_the_cache_folder(clean, tmp_path, monkeypatch):
    monkeypatch.setenv("ENTREG_CACHE", str(tmp_path / "cache"))
    corrupted = GeneratedCorruptions(*clean)
    corrupted.images("contrast", 1)
    assert corrupted.folder.parent == tmp_path / "cache" / "corrupted"


@pytest.mark.parametrize("damage", ["flip", "truncate", "no checksum", "bad checksum file"])
def test_damaged_and_half_written_files_are_made_anew(clean, tmp_path, count_calls, damage):
    corrupted = GeneratedCorruptions(*clean, folder=tmp_path)
    expected = corrupted.images("pixelate", 3).copy()
    path = corrupted.folder / "pixelate-3.npy"
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "no checksum":
        path.with_suffix(".json").unlink()
    else:
        path.with_suffix(".json").write_text("[")
    assert np.array_equal(GeneratedCorruptions(*clean, folder=tmp_path).images("pixelate", 3), expected)
    assert count_calls == [("pixelate", 3)] * 2
    assert path.read_bytes() == content


def test_whatever_changes_the_images_changes_the_cache(clean, tmp_path, monkeypatch):
    images, labels = clean
    brighter = images.copy()
    brighter[5, 31, 31, 2] ^= 1
    folders = [
        GeneratedCorruptions(images, labels, folder=tmp_path).folder,
        GeneratedCorruptions(brighter, labels, folder=tmp_path).folder,
        GeneratedCorruptions(images[:5], labels[:5], folder=tmp_path).folder,
        GeneratedCorruptions(images, labels, folder=tmp_path, seed=1).folder,
        GeneratedCorruptions(images, labels, folder=tmp_path, constants="imagenet_c").folder,
    ]
    monkeypatch.setattr(corrupted_images, "CONSTANTS_VERSION", corruptions.CONSTANTS_VERSION + 1)
    folders.append(GeneratedCorruptions(images, labels, folder=tmp_path).folder)
    assert len(set(folders)) == len(folders)


def test_description_names_what_was_generated(clean, tmp_path):
    described = GeneratedCorruptions(*clean, folder=tmp_path).describe()
    assert (described["source"], described["constants"], described["images"]) == ("generated", "cifar_c", 6)
    assert json.loads(json.dumps(described)) == described


def test_items_batch_as_the_model_wants_them(clean, tmp_path):
    images, labels = clean
    dataset = GeneratedCorruptions(images, labels, folder=tmp_path).dataset("contrast", 2)
    batch = next(iter(DataLoader(dataset, batch_size=4)))
    assert batch["images"].dtype == torch.float32
    assert batch["labels"].dtype == torch.int64
    expected = corrupt(images, "contrast", 2)[:4].transpose(0, 3, 1, 2) / 255.0
    assert np.allclose(batch["images"].numpy(), expected, atol=1e-6)
    assert batch["labels"].tolist() == labels[:4].tolist()
    assert torch.equal(dataset[3]["images"], batch["images"][3])
    doubled = CorruptedImages(images, labels, lambda some: torch.from_numpy(some.transpose(0, 3, 1, 2) * 2.0))
    assert np.array_equal(doubled[1]["images"].numpy(), images[1].transpose(2, 0, 1) * 2.0)


@pytest.mark.parametrize(
    "scenes",
    [DigitScenes("test"), ClutteredDigits("test", canvas=32, channels=3), TexturedShapes("test", size=32)],
    ids=["digits", "cluttered", "shapes"],
)
def test_clean_images_of_scenes_prepare_to_the_items_themselves(scenes, monkeypatch):
    monkeypatch.setattr(corrupted_images, "_CHUNK_IMAGES", 2)
    images, labels = clean_images(scenes, 5)
    items = [scenes[index] for index in range(5)]
    assert np.array_equal(images, [scenes.raw(index) for index in range(5)])
    assert np.array_equal(labels, torch.stack([item["labels"] for item in items]).numpy())
    dataset = CorruptedImages(images, labels, preparation_of(scenes))
    # Half a grey level is lost.
    tolerance = 0.51 / 255 / scenes.standard_deviation
    for index, item in enumerate(items):
        assert torch.allclose(dataset[index]["images"], item["images"], rtol=0, atol=tolerance)
        assert torch.equal(dataset[index]["labels"], item["labels"])


def test_labels_cannot_be_changed_through_the_set(clean, tmp_path):
    images, labels = clean
    corrupted = GeneratedCorruptions(images, labels, folder=tmp_path)
    labels[0] += 1
    assert corrupted.labels[0] == labels[0] - 1
    with pytest.raises(ValueError, match="read-only"):
        corrupted.labels[0] = 0


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda images, labels: GeneratedCorruptions(images, labels[:-1]), r"\(6,\)"),
        (lambda images, labels: GeneratedCorruptions(images, labels / 2), "integers"),
        (lambda images, labels: GeneratedCorruptions(images[:0], labels[:0]), "no images"),
        (lambda images, labels: GeneratedCorruptions(images / 255, labels), "uint8"),
        (lambda images, labels: GeneratedCorruptions(images, labels, constants="x"), "constants"),
        (lambda images, labels: GeneratedCorruptions(images, labels).images("mist", 1), "unknown corruption"),
        (lambda images, labels: GeneratedCorruptions(images, labels).images("fog", 6), "1 to 5"),
        (lambda images, labels: clean_images([1, 2]), "list gives no images"),
        (lambda images, labels: clean_images(DigitScenes("test"), 0), "limit"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(clean, make, match):
    with pytest.raises(InputError, match=match):
        make(*clean)
