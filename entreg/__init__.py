"""Entropy regularisation, entropy-adaptive algorithms, and the reproduction of arXiv 2509.03733."""

from pathlib import Path

from entreg.compat import bridge_torchvision
from entreg.kernel_cache import drop_stale_kernels

__version__ = "0.1.0"

# Before any module that holds Numba kernels is imported.
drop_stale_kernels(Path(__file__).parent)
# Before anything imports torchvision, timm or transformers.
bridge_torchvision()
