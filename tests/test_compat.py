"""The bridge to torchvision, in fresh interpreters where import order can be controlled."""

import subprocess
import sys

import pytest
import torch

from entreg import compat
from entreg.compat import bridge_torchvision, ensure_torchvision


def fresh(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_entreg_imports_no_library():
    code = (
        "import sys, entreg; heavy = ('torch', 'torchvision', 'numpy', 'numba', 'typing'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    assert fresh(code) == "[]"


def test_torchvision_timm_and_transformers_import_after_any_part_of_the_package():
    # Schemas are declared exactly where the compiled operators do not load, and the hook is gone with its work.
    code = (
        "import importlib.util, pickle, sys; import entreg.errors; from entreg import compat; "
        "found = importlib.util.find_spec('torchvision'); "
        "assert 'torch' not in sys.modules and not compat._declared; "
        "import torchvision; from timm.models.vision_transformer import Block; "
        "from transformers import LlamaForCausalLM; "
        "assert type(found.loader) is type(torchvision.__loader__); pickle.dumps(torchvision.__loader__); "
        "assert not any(type(one).__module__ == 'entreg.compat' for one in sys.meta_path); "
        "print(bool(compat._declared) != torchvision.extension._has_ops(), compat.ensure_torchvision() == "
        "bool(compat._declared), compat.bridge_torchvision())"
    )
    assert fresh(code) == "True True False"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A torchvision of our own, whose operators do not load, and a search path without a hook."""
    folder = tmp_path / "torchvision"
    folder.mkdir()
    (folder / "__init__.py").write_text("from entreg.compat import _declared\nseen = len(_declared)\n")
    (folder / "part.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    others = [finder for finder in sys.meta_path if not isinstance(finder, compat._TorchvisionFinder)]
    monkeypatch.setattr(sys, "meta_path", others)
    declared = []
    monkeypatch.setattr(compat, "_declared", declared)
    monkeypatch.setattr(compat, "_declare_missing_operators", lambda file: declared.append(file))
    yield declared
    for name in ("torchvision", "torchvision.part"):
        sys.modules.pop(name, None)


def hooks():
    return [finder for finder in sys.meta_path if isinstance(finder, compat._TorchvisionFinder)]


def test_it_declares_before_the_code_of_torchvision_runs_and_once(package):
    assert bridge_torchvision()
    assert bridge_torchvision()
    assert len(hooks()) == 1
    import torchvision
    from torchvision import part

    assert torchvision.seen == 1 == len(package)
    assert package == [torchvision.__file__]
    assert part.value == 3
    assert not hooks()
    assert "exec_module" not in vars(torchvision.__spec__.loader)


def test_searching_without_importing_declares_nothing(package):
    from importlib.util import find_spec

    bridge_torchvision()
    assert find_spec("torchvision").submodule_search_locations
    assert find_spec("no_such_package") is None
    assert package == []
    assert len(hooks()) == 1


def test_an_import_that_fails_can_be_tried_again(package, tmp_path):
    source = tmp_path / "torchvision" / "__init__.py"
    text = source.read_text()
    source.write_text("raise RuntimeError('broken')\n")
    bridge_torchvision()
    with pytest.raises(RuntimeError, match="broken"):
        import torchvision
    source.write_text(text + "# of another size\n")
    import torchvision

    assert torchvision.seen == 1 == len(package)


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
    assert bridge_torchvision() is False
