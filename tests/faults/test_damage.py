"""Files cut off at random offsets, or with a byte changed at one: noticed by their checksums, and said."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from entreg.data import assets
from entreg.data.assets import asset_path
from entreg.data.corrupted_images import GeneratedCorruptions
from entreg.errors import AssetError, RecordError
from entreg.records import RecordStore
from entreg.training.checkpoints import AVERAGED, MODEL, STATE, TRAINING, latest_checkpoint, load_model_weights
from entreg.training.progress import MetricsLog
from entreg.weights import load_weights
from tests.data.official_layouts import random_pixels
from tests.data.test_assets import make_asset, tar_bytes
from tests.faults.catalogue import ROOT, Fault
from tests.records.samples import sample_record
from tests.training.tiny import TinyNet, run

TITLE = "Damaged files (a copy that stopped, a bad disk, an editor)"
TIMES = 12


def damages(content, seed=0):
    """The content cut off, and with one bit changed, at random offsets."""
    rng = np.random.default_rng(seed)
    for offset in sorted({0, *rng.integers(len(content), size=TIMES).tolist()}):
        yield content[:offset]
    for offset in rng.integers(len(content), size=TIMES):
        changed = bytearray(content)
        changed[offset] ^= 1 << rng.integers(8)
        yield bytes(changed)


def said(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]


def newest_checkpoint(name):
    def inject(folder, capsys):
        whole, _, _ = run(folder, {"ema_decay": 0.9, "log_every": 1})
        wanted = {key: value.clone() for key, value in whole.state_dict().items()}
        file = folder / "checkpoints" / "step-00000012" / name
        content = file.read_bytes()
        sentences = []
        for number, damaged in enumerate(damages(content)):
            file.write_bytes(damaged)
            capsys.readouterr()
            if number % TIMES:
                assert latest_checkpoint(folder / "checkpoints").step == 9
                sentences += said(capsys)
                continue
            # Now and then the whole way: the run goes on from the older one and ends with the same bits.
            model, _, result = run(folder, {"ema_decay": 0.9, "log_every": 1})
            sentences += said(capsys)
            assert all(torch.equal(value, model.state_dict()[key]) for key, value in wanted.items())
            assert [row["step"] for row in result.history] == list(range(1, 13))
        return sentences

    return inject


def only_checkpoint(folder, capsys):
    run(folder, {"keep_checkpoints": 1})
    file = folder / "checkpoints" / "step-00000012" / MODEL
    file.write_bytes(file.read_bytes()[:-1])
    capsys.readouterr()
    model, _, _ = run(folder, {"keep_checkpoints": 1})
    sentences = said(capsys)
    twin, _, _ = run(folder.with_name("twin"), {})
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in twin.state_dict().items())
    return sentences


def renamed_checkpoint(folder, capsys):
    run(folder, {})
    checkpoints = folder / "checkpoints"
    shutil.copytree(checkpoints / "step-00000009", checkpoints / "step-00000099")
    capsys.readouterr()
    assert latest_checkpoint(checkpoints).step == 12
    return said(capsys)


def trained_weights(folder, capsys):
    """Whole runs as weights, which ``base.checkpoint`` reads."""
    run(folder, {})
    model, sentences = TinyNet(seed=5), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    file = folder / "checkpoints" / "step-00000012" / MODEL
    for damaged in damages(file.read_bytes()):
        file.write_bytes(damaged)
        with pytest.raises(AssetError) as caught:
            load_model_weights(model, folder / "checkpoints" / "step-00000012")
        sentences.append(str(caught.value))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    return sentences


def weights_with_sums(folder, capsys):
    folder.mkdir()
    file = folder / "model.safetensors"
    save_file(TinyNet().state_dict(), file)
    content = file.read_bytes()
    # As sha256sum writes it.
    (folder / "SHA256SUMS").write_text(f"{hashlib.sha256(content).hexdigest()}  {file.name}\n")
    model, sentences = TinyNet(seed=5), []
    load_weights(model, file)
    for damaged in damages(content):
        file.write_bytes(damaged)
        with pytest.raises(AssetError) as caught:
            load_weights(model, file)
        sentences.append(str(caught.value))
    return sentences


def record(folder, capsys):
    store = RecordStore(folder)
    path = store.save(sample_record())
    store.save(sample_record("geometry/law"))
    sentences = []
    for damaged in damages(path.read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(RecordError) as caught:
            store.load_all()
        sentences.append(str(caught.value))
    return sentences


def kept_asset(folder, capsys):
    content = bytes(range(256)) * 8
    archive = tar_bytes({"pkg-1.0/pkg/table.csv": content})
    folder.mkdir()
    source = folder / "pkg-1.0.tar.gz"
    source.write_bytes(archive)
    sentences = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENTREG_CACHE", str(folder / "cache"))
        patch.setitem(assets.ASSETS, "pkg", make_asset(archive, content))
        patch.setattr(assets, "_download", lambda name, folder: source)
        path = asset_path("pkg")
        for damaged in damages(content):
            path.write_bytes(damaged)
            with pytest.raises(AssetError) as caught:
                asset_path("pkg")
            sentences.append(str(caught.value))
        # As the sentence says.
        path.unlink()
        assert asset_path("pkg").read_bytes() == content
    return sentences


def kept_corrupted_images(folder, capsys):
    images, labels = random_pixels(3), np.arange(3)
    wanted = GeneratedCorruptions(images, labels, folder=folder).images("brightness", 2).copy()
    files = sorted(folder.rglob("brightness-2.*"))
    assert len(files) == 2
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, contents, strict=True):
        for damaged in damages(content):
            file.write_bytes(damaged)
            made = GeneratedCorruptions(images, labels, folder=folder).images("brightness", 2)
            assert np.array_equal(made, wanted)
            assert [file.read_bytes() for file in files] == contents or file.suffix == ".json"


def log(folder, capsys):
    whole, _, _ = run(folder, {"log_every": 1})
    path = folder / "metrics.jsonl"
    content = path.read_bytes()
    lines = [b'{"stop": 1}', b'{"step": null}', b"{}", b"7", b'["step"]', b"\xff", b"9" * 5000]
    for damaged in [*damages(content), *(line + b"\n" + content for line in lines)]:
        path.write_bytes(damaged)
        rows = MetricsLog(path, 12).rows
        # A bit that changes a number or the name of one leaves a row that nobody can tell from others.
        assert all(isinstance(row["step"], int) and row["step"] <= 12 for row in rows)
        # What is left in the file is whole again.
        assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    path.write_bytes(content[: len(content) // 2])
    model, _, _ = run(folder, {"log_every": 1})
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in whole.state_dict().items())


GOES_ON = "Checkpoint … is damaged: …. Training goes on from the older step-…."
OLDER = "the older checkpoint; training goes on from it and ends with the same bits"
FAULTS = (
    *(
        Fault(f"`{name}` of the newest checkpoint is damaged", GOES_ON, OLDER, newest_checkpoint(name))
        for name in (MODEL, AVERAGED, TRAINING, STATE)
    ),
    Fault(
        "the only checkpoint is damaged",
        "Checkpoint … is damaged: …. There is no older one, so training starts again.",
        "nothing; training starts again",
        only_checkpoint,
    ),
    Fault(
        "a checkpoint was copied to the name of another step",
        "Checkpoint … is damaged: it is that of step 9. Training goes on from the older step-00000012.",
        "the older checkpoints",
        renamed_checkpoint,
    ),
    Fault(
        "a checkpoint that is named as weights is damaged",
        "Checkpoint … is damaged: ….",
        "the model, unchanged",
        trained_weights,
    ),
    Fault(
        "a file of weights with a `SHA256SUMS` beside it is damaged",
        "The weights at … are damaged: their SHA-256 is not the one in SHA256SUMS; fetch or make them anew.",
        "the model, unchanged",
        weights_with_sums,
    ),
    Fault("a record is damaged", "The record …; restore it from version control or …", "the other records", record),
    Fault(
        "packaged data in the cache are damaged",
        "… is damaged (its SHA-256 differs from the pinned one); delete it and run again",
        "the file, as it is",
        kept_asset,
    ),
    Fault("corrupted images in the cache are damaged", None, "they are made anew", kept_corrupted_images),
    Fault("the log of a training is damaged", None, "the rows before the damage; training is not affected", log),
)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_damage(fault, memory_folder, capsys):
    sentences = fault.inject(memory_folder / "run", capsys)
    if fault.seen is None:
        assert sentences is None
    else:
        assert sentences
        for sentence in sentences:
            assert fault.is_said_by(sentence), sentence


def test_committed_weights_are_listed():
    folder = ROOT / "results" / "checkpoints"
    files = sorted(folder.glob("*.safetensors"))
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in files]
    assert (folder / "SHA256SUMS").read_text().splitlines() == sums
