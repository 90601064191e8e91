"""Output folders that cannot be written, and paths with spaces and letters of all alphabets, for every script."""

import os
import shutil
import subprocess
import sys

import pytest

from entreg.data import assets
from entreg.errors import OutputError
from entreg.records import REFERENCE_ROOT, RecordStore
from tests.data.test_assets import CONTENT, MEMBER, make_asset, tar_bytes
from tests.experiments.vision.test_runs import SCENES
from tests.faults.catalogue import ROOT, Fault
from tests.faults.disks import read_only
from tests.faults.processes import run_script
from tests.training.tiny import run

TITLE = "Places: no permission to write, unusual paths"
# Spaces, letters outside ASCII, a combining accent, a quote, and what shells and Hydra have a meaning for.
UNUSUAL = "mein Ordner (1) größe 数据 e\u0301 it's 100% #1 & [x] = $HOME"


def quoted(folder):
    """A path as a value of Hydra: in quotes, with its own escaped."""
    text = str(folder).replace("'", "\\'")
    return f"'{text}'"


def hydra(*words, folders=("store",)):
    return lambda folder: [*words, *(f"{key}={quoted(folder / key)}" for key in folders)]


def tables(folder):
    """Records that can be read, beside an output folder that is perhaps not to be written."""
    records = folder.parent / "runs"
    records.mkdir(exist_ok=True)
    for path in REFERENCE_ROOT.glob("benchmark__entropy_law__*.json"):
        shutil.copy(path, records)
    return ["--records", str(records), "--out", str(folder / "out")]


SCRIPTS = {
    "geometry": hydra("experiment=geometry/hull", "profile=smoke", "distributions=[square]"),
    "train": hydra(*SCENES, folders=("store", "checkpoints")),
    "vision": hydra(*SCENES, "profile.vision.methods=[plain]", folders=("store", "checkpoints")),
    "tables": tables,
    "benchmark": hydra("benchmark=entropy_law", "profile=smoke"),
    "language": hydra("profile=smoke", folders=("store", "checkpoints")),
}
NO_PERMISSION = "Cannot write …: no permission to write in …; choose another output folder."


def script(name):
    def inject(folder, monkeypatch):
        arguments = SCRIPTS[name](folder)
        with read_only(folder) as done:
            if not done:
                pytest.skip("root may write everywhere, and may mount nothing here")
            status, text = run_script(folder.parent / "log", name, *arguments)
        assert status == 2, text
        return text

    return inject


def checkpoints(folder, monkeypatch):
    with read_only(folder) as done:
        if not done:
            pytest.skip("root may write everywhere, and may mount nothing here")
        with pytest.raises(OutputError) as caught:
            run(folder / "run", {})
    return str(caught.value)


def cache(folder, monkeypatch):
    archive = tar_bytes({MEMBER: CONTENT})
    source = folder.parent / "pkg-1.0.tar.gz"
    source.write_bytes(archive)
    monkeypatch.setenv("ENTREG_CACHE", str(folder / "cache"))
    monkeypatch.setitem(assets.ASSETS, "pkg", make_asset(archive))
    monkeypatch.setattr(assets, "_download", lambda name, folder: source)
    with read_only(folder) as done:
        if not done:
            pytest.skip("root may write everywhere, and may mount nothing here")
        with pytest.raises(OutputError) as caught:
            assets.asset_path("pkg")
    return str(caught.value)


def unquoted(folder, monkeypatch):
    status, text = run_script(folder.parent / "log", "geometry", "profile=smoke", f"store={folder}")
    assert status == 2, text
    return text


BEFORE = "nothing was computed in vain"
FAULTS = (
    *(Fault(f"`scripts/{name}.py` may not write its output", NO_PERMISSION, BEFORE, script(name)) for name in SCRIPTS),
    Fault("a training may not write its folder", NO_PERMISSION, BEFORE, checkpoints),
    Fault("the cache of packaged data cannot be written", NO_PERMISSION, "set `ENTREG_CACHE` to another folder", cache),
    Fault(
        "a path with unusual characters is given without quotes",
        "The override … cannot be read (…); write it as key=value, a value with other than plain characters in quotes "
        "of its own: \"key='value'\".",
        BEFORE,
        unquoted,
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_place(fault, memory_folder, monkeypatch):
    text = fault.inject(memory_folder / UNUSUAL, monkeypatch)
    assert fault.is_said_by(text), text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["geometry", "train", "vision", "tables"])
def test_scripts_write_to_an_unusual_path(name, memory_folder):
    folder = memory_folder / UNUSUAL
    arguments = SCRIPTS[name](folder)
    status, text = run_script(memory_folder / "log", name, *arguments)
    assert status == 0, text
    if name == "tables":
        assert len(list((folder / "out").glob("*/*"))) >= 6
        return
    assert RecordStore(folder / "store").load_all()
    # Again: what is there is found.
    status, text = run_script(memory_folder / "log", name, *arguments)
    assert status == 0, text
    assert "run 1 of" not in text


@pytest.mark.slow
def test_a_checkout_in_an_unusual_path_works(memory_folder):
    checkout = memory_folder / UNUSUAL
    for name in ("entreg", "configs", "scripts"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    words = ["experiment=geometry/hull", "profile=smoke", "distributions=[nowhere]"]
    for arguments, status, sentence in (
        (["scripts/assets.py", "--list"], 0, "mnist_digits: "),
        (["scripts/geometry.py", *words], 2, "nowhere"),
    ):
        command = [sys.executable, *arguments]
        result = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        assert result.returncode == status, result.stderr
        assert sentence in result.stdout + result.stderr
