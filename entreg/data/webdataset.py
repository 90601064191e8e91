"""Images in WebDataset shards: tar files in which an image and its label lie side by side, read in place.

A tar file stores its members as they are, so that an image is found by its offset: after one look at all headers
(kept in the cache) any image is read at once, in any order, and nothing is unpacked. A run is then resumed at an exact
position, which a stream of shards with a shuffle buffer cannot offer.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from entreg.data.image_sources import ImageSource, decode
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
    return sorted(path for path in root.glob("*.tar") if re.search(rf"(^|[-_.]){part}", path.name))


def shard_index(shards: Sequence[Path]) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Where the images of shards are, their names and labels, in the order of the files.

    Args:
        shards: sorted, at least one, as :func:`find_shards` gives them.

    Returns:
        places (n, 3) int64, see :class:`ShardImages`; names; labels (n,) int64.

    Raises:
        AssetError: a shard is missing, damaged or truncated, or holds something else than ``<name>.jpg`` (or jpeg,
            png, webp, ppm) with ``<name>.cls``, the number of the class.
    """
    require_all_parts([path.name for path in shards], shards[0].parent)
    stats = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in shards]
    index = cached_index([str(shards[0].parent.resolve()), stats], lambda: _read_headers(shards))
    return index["places"], index["names"].tolist(), index["labels"]


def _read_headers(shards: Sequence[Path]) -> dict[str, np.ndarray]:
    places: list[tuple[int, int, int]] = []
    names: list[str] = []
    labels: list[int] = []
    for number, path in enumerate(shards):
        images: dict[str, tuple[int, int, int]] = {}
        classes: dict[str, int] = {}
        size = path.stat().st_size
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    if member.offset_data + member.size > size:
                        raise EOFError(f"{member.name} goes beyond its end")
                    # A sample's name ends at the first dot of the file's own name, by WebDataset's rule.
                    folder, _, name = member.name.rpartition("/")
                    name, _, ending = name.partition(".")
                    key = f"{folder}/{name}" if folder else name
                    if ending.lower() in _IMAGES:
                        images[key] = (number, member.offset_data, member.size)
                    elif ending == _LABEL:
                        classes[key] = int(archive.extractfile(member).read())
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            raise AssetError(f"{path} is damaged or no tar of images ({first_line(error)}); fetch it again") from error
        lonely = sorted(images.keys() ^ classes.keys())
        if lonely or not images:
            what = f"{lonely[0]} has no {_LABEL if lonely[0] in images else 'image'}" if lonely else "there is no image"
            raise AssetError(f"{path} is no shard of images, each <name>.jpg with its class in <name>.cls: {what}")
        places += images.values()
        names += images
        labels += [classes[key] for key in images]
    return {"places": np.array(places), "names": np.array(names), "labels": np.array(labels, dtype=np.int64)}
