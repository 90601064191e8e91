"""Bridges over known gaps between released versions of our dependencies."""

from __future__ import annotations

import sys
from pathlib import Path

# That of the module typing, which ``import entreg`` would have to load for it.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    import torch

# torchvision registers shape functions for these two operators at import, even where its compiled library (which
# declares them) does not load because it was built for another flavour of torch. The import then fails.
_DETECTION_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
# A torch.library.Library withdraws its declarations when it is garbage-collected.
_declared: list[torch.library.Library] = []


def bridge_torchvision() -> bool:
    """Make a later ``import torchvision`` (and with it timm and transformers) work without its compiled operators.

    ``import entreg`` calls it. It imports nothing: an import hook waits for torchvision, does then what
    :func:`ensure_torchvision` does, and leaves. Searches that do not import, and all other modules, are not touched.

    Returns:
        Whether a hook waits; False when torchvision is imported already.
    """
    if "torchvision" in sys.modules:
        return False
    if not any(isinstance(finder, _TorchvisionFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TorchvisionFinder())
    return True


def ensure_torchvision() -> bool:
    """Declare at once what ``import torchvision`` needs, where its compiled operators do not load.

    Where they load, or torchvision is already imported or not installed, it changes nothing. Calling a declared
    operator still fails, and nothing in this project calls one.

    Returns:
        Whether schemas were declared, by this call or an earlier one.
    """
    if _declared or "torchvision" in sys.modules:
        return bool(_declared)
    from importlib.util import find_spec

    specification = find_spec("torchvision")
    if specification is not None and specification.origin is not None:
        _declare_missing_operators(specification.origin)
    return bool(_declared)


class _TorchvisionFinder:
    """Finds torchvision as the finders after it do, and declares its operators just before its code runs."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchvision" or self not in sys.meta_path:
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        found = (finder.find_spec(fullname, path, target) for finder in others if hasattr(finder, "find_spec"))
        specification = next((one for one in found if one is not None), None)
        if specification is not None and specification.origin is not None and specification.loader is not None:
            self._watch(specification)
        return specification

    def _watch(self, specification: ModuleSpec) -> None:
        # Every search makes a loader of its own, so that what is put on this one is gone when it is done.
        loader = specification.loader
        origin = specification.origin

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            if not _declared:
                _declare_missing_operators(origin)
            loader.exec_module(module)

        loader.exec_module = exec_module


def _declare_missing_operators(package_file: str) -> None:
    if _compiled_operators_load(package_file):
        return
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _DETECTION_SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _declared.append(library)


def _compiled_operators_load(package_file: str) -> bool:
    import torch

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
