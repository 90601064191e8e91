"""Code planted wherever something is loaded: none of it runs."""

import ast
import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from entreg.adapters.language_models import load_language_model
from entreg.adapters.timm_models import vision_model
from entreg.data.corrupted_images import GeneratedCorruptions
from entreg.data.image_sources import cifar100
from entreg.data.official_corruptions import OfficialCorruptions
from entreg.data.text import corpus
from entreg.errors import ConfigError, EntregError
from entreg.records.claims import load_claims
from entreg.training.checkpoints import MODEL, STATE, latest_checkpoint, load_model_weights, save_checkpoint
from tests.adapters.small_decoders import small_decoder
from tests.data.official_layouts import random_pixels, write_corruptions
from tests.data.small_tokenizers import byte_tokenizer
from tests.faults.catalogue import ROOT, Fault
from tests.faults.processes import run_script
from tests.training.tiny import TinyNet

TITLE = "Files that mean harm (a pickle or Python file in a checkpoint, data set or model)"
VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1, "num_classes": 2}


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def pickled(marker):
    return pickle.dumps(Payload(marker))


def torch_pickled(marker, path):
    torch.save({"weight": Payload(marker)}, path)
    return path


def model_checkpoint(folder, marker):
    vision_model("vit_base_patch16_224", checkpoint=torch_pickled(marker, folder / "model.pt"), **VIT)


def model_checkpoint_renamed(folder, marker):
    vision_model("vit_base_patch16_224", checkpoint=torch_pickled(marker, folder / "model.safetensors"), **VIT)


def base_checkpoint(folder, marker):
    load_model_weights(TinyNet(), torch_pickled(marker, folder / "run.ckpt"))


def resealed_checkpoint(folder, marker):
    """A checkpoint whose weights are a pickle, with the right checksums."""
    path = save_checkpoint(folder / "checkpoints", 1, TinyNet().state_dict(), {})
    torch_pickled(marker, path / MODEL)
    state = json.loads((path / STATE).read_text())
    state["files"][MODEL] = hashlib.sha256((path / MODEL).read_bytes()).hexdigest()
    del state["checksum"]
    state["checksum"] = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    (path / STATE).write_text(json.dumps(state))
    load_model_weights(TinyNet(), path)


def pickled_state(folder, marker):
    path = save_checkpoint(folder / "checkpoints", 1, TinyNet().state_dict(), {})
    (path / STATE).write_bytes(pickled(marker))
    for name in ("optimizer.pt", "random_states_0.pkl", "scheduler.bin"):
        torch_pickled(marker, path / name)
    assert latest_checkpoint(folder / "checkpoints") is None
    load_model_weights(TinyNet(), path)


def object_array(folder, marker, name):
    labels = np.arange(5)
    folder = folder / "cifar"
    write_corruptions(folder, labels)
    array = np.empty(25, dtype=object)
    array[:] = [Payload(marker)] * 25
    np.save(folder / f"{name}.npy", array, allow_pickle=True)
    OfficialCorruptions(folder)


def pickled_cache(folder, marker):
    """Corrupted images in the cache replaced by an array of objects, with the right checksum beside it."""
    images, labels = random_pixels(3), np.arange(3)
    wanted = GeneratedCorruptions(images, labels, folder=folder).images("brightness", 1).copy()
    (path,) = folder.rglob("brightness-1.npy")
    np.save(path, np.array([Payload(marker)], dtype=object), allow_pickle=True)
    sums = path.with_suffix(".json")
    sums.write_text(
        json.dumps(json.loads(sums.read_text()) | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    )
    assert np.array_equal(GeneratedCorruptions(images, labels, folder=folder).images("brightness", 1), wanted)


def cifar(folder, marker):
    (folder / "cifar-100-python").mkdir()
    (folder / "cifar-100-python" / "test").write_bytes(pickled(marker))
    cifar100(folder, "test", download=False)


def loading_script(folder, marker):
    (folder / f"{folder.name}.py").write_text(f"open({str(marker)!r}, 'w')")
    (folder / "wikitext.py").write_text(f"open({str(marker)!r}, 'w')")
    corpus("wikitext_2", folder, "test")


def decoder(folder):
    small_decoder().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def own_code(folder, marker):
    """A model that wants to bring its own classes, under a known and under an unknown architecture."""
    decoder(folder)
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    for name, entries in {
        "config.json": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
        "tokenizer_config.json": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
    }.items():
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": entries}))
    load_language_model(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil"}))
    load_language_model(str(folder))


def pickled_model(folder, marker):
    decoder(folder)
    (folder / "model.safetensors").unlink()
    torch_pickled(marker, folder / "pytorch_model.bin")
    load_language_model(str(folder))


def pickled_adapter(folder, marker):
    """Weights of an adapter beside the model's, which transformers loads by itself."""
    decoder(folder)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "target_modules": ["q_proj"], "r": 2}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    torch_pickled(marker, folder / "adapter_model.bin")
    load_language_model(str(folder))


def beside_gguf(folder, marker):
    """Code beside a GGUF file, which transformers would ask whether to run."""
    decoder(folder)
    own = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}}
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({**own, "tokenizer_class": "Evil"}))
    (folder / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **own}))
    (folder / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    load_language_model(str(folder / "model.gguf"))


def yaml_code(folder, marker):
    path = folder / "claims.yaml"
    path.write_text(f"- !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{marker}']]\n")
    load_claims(path)


def configuration(folder, marker):
    """A configuration of somebody else's with a Python object in it."""
    (folder / "data").mkdir()
    (folder / "data" / "evil.yaml").write_text(f"name: !!python/object/apply:os.system ['touch {marker}']\n")
    words = [f"hydra.searchpath=[file://{folder}]", "data=evil", "profile=smoke", f"store={folder}"]
    status, text = run_script(folder / "log", "train", *words)
    assert status == 2, text
    raise ConfigError(text.strip().removeprefix("Error: "))


WEIGHTS = "The weights at … cannot be read: …; make them anew."
NOT_RUN = "nothing of it ran"
FAULTS = (
    Fault("`model.checkpoint` is a pickle", WEIGHTS, NOT_RUN, model_checkpoint),
    Fault("`model.checkpoint` is a pickle that is named `.safetensors`", WEIGHTS, NOT_RUN, model_checkpoint_renamed),
    Fault("`base.checkpoint` is a pickle", WEIGHTS, NOT_RUN, base_checkpoint),
    Fault(
        "a checkpoint's weights are a pickle, its checksums made to fit",
        "Checkpoint … is damaged: ….",
        NOT_RUN,
        resealed_checkpoint,
    ),
    Fault("a checkpoint holds pickles of optimizer and state", "Checkpoint … is damaged: ….", NOT_RUN, pickled_state),
    Fault(
        "`labels.npy` of CIFAR-100-C is a pickled array",
        "… is truncated or no array file; fetch it again (…)",
        NOT_RUN,
        lambda folder, marker: object_array(folder, marker, "labels"),
    ),
    Fault(
        "`fog.npy` of CIFAR-100-C is a pickled array",
        "… is truncated or no array file; fetch it again (…)",
        NOT_RUN,
        lambda folder, marker: object_array(folder, marker, "fog"),
    ),
    Fault(
        "corrupted images in the cache are a pickled array, their checksum made to fit",
        None,
        "they are made anew",
        pickled_cache,
    ),
    Fault(
        "CIFAR-100 has more than arrays in its pickle",
        "… is no readable batch of CIFAR-100, damaged or truncated; fetch it again",
        NOT_RUN,
        cifar,
    ),
    Fault(
        "a text corpus comes with a loading script",
        "… holds no …; fetch it with … and name that folder as WIKITEXT= of make or data.text.root=",
        NOT_RUN,
        loading_script,
    ),
    Fault(
        "a language model brings Python code",
        "… is of the architecture 'evil', which transformers … does not know; code that comes with a model is not run",
        "nothing of it ran; of a known architecture, transformers' own code is used",
        own_code,
    ),
    Fault(
        "a language model's weights are a pickle",
        "… holds no model.safetensors, and no index of several such files",
        NOT_RUN,
        pickled_model,
    ),
    Fault(
        "a pickled adapter lies beside a language model",
        "… holds an adapter, adapter_config.json: merge it into the model, or move it away",
        NOT_RUN,
        pickled_adapter,
    ),
    Fault(
        "Python code lies beside a GGUF file",
        "… cannot be read, truncated or of an unsupported kind: …",
        NOT_RUN,
        beside_gguf,
    ),
    Fault("the claims file makes Python objects", "The claims file … is not valid YAML: …", NOT_RUN, yaml_code),
    Fault(
        "a configuration makes Python objects",
        "A configuration file is not valid YAML: could not determine a constructor for the tag …",
        NOT_RUN,
        configuration,
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_planted_code_is_not_run(fault, tmp_path, monkeypatch):
    marker = tmp_path / "was-run"
    monkeypatch.setenv("ENTREG_CACHE", str(tmp_path / "cache"))
    # Had anybody to be asked, the answer would be yes.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (tmp_path / "data").mkdir()
    if fault.seen is None:
        fault.inject(tmp_path / "data", marker)
    else:
        with pytest.raises(EntregError) as caught:
            fault.inject(tmp_path / "data", marker)
        assert fault.is_said_by(str(caught.value)), str(caught.value)
    assert not marker.exists()


def test_the_payload_would_run(tmp_path):
    pickle.loads(pickled(tmp_path / "was-run"))
    assert (tmp_path / "was-run").exists()


# Calls that may run what they read, and the words that keep them from it.
DANGEROUS = {
    "torch.load": ("weights_only", True),
    "torch.hub.load": None,
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "pickle.load": None,
    "pickle.loads": None,
    "joblib.load": None,
    "dill.load": None,
    "shelve.open": None,
    "pd.read_pickle": None,
    "yaml.unsafe_load": None,
    "yaml.full_load": None,
    "eval": None,
    "exec": None,
}


def calls(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}, node


def problems(path):
    for name, words, node in calls(path):
        short = name.rpartition(".")[2]
        if name in DANGEROUS:
            needed = DANGEROUS[name]
            if needed is None or words.get(needed[0]) != str(needed[1]):
                yield name
        if short == "from_pretrained" and words.get("trust_remote_code") != "False":
            yield name
        if name == "yaml.load" and words.get("Loader") != "_StrictLoader":
            yield name
        if short == "load_dataset" and ast.unparse(node.args[0]) != "'parquet'":
            yield name


def test_nothing_in_the_code_loads_what_could_run(tmp_path):
    found = {
        str(path.relative_to(ROOT)): list(problems(path))
        for folder in ("entreg", "scripts")
        for path in sorted((ROOT / folder).rglob("*.py"))
    }
    assert len(found) > 100
    assert {path: names for path, names in found.items() if names} == {}
    bad = tmp_path / "bad.py"
    bad.write_text(
        "torch.load(p)\nnp.load(p)\npickle.load(p)\nyaml.load(t, Loader=yaml.Loader)\nM.from_pretrained(p)\n"
    )
    assert len(list(problems(bad))) == 5
