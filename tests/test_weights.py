"""Weights from a file: they arrive, and weights that do not fit leave the model alone."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from entreg.errors import AssetError
from entreg.weights import load_weights, put_weights, weights_difference


def test_weights_of_a_file_arrive(tmp_path):
    trained, model = nn.Linear(3, 2), nn.Linear(3, 2)
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    load_weights(model, str(tmp_path / "weights.safetensors"))
    assert torch.equal(model.weight, trained.weight)
    assert torch.equal(model.bias, trained.bias)


def test_weights_that_do_not_fit_leave_the_model_alone(tmp_path):
    weights = nn.Linear(3, 2).state_dict()
    path = tmp_path / "weights.safetensors"
    save_file(weights, path)
    assert weights_difference(nn.Linear(3, 2), weights) is None
    larger = nn.Linear(3, 2)
    larger.register_buffer("scale", torch.ones(2))
    for model, reason in (
        (nn.Linear(3, 4), r"'weight' has shape \(2, 3\), the model's has \(4, 3\)"),
        (nn.Linear(3, 2, bias=False), "the model has no 'bias'"),
        (larger, "'scale' is missing"),
    ):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(AssetError, match=rf"weights\.safetensors are not of this model: {reason}\.$"):
            load_weights(model, path)
        with pytest.raises(AssetError, match=rf"at the hub are not of this model: {reason}\.$"):
            put_weights(model, weights, "the hub")
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_file_that_is_missing_or_damaged_is_said_in_one_sentence(tmp_path):
    model, path = nn.Linear(3, 2), tmp_path / "weights.safetensors"
    with pytest.raises(AssetError, match="no weights at"):
        load_weights(model, path)
    with pytest.raises(AssetError, match="cannot be read"):
        load_weights(model, tmp_path)
    save_file(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(AssetError, match="cannot be read"):
        load_weights(model, path)
