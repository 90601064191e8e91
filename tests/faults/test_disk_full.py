"""The disk fills up while something is written: a real one of a few hundred kilobytes, where it may be mounted."""

import os
import shutil
import subprocess

import pytest
import torch

from entreg.atomic import require_writable
from entreg.data import assets
from entreg.data.assets import asset_path
from entreg.data.corrupted_images import GeneratedCorruptions
from entreg.errors import OutputError
from entreg.records import REFERENCE_ROOT, RecordStore
from entreg.records.build import build_all
from entreg.records.environment import git_state
from entreg.records.record import parse
from entreg.training.checkpoints import latest_checkpoint, save_checkpoint
from entreg.training.progress import MetricsLog
from tests.data.official_layouts import random_pixels
from tests.data.test_assets import make_asset, tar_bytes
from tests.faults.catalogue import Fault
from tests.faults.disks import small_disk
from tests.records.samples import sample_record
from tests.training.tiny import run

TITLE = "Disk full (or quota used up)"
FULL = "Cannot write …: the disk is full; free some space and run the same command again."
NOISE = torch.randint(2**31, (100_000,), generator=torch.Generator().manual_seed(0))


def hidden(folder):
    return [path.name for path in folder.rglob(".*")]


def start_of_a_run(folder, monkeypatch):
    with small_disk(folder, 64) as fill:
        fill()
        with pytest.raises(OutputError) as caught:
            require_writable(folder / "runs")
        return caught


def checkpoint(folder, monkeypatch):
    with small_disk(folder, 512):
        save_checkpoint(folder / "run", 1, {"weight": NOISE[:20_000]}, {"step": 1})
        with pytest.raises(OutputError) as caught:
            save_checkpoint(folder / "run", 2, {"weight": NOISE}, {"step": 2})
        # The one before is whole, and nothing else takes room.
        assert latest_checkpoint(folder / "run").step == 1
        assert hidden(folder) == []
        # With room again, the same call succeeds.
        assert save_checkpoint(folder / "run", 2, {"weight": NOISE[:20_000]}, {"step": 2}, keep=1).is_dir()
        return caught


def training(folder, monkeypatch):
    settings = {"checkpoint_every": 3, "log_every": 1, "keep_checkpoints": 9}
    whole, _, _ = run(folder / "whole", settings)
    disk = folder / "disk"
    with small_disk(disk, 64, needs_mount=True):
        with pytest.raises(OutputError) as caught:
            run(disk / "run", settings)
        saved = latest_checkpoint(disk / "run" / "checkpoints")
        assert 0 < saved.step < 12
        shutil.copytree(disk / "run", folder / "run")
    # Where there is room, it goes on and ends as if nothing had been.
    model, _, _ = run(folder / "run", settings)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in whole.state_dict().items())
    return caught


def record(folder, monkeypatch):
    with small_disk(folder, 64):
        store = RecordStore(folder / "runs")
        small = sample_record(rows=[{"t": 1}])
        path = store.save(small)
        before = path.read_bytes()
        with pytest.raises(OutputError) as caught:
            store.save({**small, "rows": [{"t": value} for value in NOISE[:20_000].tolist()]})
        assert path.read_bytes() == before
        assert len(store.load_all()) == 1
        assert hidden(folder) == []
        return caught


def commit(folder, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@x", "-C", folder, *words], check=True)

    folder.mkdir()
    (folder / "README.md").write_text("x")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    # git status would now write its index anew.
    os.utime(folder / "README.md", (0, 0))
    with small_disk(folder.with_name("other"), 64, mount=False) as fill:
        fill()
        state = git_state(folder)
    assert not (folder / ".git" / "index.lock").exists()
    assert state["dirty"] is False


def metrics(folder, monkeypatch):
    with small_disk(folder, 64) as fill:
        log = MetricsLog(folder / "metrics.jsonl", last_step=0)
        log.append({"step": 1, "loss": 0.5})
        fill()
        # What is left of a page still takes some rows.
        with pytest.raises(OutputError) as caught:
            list(map(log.append, ({"step": step, "loss": 0.5} for step in range(2, 5000))))
        reached = log.rows[-1]["step"] - 1
        content = (folder / "metrics.jsonl").read_bytes()
    # Half a line may be the last one; a resumed run reads what is before it.
    (folder / "metrics.jsonl").write_bytes(content)
    assert [row["step"] for row in MetricsLog(folder / "metrics.jsonl", 5000).rows] == list(range(1, reached + 1))
    return caught


def tables(folder, monkeypatch):
    paths = sorted(REFERENCE_ROOT.glob("benchmark__entropy_law__*.json"))
    records = [parse(path.read_text(encoding="utf-8"), path.name) for path in paths]
    with small_disk(folder, 64):
        with pytest.raises(OutputError) as caught:
            build_all(records, folder)
        written = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert written
    whole = folder.with_name("whole")
    build_all(records, whole)
    assert all((whole / path).read_bytes() == content for path, content in written.items())
    return caught


def asset(folder, monkeypatch):
    archive = tar_bytes({"pkg-1.0/pkg/table.csv": bytes(500_000)})
    source = folder.with_name("pkg-1.0.tar.gz")
    source.write_bytes(archive)
    monkeypatch.setenv("ENTREG_CACHE", str(folder))
    monkeypatch.setitem(assets.ASSETS, "pkg", make_asset(archive, bytes(500_000)))
    monkeypatch.setattr(assets, "_download", lambda name, folder: source)
    with small_disk(folder, 64):
        with pytest.raises(OutputError) as caught:
            asset_path("pkg")
        assert not [path for path in folder.rglob("*") if path.is_file()]
    assert asset_path("pkg").stat().st_size == 500_000
    return caught


def corrupted_images(folder, monkeypatch):
    images = random_pixels(40)
    with small_disk(folder, 64):
        corrupted = GeneratedCorruptions(images, torch.arange(40).numpy(), folder=folder)
        with pytest.raises(OutputError) as caught:
            corrupted.images("brightness", 1)
        assert not [path for path in folder.rglob("*") if path.is_file()]
    return caught


FAULTS = (
    Fault("the disk is full before a run begins", FULL, "nothing was computed in vain", start_of_a_run),
    Fault(
        "the disk fills up while a checkpoint is written",
        FULL,
        "the older checkpoints, whole; no half-written file takes room",
        checkpoint,
    ),
    Fault(
        "the disk fills up in the middle of a training",
        FULL,
        "the last checkpoint; with room again the same command ends with the same weights, to the bit",
        training,
    ),
    Fault("the disk fills up while a record is written", FULL, "the record that was there before, if any", record),
    Fault("the disk is full when a record asks git for the commit", None, "the checkout, without a lock in it", commit),
    Fault(
        "the disk fills up while a row of the log is written",
        "Cannot write …: …; free some space and resume.",
        "the last checkpoint and the rows up to it",
        metrics,
    ),
    Fault(
        "the disk fills up while tables and figures are written", FULL, "every file is the old or the new one", tables
    ),
    Fault(
        "the disk fills up while packaged data are unpacked", FULL, "nothing; they are fetched again with room", asset
    ),
    Fault(
        "the disk fills up while corrupted images are kept",
        FULL,
        "nothing; they are made again with room",
        corrupted_images,
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_disk_full(fault, tmp_path, monkeypatch):
    caught = fault.inject(tmp_path / "disk", monkeypatch)
    assert fault.seen is None or fault.is_said_by(str(caught.value)), str(caught.value)
