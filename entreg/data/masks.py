"""Semantic masks in a folder of PNG files, brought to the model's image by the same crop as the image.

Masks as in ImageNet-S (Gao et al., 2022): an RGB image whose class is red + 256 * green, 0 for everything else and 1000
for pixels to be ignored; or one channel that is 0 outside the object. Files lie in one folder per class or all in one,
and are found by the image's name. What share of a patch an object must cover to count is decided where patches are
compared, by :func:`entreg.experiments.vision.localisation.patch_masks`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from entreg.data.image_sources import decode
from entreg.errors import AssetError

IGNORED = 1000
"""Class of the pixels that ImageNet-S does not judge; here they count as outside the object."""


class MaskFolder:
    """Masks by the name of their image.

    Args:
        root: folder of ``<class>/<image>.png`` or ``<image>.png``, or the one of ImageNet-S with its
            ``validation-segmentation``.
        transform: from an RGB image to integers (3, height, width) without mixing values; see
            :func:`entreg.data.vision_sets.mask_transform`.
        size: (height, width) of its result.

    Raises:
        AssetError: the folder is missing or holds no PNG files.
    """

    def __init__(self, root: str | Path, transform: Callable[[Image.Image], Tensor], size: tuple[int, int]) -> None:
        root = Path(root).expanduser()
        if not root.is_dir():
            raise AssetError(
                f"there is no folder {root} with masks; get ImageNet-S from https://github.com/LUSSeg/ImageNet-S, or "
                "set data.masks=null"
            )
        if (root / "validation-segmentation").is_dir():
            root = root / "validation-segmentation"
        self._transform = transform
        self._size = size
        files = sorted(root.rglob("*.png"))
        if not files:
            raise AssetError(f"{root} holds no PNG files; data.masks must be a folder of masks")
        self._files = {f"{path.parent.name}/{path.stem}": path for path in files}
        # A name that several classes share identifies no image.
        single = {stem for stem, count in Counter(path.stem for path in files).items() if count == 1}
        self._files |= {path.stem: path for path in files if path.stem in single}

    def path(self, name: str) -> Path | None:
        """The mask's file of the image ``name``, ``class/image`` or ``image``, or None.

        Images of the Hugging Face copy of ImageNet have ``_<class>`` at the end of their names, which masks lack.
        """
        stem = name.rpartition("/")[2]
        for candidate in (name, stem, stem.rpartition("_")[0]):
            if candidate in self._files:
                return self._files[candidate]
        return None

    def mask(self, name: str) -> Tensor:
        """Where the object is, (height, width) bool; all False for an image without a mask.

        Raises:
            AssetError: the file is truncated or no image.
        """
        path = self.path(name)
        if path is None:
            return torch.zeros(self._size, dtype=torch.bool)
        return object_pixels(self._transform(decode(lambda: Image.open(path), str(path))))


def object_pixels(mask: Tensor | np.ndarray) -> Tensor:
    """The object of an ImageNet-S mask: class neither 0 nor :data:`IGNORED`.

    Args:
        mask: (3, height, width) integers, red, green and blue. In a grey mask all are equal, and 257 times its value is
            neither 0 nor 1000 where it is not 0.

    Returns:
        (height, width) bool.
    """
    red, green, _ = torch.as_tensor(mask).long()
    classes = red + 256 * green
    return (classes != 0) & (classes != IGNORED)
