"""Checkpoints: what goes in comes out, what is damaged is noticed, what is half written is never seen."""

import json
import math

import pytest
import torch
from torch import nn

from entreg.errors import AssetError, ConfigError, InputError, OutputError
from entreg.training import checkpoints
from entreg.training.checkpoints import (
    frozen_record,
    latest_checkpoint,
    load_model_weights,
    read_checkpoint,
    save_checkpoint,
)

STATE = {
    "optimizer": {"state": {0: {"step": torch.tensor(3.0), "mean": torch.randn(2, 3)}}, "betas": (0.9, 0.999)},
    "groups": [{"lr": 0.1 + 0.2, "fused": None, "params": [0, 1]}, {}],
    "half": torch.randn(4).bfloat16(),
    "flags": torch.tensor([True, False]),
    "name": "größer",
    "limit": math.inf,
    "empty": (),
}


def weights():
    return {"layer.weight": torch.randn(3, 2), "layer.bias": torch.randn(3), "count": torch.tensor(7)}


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def test_what_goes_in_comes_out(tmp_path):
    model, averaged = weights(), weights()
    path = save_checkpoint(tmp_path, 12, model, STATE, averaged=averaged)
    found = read_checkpoint(path)
    assert found.step == 12
    assert same(dict(sorted(model.items())), dict(sorted(found.model.items())))
    assert same(dict(sorted(averaged.items())), dict(sorted(found.averaged.items())))
    assert same(STATE, found.state)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def test_tied_and_strided_weights(tmp_path):
    tied = torch.randn(4, 4)
    found = read_checkpoint(save_checkpoint(tmp_path, 0, {"a": tied, "b": tied, "c": tied.T, "d": tied[1:]}, {}))
    assert all(
        torch.equal(found.model[name], value)
        for name, value in zip("abcd", (tied, tied, tied.T, tied[1:]), strict=True)
    )


def test_state_of_other_things_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match=r"cannot hold state.objective.1, of type set"):
        save_checkpoint(tmp_path, 0, weights(), {"objective": [1, {2}]})
    assert list(tmp_path.iterdir()) == []


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["model.safetensors", "averaged.safetensors", "training.safetensors", "state.json"])
def test_damage_is_noticed_and_the_older_one_is_taken(tmp_path, capfd, name, damage):
    save_checkpoint(tmp_path, 5, weights(), STATE, averaged=weights())
    newest = save_checkpoint(tmp_path, 10, weights(), STATE, averaged=weights())
    assert latest_checkpoint(tmp_path).step == 10
    assert capfd.readouterr().err == ""
    damage(newest / name)
    with pytest.raises(AssetError, match=r"step-00000010 is damaged"):
        read_checkpoint(newest)
    assert latest_checkpoint(tmp_path).step == 5
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1
    assert "goes on from the older step-00000005" in error


def test_changed_number_in_the_state_is_noticed(tmp_path):
    path = save_checkpoint(tmp_path, 5, weights(), {"learning_rate": 0.125})
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace("0.125", "0.5"))
    with pytest.raises(AssetError, match=r"state\.json was changed"):
        read_checkpoint(path)


def test_no_good_checkpoint(tmp_path, capfd):
    assert latest_checkpoint(tmp_path / "missing") is None
    assert capfd.readouterr().err == ""
    flip(save_checkpoint(tmp_path, 5, weights(), {}) / "model.safetensors")
    assert latest_checkpoint(tmp_path) is None
    assert "There is no older one, so training starts again." in capfd.readouterr().err


def test_another_format_is_refused(tmp_path, monkeypatch):
    path = save_checkpoint(tmp_path, 5, weights(), {})
    monkeypatch.setattr(checkpoints, "_FORMAT", 2)
    with pytest.raises(ConfigError, match="format 1, this version reads 2"):
        latest_checkpoint(path.parent)


def test_the_newest_stay_and_leftovers_of_killed_runs_go(tmp_path):
    (tmp_path / ".step-00000001.abc.tmp").mkdir()
    (tmp_path / "notes").mkdir()
    for step in (1, 2, 10, 100):
        save_checkpoint(tmp_path, step, weights(), {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-00000010", "step-00000100"]


def test_failed_writing_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    model = weights()
    save_checkpoint(tmp_path, 5, model, {})

    def disk_full(*_):
        raise checkpoints.SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", disk_full)
    for step in (5, 10):
        with pytest.raises(OutputError, match="No space left"):
            save_checkpoint(tmp_path, step, weights(), {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    assert torch.equal(latest_checkpoint(tmp_path).model["layer.weight"], model["layer.weight"])


def test_the_same_step_is_replaced(tmp_path):
    save_checkpoint(tmp_path, 5, weights(), {})
    model = weights()
    save_checkpoint(tmp_path, 5, model, {})
    assert torch.equal(read_checkpoint(tmp_path / "step-00000005").model["layer.bias"], model["layer.bias"])


def test_model_weights_from_a_file_a_checkpoint_and_a_run(tmp_path):
    trained, averaged = nn.Linear(3, 2), nn.Linear(3, 2)
    root = tmp_path / "run" / "checkpoints"
    plain = save_checkpoint(root, 1, trained.state_dict(), {})
    for source in (plain, plain / "model.safetensors", str(tmp_path / "run")):
        model = nn.Linear(3, 2)
        load_model_weights(model, source)
        assert torch.equal(model.weight, trained.weight)
    save_checkpoint(root, 2, trained.state_dict(), {}, averaged=averaged.state_dict())
    load_model_weights(model, tmp_path / "run")
    assert torch.equal(model.bias, averaged.bias)


def test_a_source_without_weights_of_the_model_is_refused(tmp_path):
    folder = save_checkpoint(tmp_path, 1, nn.Linear(3, 2).state_dict(), {})
    for source in (folder, folder / "model.safetensors"):
        with pytest.raises(AssetError, match=rf"{source} are not of this model: 'weight' has shape"):
            load_model_weights(nn.Linear(3, 4), source)
    with pytest.raises(AssetError, match="no weights at"):
        load_model_weights(nn.Linear(3, 2), tmp_path / "nothing.safetensors")
    with pytest.raises(AssetError, match="There is no checkpoint in"):
        load_model_weights(nn.Linear(3, 2), tmp_path)
    truncate(folder / "training.safetensors")
    with pytest.raises(AssetError, match="is damaged"):
        load_model_weights(nn.Linear(3, 2), folder)


def test_state_file_is_strictly_what_it_says(tmp_path):
    path = save_checkpoint(tmp_path, 3, weights(), {"seconds": 1.5})
    content = json.loads((path / "state.json").read_text())
    assert content["step"] == 3
    assert set(content["files"]) == {"model.safetensors", "training.safetensors"}


def test_a_checkpoint_without_frozen_weights_is_loaded_onto_the_same_ones_only(tmp_path):
    trained, base = nn.Linear(3, 2), nn.Linear(3, 2)
    record = frozen_record({"bias": trained.bias})
    folder = save_checkpoint(tmp_path, 1, {"weight": trained.weight}, {"frozen": record})
    with pytest.raises(AssetError, match="on top of frozen weights that are not the model's"):
        load_model_weights(base, folder)
    assert not torch.equal(base.weight, trained.weight)
    with pytest.raises(AssetError, match="the model has no 'bias'"):
        load_model_weights(nn.Linear(3, 2, bias=False), folder)
    with torch.no_grad():
        base.bias.copy_(trained.bias)
    load_model_weights(base, folder)
    assert torch.equal(base.weight, trained.weight)
    assert frozen_record({}) is None


def test_a_checkpoint_that_is_removed_while_it_is_read(tmp_path, monkeypatch, capfd):
    save_checkpoint(tmp_path, 5, weights(), STATE)
    newest, load = save_checkpoint(tmp_path, 10, weights(), STATE), checkpoints.load_file

    def load_late(path):
        if path.parent == newest:
            path.unlink()
        return load(path)

    monkeypatch.setattr(checkpoints, "load_file", load_late)
    assert latest_checkpoint(tmp_path).step == 5
    assert "step-00000010 is damaged" in capfd.readouterr().err
