"""A clock that is set back while something runs, as after a sleep, a move of a virtual machine, or by hand."""

import datetime
import os
import time

import pytest
import torch

from entreg.records import RecordStore
from entreg.records.record import schema_problem
from entreg.training.checkpoints import latest_checkpoint, load_model_weights
from tests.faults.catalogue import Fault
from tests.records.samples import sample_record
from tests.training.tiny import TinyNet, run

TITLE = "A clock that goes backwards"


class Backwards(datetime.datetime):
    """An hour earlier each time it is asked."""

    asked = 0

    @classmethod
    def now(cls, tz=None):
        cls.asked += 1
        return datetime.datetime(2030, 1, 1, tzinfo=tz) - datetime.timedelta(hours=cls.asked)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Every clock but the monotonic one, which the system never sets."""
    asked = []

    def back():
        asked.append(1)
        return 2e9 - 3600.0 * len(asked)

    monkeypatch.setattr(time, "time", back)
    monkeypatch.setattr(time, "time_ns", lambda: int(back() * 1e9))
    monkeypatch.setattr(datetime, "datetime", Backwards)
    return asked


def training(folder, clock):
    model, _, result = run(folder, {"log_every": 1})
    # Nothing that it writes or shows hangs on a clock that can be set.
    assert clock == []
    seconds = [row["seconds"] for row in result.history]
    assert 0 < seconds[0]
    assert seconds == sorted(seconds)
    assert seconds[-1] <= result.seconds < 600
    twin, _, _ = run(folder.with_name("twin"), {"log_every": 1})
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in model.state_dict().items())


def ages(folder, clock):
    """The older a checkpoint, the later its files were changed."""
    run(folder, {"keep_checkpoints": 9})
    for number, path in enumerate(sorted((folder / "checkpoints").iterdir())):
        for file in (*path.iterdir(), path):
            os.utime(file, (2e9 - 1000 * number,) * 2)
    assert latest_checkpoint(folder / "checkpoints").step == 12
    model = TinyNet()
    load_model_weights(model, folder)
    newest = latest_checkpoint(folder / "checkpoints").model
    assert all(torch.equal(value, newest[name]) for name, value in model.state_dict().items())
    # The oldest go, by step and not by age.
    (folder / "checkpoints" / "step-00000012").rename(folder / "gone")
    run(folder, {"keep_checkpoints": 2})
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000009", "step-00000012"]


def records(folder, clock):
    store = RecordStore(folder)
    first = sample_record(rows=[{"t": 1}])
    store.save(first)
    second = sample_record(rows=[{"t": 2}])
    assert second["utc"] < first["utc"]
    store.save(second)
    # The one that was saved last counts, whatever the clock said.
    (found,) = store.load_all()
    assert found["rows"] == [{"t": 2}]
    assert schema_problem(found) is None
    assert found["wall_seconds"] >= 0


FAULTS = (
    Fault("the clock is set back during a training", None, "durations count on; the weights are the same", training),
    Fault(
        "checkpoints have files of the wrong age",
        None,
        "the newest by its step is taken, the oldest by its step goes",
        ages,
    ),
    Fault("a record is saved again at an earlier time", None, "the one that was saved last", records),
)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_clock(fault, memory_folder, clock):
    fault.inject(memory_folder / "run", clock)
