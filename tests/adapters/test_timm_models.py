"""Models by name: what is built, and one sentence for each thing that can be wrong."""

import pytest
import torch
from safetensors.torch import save_file

from entreg.adapters import vision_model
from entreg.errors import AssetError, ConfigError
from tests.adapters.small_models import SIZES, VIT


def test_the_model_of_the_scenes_can_be_built():
    options = {"embed_dim": 96, "depth": 6, "num_heads": 3, "num_classes": 10}
    model = vision_model(
        "vit_base_patch16_224",
        img_size=48,
        patch_size=4,
        in_chans=1,
        class_token=True,
        reg_tokens=3,
        global_pool="",
        **options,
    )
    assert model(torch.zeros(2, 1, 48, 48)).shape == (2, 148, 10)
    assert model.num_prefix_tokens == 4


def test_an_unknown_name_names_near_ones():
    with pytest.raises(ConfigError, match="vit_base_patch16_224"):
        vision_model("vit_base_patch16_22")


def test_an_unknown_option_is_named():
    with pytest.raises(ConfigError, match="colour"):
        vision_model(VIT, colour="red")


def test_a_checkpoint_is_loaded_and_wrong_ones_are_refused(tmp_path):
    torch.manual_seed(0)
    model = vision_model(VIT, **SIZES)
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    loaded = vision_model(VIT, checkpoint=path, **SIZES)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
    with pytest.raises(AssetError, match="nowhere"):
        vision_model(VIT, checkpoint=tmp_path / "nowhere.safetensors", **SIZES)
    with pytest.raises(AssetError, match=r"head\.weight"):
        vision_model(VIT, checkpoint=path, **{**SIZES, "num_classes": 7})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AssetError, match=r"weights\.safetensors"):
        vision_model(VIT, checkpoint=path, **SIZES)


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    import timm

    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(AssetError, match="cannot be fetched"):
        vision_model(VIT, pretrained=True)
