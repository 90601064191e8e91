"""Miniature files in exactly the official layouts of CIFAR-100, CIFAR-100-C, SVHN, ImageNet and ImageNet-S."""

import io
import pickle
import struct
from typing import ClassVar

import numpy as np
from PIL import Image
from scipy.io import savemat

from entreg.data.corruptions import ALL_CORRUPTIONS


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2's cPickle wrote with protocol 2: text and array data as byte strings, numpy's old names."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def __init__(self, file):
        super().__init__(file, protocol=2)

    def save_bytes(self, value):
        self.write(b"T" + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    def save_text(self, value):
        self.save_bytes(value.encode("latin1"))

    def save_global(self, value, name=None):
        if getattr(value, "__module__", "").startswith("numpy._core"):
            self.write(b"cnumpy.core.multiarray\n" + value.__name__.encode() + b"\n")
            self.memoize(value)
        else:
            super().save_global(value, name)

    dispatch[bytes] = save_bytes
    dispatch[str] = save_text
    dispatch[type(np.ones)] = save_global


def random_pixels(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


def python2_pickle(value):
    buffer = io.BytesIO()
    Python2Pickler(buffer).dump(value)
    return buffer.getvalue()


def cifar100_batch(pixels, labels, which="training"):
    """Bytes of ``cifar-100-python/train`` or ``test``: rows of 1024 red, 1024 green and 1024 blue values."""
    return python2_pickle(
        {
            "filenames": [f"image_s_{index:06d}.png" for index in range(len(pixels))],
            "batch_label": f"{which} batch 1 of 1",
            "fine_labels": [int(label) for label in labels],
            "coarse_labels": [int(label) // 5 for label in labels],
            "data": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2).reshape(len(pixels), 3072)),
        }
    )


def write_cifar100(root, train, test):
    """``root/cifar-100-python``; ``train`` and ``test`` are (pixels, labels). Returns that folder."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    (folder / "train").write_bytes(cifar100_batch(*train))
    (folder / "test").write_bytes(cifar100_batch(*test, which="testing"))
    names = {"fine_label_names": [f"fine{i}" for i in range(100)], "coarse_label_names": [f"c{i}" for i in range(20)]}
    (folder / "meta").write_bytes(python2_pickle(names))
    return folder


def write_svhn(root, part, pixels, labels):
    """``root/<part>_32x32.mat``: X (32, 32, 3, n) and y (n, 1) with 10 for the digit 0. Returns the file."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"{part}_32x32.mat"
    digits = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
    savemat(path, {"X": np.ascontiguousarray(pixels.transpose(1, 2, 3, 0)), "y": digits}, do_compression=True)
    return path


def jpeg_bytes(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


def write_image_folder(root, part, synsets, per_class=2, size=(40, 30)):
    """``root/<part>/<synset>/*.JPEG`` with ImageNet's own names; every image has a colour of its own."""
    for number, synset in enumerate(synsets):
        folder = root / part / synset
        folder.mkdir(parents=True)
        for image in range(per_class):
            stem = f"{synset}_{image}" if part == "train" else f"ILSVRC2012_val_{number * per_class + image + 1:08d}"
            pixels = np.full((size[1], size[0], 3), (number * 7 % 256, image * 60, 128), dtype=np.uint8)
            (folder / f"{stem}.JPEG").write_bytes(jpeg_bytes(pixels))


def write_imagenet_s_mask(path, inside, class_number):
    """A mask of ImageNet-S: class as red + 256 * green where ``inside``, a border of ignored pixels (1000) above it."""
    classes = np.where(inside, class_number, 0)
    classes[0] = 1000
    pixels = np.stack([classes % 256, classes // 256, np.zeros_like(classes)], axis=-1).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_corruptions(folder, labels):
    """``folder`` like CIFAR-100-C: for each of the 19 corruptions (5 n, 32, 32, 3) random bytes, and the labels."""
    folder.mkdir(parents=True)
    for seed, corruption in enumerate(ALL_CORRUPTIONS):
        np.save(folder / f"{corruption}.npy", random_pixels(5 * len(labels), seed))
    np.save(folder / "labels.npy", np.tile(labels, 5).astype(np.uint8))
    return folder
