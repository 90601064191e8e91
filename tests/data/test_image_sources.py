"""CIFAR-100 and SVHN: miniature official files, read as torchvision reads them, and every way they can be wrong."""

import hashlib
import pickle

import numpy as np
import pytest
from torchvision.datasets import CIFAR100, SVHN

from entreg.data.image_sources import cifar100, svhn
from entreg.errors import AssetError, ConfigError
from tests.data.official_layouts import cifar100_batch, random_pixels, write_cifar100, write_svhn

LABELS = np.array([3, 99, 0, 50, 7, 7])


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar_root(tmp_path):
    write_cifar100(tmp_path, (random_pixels(6), LABELS), (random_pixels(4, 1), LABELS[:4]))
    return tmp_path


@pytest.mark.parametrize("part", ["train", "test"])
def test_cifar100_is_what_was_written_and_what_torchvision_reads(cifar_root, part, monkeypatch):
    source = cifar100(str(cifar_root), part, download=False)
    pixels = random_pixels(6) if part == "train" else random_pixels(4, 1)
    assert source.labels.tolist() == LABELS[: len(pixels)].tolist()
    assert source.num_classes == 100
    folder = cifar_root / "cifar-100-python"
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5(folder / "train")]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5(folder / "test")]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": md5(folder / "meta")})
    peer = CIFAR100(cifar_root, train=part == "train")
    assert len(source) == len(peer) == len(pixels)
    for index, (image, label) in enumerate(peer):
        assert np.array_equal(np.asarray(source.image(index)), pixels[index])
        assert np.array_equal(np.asarray(source.image(index)), np.asarray(image))
        assert source.labels[index] == label


@pytest.mark.parametrize("part", ["train", "test"])
def test_svhn_is_what_was_written_and_what_torchvision_reads(tmp_path, part, monkeypatch):
    pixels, labels = random_pixels(5), np.array([0, 1, 9, 0, 4])
    path = write_svhn(tmp_path, part, pixels, labels)
    source = svhn(str(tmp_path), part, download=False)
    monkeypatch.setattr(SVHN, "split_list", {part: ["", path.name, md5(path)]})
    peer = SVHN(tmp_path, part)
    assert source.labels.tolist() == labels.tolist() == [label for _, label in peer]
    for index, (image, _) in enumerate(peer):
        assert np.array_equal(np.asarray(source.image(index)), pixels[index])
        assert np.array_equal(np.asarray(source.image(index)), np.asarray(image))


def test_single_image_of_svhn_keeps_its_shape(tmp_path):
    write_svhn(tmp_path, "test", random_pixels(1), np.array([5]))
    source = svhn(str(tmp_path), "test", download=False)
    assert (len(source), source.image(0).size, source.labels.tolist()) == (1, (32, 32), [5])


@pytest.mark.parametrize("keep", [0, 10, 200, -1])
@pytest.mark.parametrize("which", ["cifar100", "svhn"])
def test_truncated_file_is_named(tmp_path, which, keep):
    if which == "cifar100":
        path = write_cifar100(tmp_path, (random_pixels(6), LABELS), (random_pixels(4), LABELS[:4])) / "train"
        read = cifar100
    else:
        path, read = write_svhn(tmp_path, "train", random_pixels(6), LABELS % 10), svhn
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AssetError, match=rf"{path} is no readable .* fetch it again"):
        read(str(tmp_path), "train", download=False)


def test_pickle_that_would_run_code_is_refused_and_not_run(cifar_root, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (cifar_root / "cifar-100-python" / "test").write_bytes(pickle.dumps({"data": Evil(), "fine_labels": []}))
    with pytest.raises(AssetError, match="no readable batch of CIFAR-100"):
        cifar100(str(cifar_root), "test", download=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("pixels", "labels", "sentence"),
    [
        (random_pixels(4), [1, 2, 3], "holds 4 images but 3 labels"),
        (random_pixels(2), [1, 100], r"holds labels outside \[0, 100\)"),
        (random_pixels(2), [-1, 0], r"holds labels outside \[0, 100\)"),
        (random_pixels(2).astype(np.int16), [0, 1], r"holds int16 images of shape \(32, 32, 3\) instead of uint8"),
        (random_pixels(0), [], "holds 0 images but 0 labels"),
    ],
)
def test_wrong_content_of_cifar100_is_one_sentence(cifar_root, pixels, labels, sentence):
    (cifar_root / "cifar-100-python" / "test").write_bytes(cifar100_batch(pixels, labels))
    with pytest.raises(AssetError, match=sentence):
        cifar100(str(cifar_root), "test", download=False)


def test_file_with_the_official_number_of_images_must_be_the_official_file(cifar_root, tmp_path):
    labels = np.arange(10_000) % 100
    (cifar_root / "cifar-100-python" / "test").write_bytes(cifar100_batch(np.zeros((10_000, 32, 32, 3), "u1"), labels))
    with pytest.raises(AssetError, match=r"test is damaged: it is not the official file .*f0ef6b0ae62326f3e7ff"):
        cifar100(str(cifar_root), "test", download=False)


@pytest.mark.parametrize(("read", "name"), [(cifar100, "cifar-100-python/train"), (svhn, "train_32x32.mat")])
def test_missing_files_say_where_to_get_them(tmp_path, read, name):
    with pytest.raises(ConfigError, match=r"data\.root is not set: .* get it from https?://.*data\.download=true"):
        read(None, "train", download=False)
    with pytest.raises(AssetError, match=rf"there is no .* file {tmp_path / name}; get it from https?://"):
        read(str(tmp_path), "train", download=False)


def test_download_goes_through_torchvision_and_its_failure_is_one_sentence(tmp_path, monkeypatch):
    def fetched(self):
        write_cifar100(tmp_path, (random_pixels(6), LABELS), (random_pixels(4, 1), LABELS[:4]))

    monkeypatch.setattr(CIFAR100, "download", fetched)
    monkeypatch.setattr(CIFAR100, "__init__", lambda self, root, download: self.download())
    assert len(cifar100(str(tmp_path), "train", download=True)) == 6

    def failing(self, root, part, download):
        raise OSError("no route to host")

    monkeypatch.setattr(SVHN, "__init__", failing)
    with pytest.raises(AssetError, match=r"SVHN cannot be fetched \(no route to host\); get it from http"):
        svhn(str(tmp_path), "train", download=True)
