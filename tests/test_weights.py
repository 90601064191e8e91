"""Weights from a file: they arrive, and weights that do not fit leave the model alone."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from entreg.errors import AssetError
from entreg.weights import frozen_weights, load_weights, put_weights, weights_difference, weights_fingerprint


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


def test_frozen_weights_are_named_as_in_the_state_dictionary_ties_included():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].weight = model[0].weight
    assert frozen_weights(model) == {}
    model[0].requires_grad_(False)
    frozen = frozen_weights(model)
    assert list(frozen) == ["0.weight", "0.bias", "1.weight"]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in frozen.items())


def test_a_fingerprint_tells_names_shapes_dtypes_and_values_apart():
    value = torch.randn(3000, 2)
    weights = {"a": value, "b": torch.ones(())}
    same = weights_fingerprint({"b": torch.ones(()), "a": value.t().contiguous().t()})
    assert weights_fingerprint(weights) == same
    others = [
        {"a": value, "c": torch.ones(())},
        {"a": value.flatten(), "b": torch.ones(())},
        {"a": value.bfloat16(), "b": torch.ones(())},
        {"a": value + 1e-3, "b": torch.ones(())},
        {"a": value},
    ]
    prints = {same, *(weights_fingerprint(one) for one in others)}
    assert len(prints) == 1 + len(others)
