"""Every VisionTransformer that timm names is the stock model at sparsity 0, or refused, as all other models are.

``timm_names.yaml`` holds what came out for each of these names of the pinned timm: ``stock``, or what the refusal
names; and the modules with other models. What is not in it was brought by a later timm: it is tested by ``make
test-exhaustive`` all the same, and comes out as skipped, with its name and what was found, until it is listed.
"""

import warnings
from collections import defaultdict
from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.models import _registry
from timm.models.vision_transformer import VisionTransformer

from entreg.adapters import sparsify
from entreg.errors import InputError

_LISTS = yaml.safe_load(Path(__file__).with_name("timm_names.yaml").read_text())
LISTED = {name: found for found, names in _LISTS["vision transformers"].items() for name in names.split()}
LISTED_OTHERS = set(_LISTS["other modules"].split())
NAMES = timm.list_models()
MODULES = defaultdict(list)
for _name in NAMES:
    MODULES[_registry._model_to_module[_name]].append(_name)

VITS = ("vision_transformer", "deit", "vision_transformer_hybrid", "vitamin")
"""Modules of timm that make VisionTransformers."""

VIT_NAMES = [name for module in VITS for name in MODULES[module]]
OTHERS = sorted(set(MODULES) - set(VITS))
SAMPLED = {*VIT_NAMES[5::16], *(name for name in VIT_NAMES if LISTED.get(name, "stock") != "stock")}


def tiny(name):
    """The architecture of a name with two narrow layers, as far as it can be narrowed, and its image size."""
    options = {"depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5, "img_size": 48, "patch_size": 8}
    module = _registry._model_to_module[name]
    if module in ("vision_transformer_hybrid", "vitamin"):
        # Convolutions make the patches.
        del options["patch_size"]
        options["img_size"] = 96
    if module == "vitamin":
        from timm.models.vitamin import VitCfg, VitConvCfg

        norm = VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
        options["embed_cfg"] = VitCfg((16, 32, 48), (1, 1, 1), stem_width=16, conv_cfg=norm, head_type="1d")
    if name == "vit_base_mci_224":
        # Its convolutions have the width of the model and no projection behind them.
        del options["embed_dim"]
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    with torch.no_grad():
        # Heads and layer scales begin at or near 0, which would hide everything.
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return model, options["img_size"]


def verdict(model):
    """``stock``, if the path may be put into the model, or what the refusal names."""
    try:
        sparsify(model, 0.0).remove()
    except InputError as error:
        return str(error).partition(" is not supported: nothing was changed")[0]
    return "stock"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SAMPLED else pytest.mark.exhaustive) for name in VIT_NAMES]
)
@torch.no_grad()
def test_a_vit_is_the_stock_model_at_sparsity_zero_or_refused(name):
    model, size = tiny(name)
    found = verdict(model)
    if found == "stock":
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
        features, logits = model.forward_features(images), model(images)
        assert features.isfinite().all()
        with sparsify(model, 0.0):
            assert torch.equal(model.forward_features(images), features)
            assert torch.equal(model(images), logits)
        with sparsify(model, 0.2) as handle:
            # A fifth of the entries may be just what is saved.
            assert handle.realised_sparsity(images) >= 0.2 - 1e-12
            assert model(images).shape == logits.shape
        assert torch.equal(model(images), logits)
    else:
        assert found.startswith("VisionTransformer with ")
    if name not in LISTED:
        pytest.skip(f"{name} of timm {timm.__version__} is not listed as tested in timm_names.yaml; found: {found}")
    assert found == LISTED[name]


@pytest.mark.parametrize(
    ("module", "place"),
    [pytest.param(module, 0, marks=[] if module in OTHERS[::9] else pytest.mark.exhaustive) for module in OTHERS]
    + [pytest.param(module, -1, marks=pytest.mark.exhaustive) for module in OTHERS],
)
def test_other_models_are_refused_by_their_class(module, place):
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm.create_model(MODULES[module][place])
    assert not isinstance(model, VisionTransformer)
    assert verdict(model) == type(model).__name__
    if module not in LISTED_OTHERS:
        pytest.skip(f"module {module} of timm {timm.__version__} is not listed as tested in timm_names.yaml")


def test_names_of_the_installed_timm_are_listed():
    new = [name for name in VIT_NAMES if name not in LISTED] + [one for one in OTHERS if one not in LISTED_OTHERS]
    if new:
        pytest.skip(f"not listed as tested in timm_names.yaml, timm {timm.__version__}: {', '.join(new)}")
