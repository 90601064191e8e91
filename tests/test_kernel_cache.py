"""Compiled kernels: current with their sources, compiled once and quickly, and ahead of time."""

import io
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from entreg import kernels
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


def test_package_that_is_no_folder_is_left_alone(tmp_path):
    (tmp_path / "package.zip").write_bytes(b"")
    assert not drop_stale_kernels(tmp_path / "package.zip" / "package")


def test_a_change_in_a_subpackage_counts(tmp_path):
    (tmp_path / "part").mkdir()
    source = tmp_path / "part" / "module.py"
    source.write_text("x = 1\n")
    assert drop_stale_kernels(tmp_path)
    (tmp_path / "part" / "data.txt").write_text("no source")
    assert not drop_stale_kernels(tmp_path)
    source.write_text("x = 22\n")
    assert drop_stale_kernels(tmp_path)


# Counts what is compiled, with the types of its arguments, in a process of its own.
COUNTED = """
import json, sys, time
from numba.core import event

class Compiled(event.Listener):
    names = []
    def on_start(self, event):
        function = event.data["dispatcher"].py_func
        if function.__module__.startswith("entreg."):
            self.names.append((function.__module__ + "." + function.__name__, str(event.data["args"])))
    def on_end(self, event):
        pass

event.register("numba:compile", Compiled())
import numpy as np
from entreg.geometry import convex_hull, delaunay, pareto_front
"""
POINTS = "np.random.default_rng(0).normal(size=({size}, 2))"


def compiled(code, cache=None):
    environment = {**os.environ, "PYTHONPATH": os.getcwd()} | ({"NUMBA_CACHE_DIR": str(cache)} if cache else {})
    code = f"{COUNTED}\n{code}\nprint(json.dumps(Compiled.names))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return [tuple(entry) for entry in json.loads(done.stdout.splitlines()[-1])]


def check_compiled_once(found):
    assert len(found) == len(set(found))
    assert not [entry for entry in found if "Literal" in entry[1]]


def test_the_first_front_compiles_each_function_once_and_the_next_process_none(tmp_path):
    code = f"pareto_front({POINTS.format(size=1000)})"
    found = compiled(code, tmp_path)
    assert 0 < len(found) < 10
    check_compiled_once(found)
    assert compiled(code, tmp_path) == []


def test_after_the_warm_up_nothing_is_left_to_compile():
    code = ["import entreg.warm_up; entreg.warm_up.warm_up(); Compiled.names.clear()"]
    for size in (10, 1_000, 2_000, 60_000, 200_000):
        points = POINTS.format(size=size)
        code += [f"{function}({points})" for function in ("convex_hull", "pareto_front", "delaunay")]
    code += ["angles = np.arange(60_000.0)", "convex_hull(np.stack((np.cos(angles), np.sin(angles)), 1))"]
    code += ["pareto_front(np.stack((angles, -angles), 1))", f"entreg.entropy.hull_entropy({POINTS.format(size=5000)})"]
    assert compiled("\n".join(code)) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("function", ["convex_hull", "delaunay", "pareto_front"])
@pytest.mark.parametrize("size", [1_000, 200_000])
def test_the_first_result_comes_in_eight_seconds(function, size, tmp_path):
    start = time.perf_counter()
    found = compiled(f"{function}({POINTS.format(size=size)})", tmp_path)
    assert time.perf_counter() - start < 8.0
    check_compiled_once(found)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_who_waits_at_a_terminal_is_told_once(monkeypatch):
    def heard(stream, module, patience):
        monkeypatch.setattr(kernels.sys, "stderr", stream)
        monkeypatch.setattr(kernels, "_PATIENCE", patience)
        notice = kernels._Notice()
        function = SimpleNamespace(__module__=module)
        for _ in range(2):
            # A kernel that compiles a part.
            event = SimpleNamespace(data={"dispatcher": SimpleNamespace(py_func=function)})
            notice.on_start(event)
            notice.on_start(event)
            if notice._timer is not None:
                notice._timer.join(0.2)
            notice.on_end(event)
            notice.on_end(event)
        return stream.getvalue()

    assert heard(Terminal(), "entreg.geometry.delaunay", 0.0).count("Compiling kernels for this machine, once") == 1
    assert heard(Terminal(), "entreg.geometry.delaunay", 60.0) == ""
    assert heard(Terminal(), "another.package", 0.0) == ""
    assert heard(io.StringIO(), "entreg.geometry.delaunay", 0.0) == ""


def test_a_part_of_kernels_refuses_to_be_called_from_python():
    @kernels.part
    def double(x):
        return 2 * x

    with pytest.raises(TypeError, match="double is part of kernels"):
        double(1)
