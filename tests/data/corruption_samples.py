"""Images for the tests of corruptions."""

import numpy as np

REFERENCE_SEED = 7
REFERENCE_STRIDE = 3


def reference_image() -> np.ndarray:
    """(64, 72, 3) uint8: waves and edges in all colours, with black, white and grey areas."""
    rows, columns = np.mgrid[:64, :72].astype(np.float64)
    waves = [np.sin(rows / 5 + channel) * np.cos(columns / (6 + channel)) for channel in range(3)]
    image = np.uint8(np.stack(waves, axis=-1) * 110 + 128)
    image[8:20, 10:30] = 255
    image[30:44, 40:60] = 0
    image[46:60, 8:24] = (200, 40, 40)
    image[46:60, 24:36] = 90
    return image
