"""The published files of CIFAR-10-C and CIFAR-100-C, memory-mapped."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from entreg.data.corrupted_images import CorruptedSet, require_labels
from entreg.data.corruptions import ALL_CORRUPTIONS, CORRUPTIONS, SEVERITIES
from entreg.errors import AssetError

DOWNLOAD = "CIFAR-100-C is at https://zenodo.org/records/3555552, CIFAR-10-C at https://zenodo.org/records/2535967"
"""Where the files are, as messages say it."""


class OfficialCorruptions(CorruptedSet):
    """The published files of CIFAR-10-C or CIFAR-100-C, memory-mapped.

    The folder holds ``labels.npy`` and one ``<corruption>.npy`` (5 n, h, w, 3) uint8 for each of the 15 corruptions, of
    which rows (s - 1) n to s n are severity s; the four extra corruptions may be missing. All files are looked at when
    the set is opened, their pixels only when they are used.

    Args:
        folder: with the files.
        num_classes: labels must be below it.
        images_per_severity: n, 10,000 in the published files; None: a fifth of the rows that most files have.
        shape: of an image.

    Raises:
        AssetError: the folder or a file is missing, truncated, or has other rows, shapes, types or labels.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        num_classes: int = 100,
        images_per_severity: int | None = None,
        shape: tuple[int, int, int] = (32, 32, 3),
    ) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise AssetError(
                f"there is no folder {self.folder} with the corrupted images (it belongs into the folder that CIFAR= "
                f"of make or data.root= names); {DOWNLOAD}"
            )
        present = {name for name in ALL_CORRUPTIONS if (self.folder / f"{name}.npy").is_file()}
        missing = [f"{name}.npy" for name in CORRUPTIONS if name not in present]
        if not (self.folder / "labels.npy").is_file():
            missing.insert(0, "labels.npy")
        if missing:
            raise AssetError(f"{self.folder} lacks {', '.join(missing)}; {DOWNLOAD}")
        self.corruptions = tuple(name for name in ALL_CORRUPTIONS if name in present)
        files = {name: _open(self.folder / f"{name}.npy") for name in self.corruptions}
        rows = _common_rows(files) if images_per_severity is None else len(SEVERITIES) * images_per_severity
        for name, array in files.items():
            _require(array, "uint8", (rows, *shape), self.folder / f"{name}.npy")
        self._files = files
        self.labels = self._read_labels(rows, num_classes)

    def images(self, corruption: str, severity: int) -> np.ndarray:
        self._require(corruption, severity)
        return self._files[corruption][(severity - 1) * len(self) : severity * len(self)]

    def describe(self) -> dict[str, Any]:
        """Also a revision: a fingerprint of the labels and of the first and last image of every file."""
        digest = hashlib.sha256(np.ascontiguousarray(self.labels))
        for name, rows in self._files.items():
            digest.update(name.encode() + rows[0].tobytes() + rows[-1].tobytes())
        return {
            "source": "official files",
            "revision": digest.hexdigest(),
            "images": len(self),
            "corruptions": list(self.corruptions),
        }

    def _read_labels(self, rows: int, num_classes: int) -> np.ndarray:
        path = self.folder / "labels.npy"
        labels = _open(path)
        _require(labels, "integers", (rows,), path)
        blocks = np.asarray(labels, dtype=np.int64).reshape(len(SEVERITIES), -1)
        if blocks.min() < 0 or blocks.max() >= num_classes:
            raise AssetError(f"{path} holds labels from {blocks.min()} to {blocks.max()}, not below {num_classes}")
        if (blocks != blocks[0]).any():
            raise AssetError(f"{path} must repeat the same {blocks.shape[1]} labels for each of the 5 severities")
        return require_labels(blocks[0], blocks.shape[1])


def _open(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise AssetError(f"{path} is truncated or no array file; fetch it again ({DOWNLOAD})") from error


def _common_rows(files: Mapping[str, np.ndarray]) -> int:
    """The rows that most files have, at least one for each severity: the others are wrong."""
    counts = Counter(array.shape[0] for array in files.values() if array.ndim and array.shape[0])
    rows = counts.most_common(1)[0][0] if counts else 0
    return max(1, rows // len(SEVERITIES)) * len(SEVERITIES)


def _require(array: np.ndarray, content: str, shape: tuple[int, ...], path: Path) -> None:
    fits = array.dtype == np.uint8 if content == "uint8" else array.dtype.kind in "iu"
    if not fits or array.shape != shape:
        raise AssetError(
            f"{path} must hold {content} of shape {shape}, the rows one for each image and severity; it has "
            f"{array.dtype} of shape {array.shape}"
        )
