"""A change of an inlined function in another file must reach its compiled callers."""

import os
import subprocess
import sys

from entreg.kernel_cache import drop_stale_kernels

INNER = """
from numba import njit

@njit(cache=True)
def inner(x):
    return x + {increment}
"""
OUTER = """
from numba import njit
from pkg.inner import inner

@njit(cache=True)
def outer(x):
    return inner(x) * 10
"""
INIT = (
    "from pathlib import Path\nfrom entreg.kernel_cache import drop_stale_kernels\n"
    "drop_stale_kernels(Path(__file__).parent)\n"
)


def call_outer(folder):
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{os.getcwd()}"}
    code = "from pkg.outer import outer; print(outer(1))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return int(result.stdout)


def test_change_of_an_inlined_function_reaches_its_compiled_caller(tmp_path):
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text(INIT)
    (package / "outer.py").write_text(OUTER)
    (package / "inner.py").write_text(INNER.format(increment=1))
    assert call_outer(tmp_path) == 20
    assert list(package.rglob("*.nbc"))
    (package / "inner.py").write_text(INNER.format(increment=20))
    assert call_outer(tmp_path) == 210


def test_kernels_survive_when_no_source_changed(tmp_path):
    (tmp_path / "module.py").write_text("x = 1\n")
    assert drop_stale_kernels(tmp_path)
    compiled = tmp_path / "__pycache__" / "module.nbc"
    compiled.write_bytes(b"code")
    assert not drop_stale_kernels(tmp_path)
    assert compiled.exists()
    (tmp_path / "module.py").write_text("x = 22\n")
    assert drop_stale_kernels(tmp_path)
    assert not compiled.exists()


def test_folder_that_cannot_be_written_is_left_alone(tmp_path):
    (tmp_path / "__pycache__").write_text("a file where the folder would be")
    assert not drop_stale_kernels(tmp_path)
