"""CIFAR-100 and SVHN: miniature official files, read as torchvision reads them, and every way they can be wrong."""

import hashlib
import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR100, SVHN

from entreg.data.image_sources import cifar100, decode, svhn
from entreg.data.imagenet import imagenet
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


def png16(values):
    """A PNG of 16 bits, (h, w, channels) with 1, 2, 3 or 4 channels, which Pillow writes with 1 only."""
    height, width, channels = values.shape
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    end = chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + end


DEEP = np.array([[0, 100, 255, 256, 4660, 32768, 65535]], dtype=np.uint16)
EIGHT = [0, 0, 0, 1, 18, 128, 255]


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_are_scaled_by_their_range(channels, tmp_path):
    """Grey and colours alike: of colours Pillow itself keeps the upper 8 bits."""
    content = png16(np.repeat(DEEP[..., None], channels, -1))
    image = decode(lambda: Image.open(io.BytesIO(content)), "it")
    assert image.mode == "RGB"
    assert np.asarray(image)[0].tolist() == [[value] * 3 for value in EIGHT]
    # Every reader of files goes by it.
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "x.png").write_bytes(content)
    (source,) = [imagenet(tmp_path, "train", num_classes=1, subset=False)]
    assert np.asarray(source.image(0))[0, :, 0].tolist() == EIGHT


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (saved(Image.fromarray(DEEP), "TIFF"), EIGHT),
        (saved(Image.fromarray(DEEP.astype(">u2")), "TIFF"), EIGHT),
        (saved(Image.fromarray(DEEP), "PPM"), EIGHT),
        (b"P5 3 1 1023\n" + np.array([0, 512, 1023], ">u2").tobytes(), [0, 128, 255]),
        (b"P5 3 1 255\n" + bytes([0, 100, 255]), [0, 100, 255]),
        (saved(Image.fromarray(np.array([[0, 1, 1]], bool)), "PNG"), [0, 255, 255]),
        (saved(Image.fromarray(np.array([[0, 9, 255]], np.uint8)).convert("P"), "PNG"), [0, 9, 255]),
        (saved(Image.fromarray(np.array([[0, 9, 255]], np.uint8)).convert("LA"), "PNG"), [0, 9, 255]),
        (saved(Image.fromarray(np.array([[0, 9, 255]], np.uint8)).convert("RGBA"), "PNG"), [0, 9, 255]),
        (saved(Image.fromarray(np.array([[0, 9, 255]], np.uint8)).convert("RGB").convert("CMYK"), "TIFF"), [0, 9, 255]),
    ],
    ids=[
        "tiff",
        "tiff of big ends",
        "pgm",
        "pgm of 10 bits",
        "pgm of 8 bits",
        "1 bit",
        "palette",
        "LA",
        "RGBA",
        "CMYK",
    ],
)
def test_images_of_every_depth_become_eight_bits(content, wanted):
    image = decode(lambda: Image.open(io.BytesIO(content)), "it")
    assert np.asarray(image)[0].tolist() == [[value] * 3 for value in wanted]


def test_twelve_bits_of_a_tiff_are_scaled_by_their_range():
    # One line of two values, 0x800 and 0xFFF, packed.
    entries = [(256, 3, 2), (257, 3, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 3, 1)]
    entries += [(279, 4, 3)]
    table = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    content = b"II*\0" + struct.pack("<I", 12) + bytes([0x80, 0x0F, 0xFF, 0])
    content += struct.pack("<H", len(entries)) + table + bytes(4)
    image = decode(lambda: Image.open(io.BytesIO(content)), "it")
    assert np.asarray(image)[0, :, 0].tolist() == [0x80, 0xFF]


@pytest.mark.parametrize(("dtype", "what"), [(np.int32, "integers of 32 bits"), (np.float32, "floating-point numbers")])
def test_values_without_a_known_range_are_refused(dtype, what):
    content = saved(Image.fromarray(DEEP.astype(dtype)), "TIFF")
    with pytest.raises(AssetError, match=f"it holds {what}, whose range is not known; store it with 8 or 16 bits"):
        decode(lambda: Image.open(io.BytesIO(content)), "it")
