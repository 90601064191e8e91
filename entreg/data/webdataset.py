"""Images in WebDataset shards: tar files in which an image and its label lie side by side, read in place.

A tar file stores its members as they are, so that an image is found by its offset: after one look at all headers
(kept in the cache) any image is read at once, in any order, and nothing is unpacked. A run is then resumed at an exact
position, which a stream of shards with a shuffle buffer cannot offer.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from entreg.data.image_sources import ImageSource, decode, say_unread
from entreg.data.streaming import cached_index, require_all_parts
from entreg.errors import AssetError, first_line

_IMAGES = ("jpg", "jpeg", "png", "webp", "ppm")
_LABEL = "cls"


class ShardImages(ImageSource):
    """Encoded images in tar files; other arguments as in :class:`ImageSource`.

    Args:
        shards: the files.
        places: (n, 3) int64: number of the shard, offset in it and length in bytes of each image.
    """

    def __init__(self, shards: Sequence[Path], places: np.ndarray, **source: Any) -> None:
        super().__init__(**source)
        self._shards, self._places = shards, places

    def image(self, index: int) -> Image.Image:
        number, offset, length = (int(value) for value in self._places[index])
        path = self._shards[number]

        def opened() -> Image.Image:
            with path.open("rb") as file:
                file.seek(offset)
                return Image.open(io.BytesIO(file.read(length)))

        return decode(opened, f"{self.names[index]} in {path}")


def find_shards(root: Path, part: str) -> list[Path]:
    """The shards of ``train`` or ``val`` in a folder, by their names, such as ``imagenet1k-train-0000.tar``."""
    return sorted(
        path for path in root.iterdir() if path.suffix.lower() == ".tar" and re.search(rf"(^|[-_.]){part}", path.name)
    )


def shard_index(shards: Sequence[Path]) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Where the images of shards are, their names and labels, in the order of the files.

    A sample is an image and a label whose names differ by their endings only, which may be in capital letters. So
    ``a.1.jpg`` with ``a.1.cls`` is one, and ``a.2.jpg`` with ``a.2.cls`` another. (By WebDataset's own rule a sample's
    name ends at the first dot: all four are then fields of one sample ``a``, with nothing called ``jpg`` or ``cls``.)
    What is left goes by WebDataset's rule: ``b.input.jpg`` with ``b.cls`` is the sample ``b``, and ``b.mask.png``
    beside ``b.jpg`` and ``b.cls`` is a further field of that sample, which is not read. How many files belong to no
    sample at all is said in one line on standard error.

    Args:
        shards: sorted, at least one, as :func:`find_shards` gives them.

    Returns:
        places (n, 3) int64, see :class:`ShardImages`; names; labels (n,) int64.

    Raises:
        AssetError: a shard is missing, damaged or truncated, holds an image without a label or a label without an
            image, or leaves open which image is meant. Images are jpg, jpeg, png, webp or ppm; a label is the number of
            the class in a file ``cls``.
    """
    require_all_parts([path.name for path in shards], shards[0].parent)
    stats = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in shards]
    # The word tells this index from those of earlier versions, which lacked names with dots.
    index = cached_index([str(shards[0].parent.resolve()), "dots", stats], lambda: _read_headers(shards))
    say_unread(index["unread"].tolist(), f"the shards in {shards[0].parent}", "they belong to no sample")
    return index["places"], index["names"].tolist(), index["labels"]


@dataclass
class _Members:
    """The images and labels of the shard ``path`` by their names without ending, and the names of the other files."""

    path: Path
    images: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo, number: int) -> None:
        """Take in one file of the shard with this number."""
        folder, slash, file = member.name.rpartition("/")
        stem, dot, ending = file.rpartition(".")
        name, ending = folder + slash + stem, ending.lower()
        if not dot or file.startswith(".") or ending not in (*_IMAGES, _LABEL):
            self.others.append(member.name)
            return
        known = self.classes if ending == _LABEL else self.images
        if name in known:
            what = "labels" if ending == _LABEL else "images"
            raise self.error(f"{name} has two {what}, the second is {member.name}")
        if ending == _LABEL:
            self.classes[name] = int(archive.extractfile(member).read())
        else:
            self.images[name] = (number, member.offset_data, member.size)

    def samples(self) -> tuple[list[tuple[int, int, int]], list[str], list[int], list[str]]:
        """Places, names and labels in the order of the images, and the files that belong to no sample."""
        label_of = {name: name for name in self.images if name in self.classes}
        images = _by_key(name for name in self.images if name not in label_of)
        labels = _by_key(name for name in self.classes if name not in label_of)
        for key in sorted({*images, *labels}):
            if key in label_of:
                # Further fields of a sample.
                continue
            ours, theirs = images.get(key, []), labels.get(key, [])
            if not ours or not theirs:
                raise self.error(f"{(ours or theirs)[0]} has no {'image' if theirs else _LABEL}")
            if len(ours) > 1 or len(theirs) > 1:
                raise self.error(f"{key} has {len(ours)} images for {len(theirs)} {_LABEL}, the first is {ours[0]}")
            label_of[ours[0]] = theirs[0]
        if not label_of:
            raise self.error("there is no image")
        chosen = [name for name in self.images if name in label_of]
        keys = {_key(name) for name in chosen}
        return (
            [self.images[name] for name in chosen],
            [name if name == label_of[name] else _key(name) for name in chosen],
            [self.classes[label_of[name]] for name in chosen],
            [file for file in self.others if _key(file) not in keys],
        )

    def error(self, what: str) -> AssetError:
        """What is wrong with the shard."""
        return AssetError(
            f"{self.path} is no shard of images, each <name>.jpg with its class in <name>.{_LABEL}: {what}"
        )


def _key(name: str) -> str:
    """A file's name up to the first dot after the last slash, which by WebDataset's rule is the name of its sample."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _by_key(names: Iterable[str]) -> dict[str, list[str]]:
    keys: dict[str, list[str]] = {}
    for name in names:
        keys.setdefault(_key(name), []).append(name)
    return keys


def _read_headers(shards: Sequence[Path]) -> dict[str, np.ndarray]:
    places: list[tuple[int, int, int]] = []
    names: list[str] = []
    labels: list[int] = []
    unread: list[str] = []
    for number, path in enumerate(shards):
        members = _Members(path)
        size = path.stat().st_size
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    if member.offset_data + member.size > size:
                        raise EOFError(f"{member.name} goes beyond its end")
                    members.add(archive, member, number)
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            raise AssetError(f"{path} is damaged or no tar of images ({first_line(error)}); fetch it again") from error
        for total, part in zip((places, names, labels, unread), members.samples(), strict=True):
            total += part
    return {
        "places": np.array(places),
        "names": np.array(names),
        "labels": np.array(labels, dtype=np.int64),
        "unread": np.array(unread, dtype=np.str_),
    }
