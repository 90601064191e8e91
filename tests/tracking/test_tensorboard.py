"""What TensorBoard's own reader finds after a run that ends well and one that is resumed."""

import json

import numpy as np
import pytest

from entreg.records.environment import git_state
from entreg.tracking import tracked, tracker_settings_from_mapping
from tests.tracking.runs import CONFIG, RUN, tracked_training

TENSORBOARD = {"kind": "tensorboard"}


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (found,) = (folder / "outputs" / "tensorboard").glob("*/*/*")
    assert found.relative_to(folder / "outputs" / "tensorboard").as_posix() == f"tests/tiny/tiny-{RUN}"
    reader = EventAccumulator(str(found), size_guidance={"images": 0, "histograms": 0, "scalars": 0, "tensors": 0})
    reader.Reload()
    return reader


def scalars(folder):
    reader = read(folder)
    return {name: [(one.step, one.value) for one in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def text(reader, name):
    return reader.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0].decode()


def assert_equal_rows(found, rows):
    names = {name for row in rows for name in row} - {"step"}
    assert set(found) == names
    for name in names - {"seconds"}:
        # The format has single precision.
        assert found[name] == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]


def test_events_hold_the_history_and_the_configuration(tmp_path):
    result = tracked_training(tmp_path, TENSORBOARD)
    assert_equal_rows(scalars(tmp_path), result.history)
    config = json.loads(text(read(tmp_path), "config").strip("`\n").removeprefix("json"))
    assert {key: config[key] for key in CONFIG} == CONFIG
    assert config["code"]["commit"] == git_state()["commit"]


def test_a_resumed_run_has_each_step_once(tmp_path):
    with pytest.raises(RuntimeError, match="stopped by the test"):
        tracked_training(tmp_path, TENSORBOARD, fail_at=8)
    assert len(scalars(tmp_path)["loss"]) == 8
    result = tracked_training(tmp_path, TENSORBOARD)
    assert_equal_rows(scalars(tmp_path), result.history)


def test_a_run_that_starts_again_forgets_its_earlier_attempt(tmp_path):
    with pytest.raises(RuntimeError, match="stopped by the test"):
        tracked_training(tmp_path, TENSORBOARD, fail_at=8)
    result = tracked_training(tmp_path, TENSORBOARD, resume=None)
    assert_equal_rows(scalars(tmp_path), result.history)


def test_histograms_pictures_and_tables_are_there(tmp_path):
    settings = tracker_settings_from_mapping({**TENSORBOARD, "directory": str(tmp_path / "outputs")})
    identity = {"config": CONFIG, "experiment": "tests/tiny", "group": "tests/tiny", "name": "tiny", "run_id": RUN}
    picture = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    with tracked(settings, **identity) as tracker:
        tracker.begin([])
        tracker.log({"loss": 1.0}, 3)
        tracker.histogram("h", [1.0, 2.0, 2.0, 4.0], 3)
        tracker.image("picture", picture, 3)
        tracker.table("t", [{"plan": "dense", "top1": 0.5}, {"plan": "tokens", "level": 0.8}])
        tracker.summary({"result/top1": 0.5})
        tracker.artifact(tmp_path, "folder")
    reader = read(tmp_path)
    (histogram,) = reader.Histograms("h")
    assert (histogram.step, histogram.histogram_value.num, histogram.histogram_value.sum) == (3, 4, 9)
    (image,) = reader.Images("picture")
    assert (image.step, image.height, image.width) == (3, 4, 5)
    assert text(reader, "t").splitlines() == [
        "| plan | top1 | level |",
        "| --- | --- | --- |",
        "| dense | 0.5 |  |",
        "| tokens |  | 0.8 |",
    ]
    assert [(one.step, one.value) for one in reader.Scalars("result/top1")] == [(3, 0.5)]
