"""Bridges over known gaps between released versions of our dependencies."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

# torchvision registers shape functions for these two operators at import, even where its compiled library (which
# declares them) does not load because it was built for another flavour of torch. The import then fails.
_DETECTION_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# A torch.library.Library withdraws its declarations when it is garbage-collected.
_declared: list[torch.library.Library] = []


def ensure_torchvision() -> bool:
    """Make ``import torchvision`` (and with it ``import timm``) work without torchvision's compiled operators.

    Call it before the first import of torchvision or timm. Where the compiled operators load, or torchvision is
    already imported or not installed, it changes nothing. Otherwise it declares the schemas that the import needs;
    calling such an operator still fails, and nothing in this project calls one.

    Returns:
        Whether schemas were declared, by this call or an earlier one.
    """
    if _declared or "torchvision" in sys.modules:
        return bool(_declared)
    specification = importlib.util.find_spec("torchvision")
    if specification is None or specification.origin is None or _compiled_operators_load(specification.origin):
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _DETECTION_SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _declared.append(library)
    return True


def _compiled_operators_load(package_file: str) -> bool:
    # Loading the library twice is harmless, and is the only test that agrees with what torchvision itself finds.
    for path in sorted(Path(package_file).parent.glob("_C*")):
        if path.suffix not in (".so", ".pyd", ".dylib"):
            continue
        try:
            torch.ops.load_library(str(path))
        except (ImportError, OSError):
            continue
        return True
    return False
