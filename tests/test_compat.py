"""The bridge to torchvision, in a fresh interpreter where import order can be controlled."""

import subprocess
import sys

import torch

from entreg.compat import ensure_torchvision


def fresh(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_timm_imports_after_it_whatever_the_state_of_the_compiled_operators():
    code = (
        "from entreg.compat import ensure_torchvision as ensure; first = ensure(); assert ensure() == first; "
        "import torchvision; from timm.models.vision_transformer import Block; assert ensure() == first; "
        "print(first != torchvision.extension._has_ops())"
    )
    # Schemas are declared exactly where the compiled operators do not load.
    assert fresh(code) == "True"


def test_it_declares_nothing_without_torchvision(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr("entreg.compat._declared", [])
    before = hasattr(torch.ops.torchvision, "nms")
    assert ensure_torchvision() is False
    assert hasattr(torch.ops.torchvision, "nms") == before


def test_it_leaves_an_imported_torchvision_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", object())
    monkeypatch.setattr("entreg.compat._declared", [])
    assert ensure_torchvision() is False
