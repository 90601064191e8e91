"""Masks: ImageNet-S's encoding, lookup by name, and the crop against the image's own transform."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from entreg.data.masks import MaskFolder, object_pixels
from entreg.data.vision_sets import image_transform, mask_transform, preprocessing
from entreg.errors import AssetError
from tests.data.official_layouts import write_imagenet_s_mask


def test_classes_of_imagenet_s_are_read_as_its_authors_say():
    # Their words: class id = R + G * 256, 0 is the other category, 1000 the ignored part.
    ids = np.array([[0, 1, 255], [256, 919, 1000]])
    pixels = np.stack([ids % 256, ids // 256, 0 * ids])
    assert object_pixels(pixels).tolist() == [[False, True, True], [True, True, False]]


def test_grey_masks_are_objects_where_they_are_not_black():
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    assert object_pixels(pil_to_tensor(grey)).flatten().tolist() == [False] + [True] * 255


def identity(image):
    return pil_to_tensor(image)


def test_masks_are_found_by_class_and_name_by_name_alone_and_for_the_hubs_names(tmp_path):
    inside = np.eye(8, dtype=bool)
    for name in ("n01440764/ILSVRC2012_val_00000293", "n02123045/ILSVRC2012_val_00000300", "a/same", "b/same"):
        write_imagenet_s_mask(tmp_path / "validation-segmentation" / f"{name}.png", inside, 300)
    masks = MaskFolder(tmp_path, identity, (8, 8))
    folder = tmp_path / "validation-segmentation"
    expected = folder / "n01440764" / "ILSVRC2012_val_00000293.png"
    assert masks.path("n01440764/ILSVRC2012_val_00000293") == expected
    assert masks.path("ILSVRC2012_val_00000293") == expected
    assert masks.path("ILSVRC2012_val_00000293_n01440764") == expected
    assert masks.path("b/same") == folder / "b" / "same.png"
    assert masks.path("c/same") is None
    assert masks.path("n01440764/ILSVRC2012_val_00000001") is None
    wanted = torch.from_numpy(inside).clone()
    wanted[0] = False  # the ignored border
    assert torch.equal(masks.mask("ILSVRC2012_val_00000293"), wanted)
    assert torch.equal(masks.mask("nothing"), torch.zeros(8, 8, dtype=torch.bool))
    assert torch.equal(MaskFolder(folder / "a", identity, (8, 8)).mask("same"), wanted)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("shape", [(300, 400), (500, 333), (224, 224), (100, 80)])
def test_mask_follows_the_crop_of_its_image(tmp_path, shape, crop_mode):
    # An image that is white exactly where the mask is: after the image's transform, white is where the mask must be.
    height, width = shape
    y, x = np.mgrid[:height, :width]
    inside = ((y / height - 0.4) ** 2 + (x / width - 0.7) ** 2 < 0.1) | (y < height // 5)
    Image.fromarray(inside.astype(np.uint8) * 255).save(tmp_path / "object.png")
    settings = preprocessing({"model": "vit_base_patch16_224", "crop_mode": crop_mode})
    mask = MaskFolder(tmp_path, mask_transform(settings), (224, 224)).mask("object")
    plain = {**settings, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    white = image_transform(plain)(Image.open(tmp_path / "object.png").convert("RGB"))[0] > 0.5
    assert mask.shape == (224, 224)
    assert mask.dtype == torch.bool
    # Nearest and bicubic sampling may differ by a pixel of the coarser of the two grids along the object's edge.
    reach = int(np.ceil(224 / min(shape))) + 1
    pool = torch.nn.functional.max_pool2d
    near = pool(white[None].float(), 2 * reach + 1, 1, reach)[0].bool()
    inner = ~pool((~white)[None].float(), 2 * reach + 1, 1, reach)[0].bool()
    assert not (mask & ~near).any()
    assert not (inner & ~mask).any()
    assert 0.1 < mask.float().mean() < 0.9


def test_missing_empty_and_damaged_masks_are_one_sentence(tmp_path):
    with pytest.raises(AssetError, match=r"there is no folder .*gone with masks; .*data\.masks=null"):
        MaskFolder(tmp_path / "gone", identity, (8, 8))
    with pytest.raises(AssetError, match="holds no PNG files"):
        MaskFolder(tmp_path, identity, (8, 8))
    write_imagenet_s_mask(tmp_path / "one.png", np.ones((64, 64), dtype=bool), 1)
    path = tmp_path / "one.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(AssetError, match=r"one\.png cannot be read .* fetch it again"):
        MaskFolder(tmp_path, identity, (8, 8)).mask("one")
