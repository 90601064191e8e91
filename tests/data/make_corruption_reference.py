"""Writes ``corruption_reference.npz``: what two published libraries make of one image with ImageNet-C's constants.

Not a test. Run by hand, from the root of the repository, with ``corrupt-tta==0.1.7``, ``imagecorruptions-imaug==1.1.5``
and ``scikit-image==0.26.0`` importable (they need opencv-python, which cannot live beside opencv-python-headless, and
are therefore no dependencies): ``python -m tests.data.make_corruption_reference``. Each corruption is taken from the
library that follows the published script; where both deviate, the deviating part is replaced and the comment says so.
"""

from pathlib import Path
from unittest import mock

import corrupt_tta.corruptions as tta
import imagecorruptions.corruptions as imaug
import numpy as np
from PIL import Image

from tests.data.corruption_samples import REFERENCE_SEED, REFERENCE_STRIDE, reference_image

FROM_IMAUG = (
    *("gaussian_noise", "shot_noise", "speckle_noise", "gaussian_blur", "defocus_blur", "fog"),
    *("spatter", "contrast", "brightness", "saturate", "jpeg_compression"),
)


def flake_blur(layer: np.ndarray, radius: int, sigma: float, angle: float) -> np.ndarray:
    """The published script hands ImageMagick an image of bytes and gets one back."""
    levels = np.uint8(np.clip(layer[..., 0], 0, 1) * 255)
    return np.rint(imaug._motion_blur(levels, radius, sigma, angle)) / 255


def corrupted(name: str, severity: int) -> np.ndarray:
    image = reference_image()
    np.random.seed(REFERENCE_SEED)  # noqa: NPY002 - the libraries draw from the global generator
    if name == "impulse_noise":
        return imaug.impulse_noise(image, severity, seed=REFERENCE_SEED)
    if name == "glass_blur":
        # Uncompiled, it draws from numpy's generator instead of Numba's own.
        shuffle = imaug._shuffle_pixels_njit_glass_blur.py_func
        with mock.patch.object(imaug, "_shuffle_pixels_njit_glass_blur", shuffle):
            return imaug.glass_blur(image, severity, seed=REFERENCE_SEED)
    if name == "motion_blur":
        # ImageMagick rounds.
        return np.rint(imaug.motion_blur(image, severity))
    if name == "snow":
        # Its own motion blur is an unweighted line; the other library's follows ImageMagick.
        with mock.patch.object(tta, "cv2_motion_blur", flake_blur):
            return tta.snow(image, severity)
    if name == "frost":
        # It draws from six photographs and one place more than the published script.
        state = np.random.RandomState(REFERENCE_SEED)
        draws = lambda low, high: 1 + state.randint(5) if low else state.randint(low, high - 1)  # noqa: E731
        with mock.patch.object(np.random, "randint", draws):
            return tta.frost(image, severity)
    library = imaug if name in FROM_IMAUG else tta
    return getattr(library, name)(Image.fromarray(image), severity)


def main() -> None:
    names = (
        *FROM_IMAUG,
        *("impulse_noise", "glass_blur", "motion_blur", "snow", "frost", "zoom_blur", "pixelate", "elastic_transform"),
    )
    arrays = {
        name: np.stack(
            [np.uint8(corrupted(name, severity))[::REFERENCE_STRIDE, ::REFERENCE_STRIDE] for severity in range(1, 6)]
        )
        for name in names
    }
    np.savez_compressed(Path(__file__).parent / "corruption_reference.npz", **arrays)


if __name__ == "__main__":
    main()
