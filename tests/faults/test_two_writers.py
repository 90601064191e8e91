"""Several processes that write the same thing at once."""

import time

import pytest
import torch

from entreg.records import RecordStore
from entreg.training.checkpoints import latest_checkpoint, read_checkpoint, save_checkpoint
from tests.faults import victims
from tests.faults.catalogue import Fault
from tests.faults.processes import start, together
from tests.records.samples import sample_record

TITLE = "Two processes that write the same (a job started twice)"
WRITERS = 3


def records(folder):
    store = RecordStore(folder / "runs")
    record = sample_record(rows=[{"t": value} for value in range(100)])
    seen = 0
    with together(folder, WRITERS, victims.save_record, folder / "runs", record, 20) as running:
        while any(process.is_alive() for process in running):
            # A reader at any moment finds one of the records, whole.
            found = store.load_all()
            assert [one["id"] for one in found] in ([record["id"]], [])
            seen += len(found)
    assert seen > 0
    assert [path.name for path in store.root.iterdir()] == [store.path_for("geometry/hull", record["config"]).name]


def checkpoints(folder):
    model = {"weight": torch.arange(5000)}
    steps = [*range(1, 12)] * 3
    with together(folder, WRITERS, victims.save_checkpoints, folder / "run", model, steps, 3) as running:
        while any(process.is_alive() for process in running):
            found = latest_checkpoint(folder / "run")
            assert found is None or torch.equal(found.model["weight"], model["weight"])
    left = sorted(path.name for path in (folder / "run").iterdir())
    assert left == ["step-00000009", "step-00000010", "step-00000011"]
    for name in left:
        assert read_checkpoint(folder / "run" / name).state["writer"] in range(WRITERS)


def killed_checkpoint(folder):
    model, steps = {"weight": torch.arange(200_000)}, [*range(1, 60)]
    with together(folder, 2, victims.save_checkpoints, folder / "run", model, steps, 2) as running:
        # More of them are killed while they write; the others clear away what those leave, nothing of each other's.
        for number in range(8):
            another = start(folder / "log-killed", victims.save_checkpoints, folder / "run", model, steps, 2, 9)
            time.sleep(0.01 * number)
            another.kill()
            another.join()
        assert all(process.exitcode in (None, 0) for process in running)
    # The last one may have been killed when the others were done.
    save_checkpoint(folder / "run", 60, model, {"writer": 0}, keep=2)
    # One that is killed before it can say that it is alive leaves an empty folder.
    left = sorted(path.name for path in (folder / "run").iterdir() if path.suffix != ".new")
    assert left == ["step-00000059", "step-00000060"]
    assert all(read_checkpoint(folder / "run" / name) for name in left)


def trainings(folder):
    with together(folder, 2, victims.train_as, folder / "run"):
        pass
    both = latest_checkpoint(folder / "run" / "checkpoints")
    victims.train(folder / "alone")
    alone = latest_checkpoint(folder / "alone" / "checkpoints")
    assert both.step == alone.step
    assert all(torch.equal(value, both.model[name]) for name, value in alone.model.items())


FAULTS = (
    Fault("three processes save the same record", None, "the record of one of them, whole at every moment", records),
    Fault(
        "three processes save the same checkpoints",
        None,
        "checkpoints that are each of one of them, whole",
        checkpoints,
    ),
    Fault(
        "some of them are killed while they write",
        None,
        "as before; what they were writing is cleared away by the others, whose own is not",
        killed_checkpoint,
    ),
    Fault(
        "two trainings run in one folder",
        None,
        "the weights of one, to the bit (a sweep's lock keeps the second from starting at all)",
        trainings,
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_two_writers(fault, memory_folder):
    fault.inject(memory_folder)
