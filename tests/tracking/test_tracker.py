"""What the configuration may ask for, that nothing is loaded before it is needed, and that no tracker stops a run."""

import subprocess
import sys
from pathlib import Path

import hydra
import numpy as np
import pytest
from omegaconf import OmegaConf

from entreg.cli import CONFIGS
from entreg.errors import ConfigError
from entreg.experiments.geometry import experiment as geometry_experiment
from entreg.experiments.language import experiment as language_experiment
from entreg.experiments.vision import experiment as vision_experiment
from entreg.records.record import config_hash
from entreg.records.store import REFERENCE_ROOT, RecordStore
from entreg.tracking import NoTracker, open_tracker, track_record, tracked, tracker_settings_from_mapping
from entreg.tracking.tracker import CarefulTracker
from tests.tracking.runs import tracked_training

IDENTITY = {"config": {}, "experiment": "some", "group": "some", "name": "some", "run_id": "0"}


def composed(entry, *overrides):
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose(entry, list(overrides)), resolve=True)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "mlflow"}, "tracker.kind must be one of wandb, tensorboard, none, got 'mlflow'"),
        ({"kind": "wandb", "mode": "sometimes"}, "tracker.mode must be one of offline, online, off, got 'sometimes'"),
        ({"kind": "wandb", "grup": "a"}, "unknown key 'grup' of tracker"),
        ({"kind": "none", "attention_every": 0}, "tracker.attention_every must be a whole number of at least 1, got 0"),
        ({"kind": "none", "overlays": None}, "tracker.overlays must be a whole number of at least 0, got None"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(values, words):
    with pytest.raises(ConfigError, match=words.replace("[", "\\[")):
        tracker_settings_from_mapping(values)


@pytest.mark.parametrize("kind", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_missed_before_anything_runs(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(ConfigError, match=rf"tracker={kind} needs the package {kind}: .*tracker=none"):
        tracker_settings_from_mapping({"kind": kind})
    assert not tracker_settings_from_mapping({"kind": kind, "mode": "off"}).active


def test_wandb_is_the_default_and_offline_but_in_seconds_long_runs():
    for entry in ("vision", "language", "geometry"):
        tracker = composed(entry)["tracker"]
        assert (tracker["kind"], tracker["mode"]) == ("wandb", "offline")
        assert not tracker_settings_from_mapping(composed(entry, "profile=smoke")["tracker"]).active
        for kind in ("wandb", "tensorboard", "none"):
            assert tracker_settings_from_mapping(composed(entry, f"tracker={kind}")["tracker"]).kind == kind
    # YAML and Hydra read a bare off differently.
    for off in ("off", "false"):
        assert not tracker_settings_from_mapping(composed("vision", f"tracker.mode={off}")["tracker"]).active


def test_importing_the_experiments_loads_no_tracker():
    code = (
        "import sys, entreg, entreg.tracking, entreg.experiments.vision.experiment, "
        "entreg.experiments.language.experiment, entreg.experiments.geometry.experiment; "
        "print(sorted({'wandb', 'tensorboard', 'torch.utils.tensorboard'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("entry", "module", "overrides"),
    [
        ("vision", vision_experiment, ["device=cpu"]),
        ("language", language_experiment, ["device=cpu"]),
        ("geometry", geometry_experiment, ["experiment=geometry/hull", "distributions=[disk]", "seeds=[0]"]),
    ],
)
def test_trackers_do_not_change_which_run_it_is(entry, module, overrides):
    hashes = set()
    for tracker in ("tracker=none", "tracker=tensorboard", "tracker.mode=online"):
        values = composed(entry, *overrides, tracker)
        planned = module.plan_runs(values)[0] if entry == "geometry" else module.plan_run(values)
        hashes.add(config_hash(planned.config))
    assert len(hashes) == 1


def test_records_from_before_there_were_trackers_are_found():
    store = RecordStore(REFERENCE_ROOT)
    vision = vision_experiment.plan_run(composed("vision", "experiment=vit/digit_scenes", "method=plain", "device=cpu"))
    geometry = geometry_experiment.plan_runs(composed("geometry", "experiment=geometry/hull"))
    assert geometry
    assert all(store.find(run.experiment, run.config) for run in (vision, *geometry))


def test_only_the_first_process_of_a_launcher_tracks(monkeypatch):
    settings = tracker_settings_from_mapping({"kind": "wandb"})
    assert open_tracker(settings, **IDENTITY).active
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert open_tracker(settings, **IDENTITY).active
    monkeypatch.setenv("RANK", "1")
    assert isinstance(open_tracker(settings, **IDENTITY), NoTracker)


CALLS = {
    "log": ({"loss": 1.0}, 1),
    "histogram": ("h", [1.0, 2.0], 1),
    "image": ("i", np.zeros((2, 2, 3), dtype=np.uint8), 1),
    "table": ("t", [{"a": 1}]),
    "summary": ({"s": 1.0},),
    "artifact": ("file", "a"),
}


class Failing:
    """Fails in one method, as a full disk or a lost service would make it."""

    def __init__(self, method):
        self.method, self.calls = method, []

    def __getattr__(self, name):
        def call(*_):
            self.calls.append(name)
            if name == self.method:
                raise OSError(28, "No space left on device")

        return call


@pytest.mark.parametrize("method", [*CALLS, "open"])
def test_a_tracker_that_fails_is_given_up_and_told_once(method, capsys):
    backend = Failing(method)

    def open_backend(rows):
        if method == "open":
            raise OSError(28, "No space left on device")
        return backend

    tracker = CarefulTracker(open_backend, "wandb")
    for _ in range(2):
        for name, arguments in CALLS.items():
            getattr(tracker, name)(*arguments)
    tracker.finish(failed=False)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "No space left on device" in said[0]
    assert "the run goes on" in said[0]
    # What comes after is not tried: it might wait for a server each time.
    before = [name for name in CALLS][: list(CALLS).index(method) + 1] if method != "open" else []
    assert backend.calls == [*before, *(["finish"] if method != "open" else [])]


def test_a_failing_end_is_told_and_an_error_of_the_run_stays_its_own(capsys):
    backend = Failing("finish")
    tracker = CarefulTracker(lambda rows: backend, "wandb")
    tracker.log({"a": 1.0}, 1)
    tracker.finish(failed=False)
    assert "did not finish" in capsys.readouterr().err
    settings = tracker_settings_from_mapping({"kind": "none"})
    with pytest.raises(KeyError), tracked(settings, **IDENTITY):
        raise KeyError


def test_a_folder_that_cannot_be_written_does_not_stop_a_run(tmp_path, capfd):
    (tmp_path / "outputs").write_text("a file where the folder should be")
    result = tracked_training(tmp_path, {"kind": "wandb"})
    assert [row["step"] for row in result.history] == list(range(1, 13))
    assert len(Path(tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 12
    said = [line for line in capfd.readouterr().err.splitlines() if "the run goes on" in line]
    assert len(said) == 1


def test_records_become_tables_by_what_was_measured():
    told = {}

    class Told(NoTracker):
        def table(self, name, rows):
            told[name] = rows

        def summary(self, values):
            told["summary"] = values

    rows = [
        {"plan": "dense", "sparsity": 0.0, "top1": 0.9},
        {"plan": "tokens", "sparsity": 0.8, "top1": 0.7},
        {"plan": "robustness", "error": 0.1},
        {"task": "copy", "plan": "dense", "realised_sparsity": 0.0, "loss": 1.0},
        {"method": "qhull", "seconds": 1.0},
    ]
    metrics = {"training_seconds": 3.0, "overlays": {"image": []}, "mce_dense": None, "complete": True}
    track_record(Told(), {"rows": rows, "metrics": metrics, "wall_seconds": 4.0})
    assert told == {
        "sparsity_accuracy": rows[:2],
        "robustness": [rows[2]],
        "sparsity_copy": [rows[3]],
        "methods": [rows[4]],
        "summary": {"result/training_seconds": 3.0, "result/wall_seconds": 4.0},
    }
