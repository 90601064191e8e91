"""Data files that disappear or break in mid-epoch, and processes that load them and die."""

import os
import shutil
import signal
import subprocess

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from entreg.data.corrupted_images import GeneratedCorruptions
from entreg.data.imagenet import imagenet
from entreg.data.official_corruptions import OfficialCorruptions
from entreg.data.vision_sets import vision_dataset
from entreg.errors import AssetError
from entreg.experiments.vision.classification import evaluate
from entreg.training.checkpoints import latest_checkpoint
from entreg.training.loop import TrainingSettings, train
from tests.data.official_layouts import random_pixels, write_corruptions, write_image_folder
from tests.data.test_imagenet import write_parquet
from tests.data.test_vision_sets import SMALL, SYNSETS, config
from tests.faults.catalogue import Fault
from tests.training.tiny import FAST

TITLE = "Data that disappear or break while they are used"


class Colours(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3, 3)

    def forward(self, images):
        return self.head(images.mean(dim=(2, 3)))


class Saboteur:
    """Training's objective, which after seven steps does something to the data."""

    def __init__(self, act):
        self.act, self.steps = act, 0

    def __call__(self, model, batch, step):
        self.steps += 1
        if step == 7 and self.act is not None:
            self.act()
        return F.cross_entropy(model(batch["images"]), batch["labels"]), {}


def folders(root):
    write_image_folder(root, "train", SYNSETS, per_class=4)
    write_image_folder(root, "val", SYNSETS, per_class=1)
    return config("imagenet", root=str(root), num_classes=3, preprocessing=SMALL)


def tables(root):
    write_parquet(root, "train", [0, 1, 2] * 4)
    write_parquet(root, "validation", [0, 1, 2])
    return config("imagenet", root=str(root), num_classes=3, preprocessing=SMALL)


def fitted(folder, dataset, act=None, **changes):
    settings = TrainingSettings(**{**FAST, "steps": 16, "batch_size": 4, "keep_checkpoints": 9, **changes})
    model = Colours()
    train(model, Saboteur(act), dataset, settings, folder, device="cpu")
    return model


def in_training(damage, **changes):
    """Trains until the damage, then mends it and goes on, to the same weights as without."""

    def inject(folder):
        values = folders(folder / "data")
        dataset = vision_dataset(values, "train")
        whole = fitted(folder / "whole", dataset)
        shutil.copytree(folder / "data", folder / "copy")
        with pytest.raises(AssetError) as caught:
            fitted(folder / "run", dataset, lambda: damage(folder / "data" / "train"), **changes)
        # The data go in the eighth step; each process that loads ahead may have two batches more.
        ahead = 2 * changes.get("num_workers", 0)
        assert latest_checkpoint(folder / "run" / "checkpoints").step in range(6, 8 + ahead + 1, 3)
        shutil.copytree(folder / "copy", folder / "data", dirs_exist_ok=True)
        model = fitted(folder / "run", dataset, **changes)
        assert torch.equal(model.head.weight, whole.head.weight)
        return str(caught.value)

    return inject


def remove(folder):
    for path in folder.glob("*/*.JPEG"):
        path.unlink()


def cut(folder):
    for path in folder.glob("*/*.JPEG"):
        path.write_bytes(path.read_bytes()[:200])


def no_image(folder):
    for path in folder.glob("*/*.JPEG"):
        path.write_text("404 not found")


class Deadly:
    """Twelve colours; the process that reads the 32nd is killed, as the system does it for want of memory."""

    def __init__(self, deadly):
        self.deadly, self.parent, self.read = deadly, os.getpid(), 0

    def __len__(self):
        return 12

    def __getitem__(self, index):
        self.read += 1
        if self.read == 32 and self.deadly and os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"images": torch.full((3, 2, 2), index / 12), "labels": torch.tensor(index % 3)}


def killed_worker(folder):
    whole = fitted(folder / "whole", Deadly(False))
    with pytest.raises(AssetError) as caught:
        fitted(folder / "run", Deadly(True), num_workers=1)
    # The death is told once: not again when another process ends, although the exception is kept.
    subprocess.run(["true"], check=True)
    model = fitted(folder / "run", Deadly(False), num_workers=1)
    assert torch.equal(model.head.weight, whole.head.weight)
    return str(caught.value)


def parquet_removed(folder):
    values = tables(folder / "data")
    whole = fitted(folder / "whole", vision_dataset(values, "train"))
    model = fitted(
        folder / "run", vision_dataset(values, "train"), lambda: [file.unlink() for file in folder.rglob("*.parquet")]
    )
    assert torch.equal(model.head.weight, whole.head.weight)


def parquet_missing_at_the_start(folder):
    values = tables(folder / "data")
    fitted(folder / "run", vision_dataset(values, "train"))
    next((folder / "data" / "data").glob("train-*.parquet")).unlink()
    with pytest.raises(AssetError) as caught:
        imagenet(values["root"], "train", num_classes=3, subset=False)
    assert latest_checkpoint(folder / "run" / "checkpoints").step == 16
    return str(caught.value)


def official_removed(folder):
    labels = torch.arange(4).numpy()
    corrupted = OfficialCorruptions(write_corruptions(folder / "c", labels))
    wanted = corrupted.images("fog", 3).copy()
    (folder / "c" / "fog.npy").unlink()
    assert (corrupted.images("fog", 3) == wanted).all()


def official_missing(folder):
    write_corruptions(folder / "c", torch.arange(4).numpy())
    (folder / "c" / "fog.npy").unlink()
    with pytest.raises(AssetError) as caught:
        OfficialCorruptions(folder / "c")
    return str(caught.value)


def kept_removed(folder):
    corrupted = GeneratedCorruptions(random_pixels(3), torch.arange(3).numpy(), folder=folder)
    first = corrupted.images("brightness", 1).copy()
    shutil.rmtree(folder)
    assert (corrupted.images("brightness", 1) == first).all()
    assert corrupted.images("brightness", 2).shape == first.shape


def in_evaluation(num_workers):
    def inject(folder):
        dataset = vision_dataset(folders(folder / "data"), "test")
        next((folder / "data" / "val").rglob("*.JPEG")).unlink()
        with pytest.raises(AssetError) as caught:
            evaluate(Colours(), dataset, batch_size=1, num_workers=num_workers)
        return str(caught.value)

    return inject


KEPT = "the last checkpoint; with the file back the same command ends with the same weights"
GONE = "… is not there any more; put it back and run the same command again"
STOPPED = "Training stopped: {}; the last good checkpoint is …."
FAULTS = (
    Fault("images of a folder disappear in mid-epoch", STOPPED.format(GONE), KEPT, in_training(remove)),
    Fault(
        "images disappear, with processes that load ahead",
        STOPPED.format(GONE),
        KEPT,
        in_training(remove, num_workers=2),
    ),
    Fault(
        "images are cut off in mid-epoch",
        STOPPED.format("… cannot be read (…); it is damaged or truncated, fetch it again"),
        KEPT,
        in_training(cut),
    ),
    Fault(
        "images turn out to be something else",
        STOPPED.format("… is not an image; fetch it again"),
        KEPT,
        in_training(no_image),
    ),
    Fault(
        "a process that loads data is killed",
        STOPPED.format(
            "a process that loads data was killed, most likely for want of memory; lower num_workers or batch_size"
        ),
        "the last checkpoint; the same command ends with the same weights",
        killed_worker,
    ),
    Fault("parquet files disappear in mid-epoch", None, "training ends as if they were there", parquet_removed),
    Fault(
        "parquet files are missing at the start",
        "… holds 1 files like …; some are missing",
        "the checkpoints",
        parquet_missing_at_the_start,
    ),
    Fault("an image of an evaluation disappears", GONE, "nothing was recorded", in_evaluation(0)),
    Fault(
        "an image of an evaluation disappears, with a process that loads ahead",
        GONE,
        "nothing was recorded",
        in_evaluation(1),
    ),
    Fault("a `.npy` file of CIFAR-100-C is deleted while it is open", None, "the same images", official_removed),
    Fault(
        "a `.npy` file of CIFAR-100-C is missing",
        "… lacks fog.npy; CIFAR-100-C is at …, CIFAR-10-C at …",
        "nothing was computed in vain",
        official_missing,
    ),
    Fault("corrupted images in the cache are deleted", None, "they are made again", kept_removed),
)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_missing_data(fault, memory_folder, monkeypatch):
    monkeypatch.setenv("ENTREG_CACHE", str(memory_folder / "cache"))
    sentence = fault.inject(memory_folder / "test")
    if fault.seen is None:
        assert sentence is None
    else:
        assert fault.is_said_by(sentence), sentence
