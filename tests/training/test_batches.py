"""Batches as functions of seed and step."""

import multiprocessing
import random
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from entreg.errors import AssetError, ConfigError, InputError
from entreg.training.batches import (
    Mixing,
    PositionedDataset,
    Positions,
    batch_loader,
    loading_errors,
    seed_forward,
)
from tests.training.tiny import Digits, ManyDigits, NoisyDigits, shift


def all_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


def test_every_epoch_has_every_item_once_in_another_order():
    positions = Positions(size=10, batch_size=4, seed=3, steps=range(5))
    order = np.concatenate([positions.batch(step) for step in range(5)]).reshape(2, 10)
    assert [sorted(epoch) for epoch in order.tolist()] == [list(range(10)), list(range(10, 20))]
    assert (order[0] != order[1] - 10).any()
    assert (order[0] != Positions(10, 10, seed=4, steps=range(1)).batch(0)).any()


def test_batches_depend_on_the_step_and_not_on_where_the_run_began():
    whole = list(Positions(7, 4, seed=0, steps=range(12)))
    assert list(Positions(7, 4, seed=0, steps=range(9, 12))) == whole[9:]
    # More than two epochs in one batch.
    assert sorted(np.array(list(Positions(3, 8, seed=0, steps=range(3)))).ravel()) == list(range(24))


@pytest.mark.parametrize(("batch_size", "parts"), [(12, 1), (12, 2), (12, 3), (12, 6), (15, 5)])
def test_parts_share_out_the_batch_and_its_mirror_pairs(batch_size, parts):
    batch = Positions(100, batch_size, seed=0, steps=range(1)).batch(0)
    split = list(Positions(100, batch_size, seed=0, steps=range(1), parts=parts, mine=range(parts)))
    assert len({len(part) for part in split}) == 1
    assert sorted(position for part in split for position in part) == sorted(batch)
    if batch_size // parts % 2 == 0:
        partner = dict(zip(batch.tolist(), batch[::-1].tolist(), strict=True))
        assert all(partner[one] == other for part in split for one, other in zip(part, part[::-1], strict=True))
    halves = [next(iter(Positions(100, batch_size, 0, range(1), parts, mine=[part]))) for part in range(parts)]
    assert halves == split


@pytest.mark.parametrize(
    "dataset", [NoisyDigits(), Subset(NoisyDigits(), range(4, 14)), ManyDigits(), Subset(ManyDigits(), range(4, 14))]
)
def test_items_depend_on_seed_and_position_alone(dataset):
    data = PositionedDataset(dataset, 3, shift)
    before = all_states()
    batch = data.__getitems__([1, 15, 1, 35])
    assert all_states() == before
    torch.manual_seed(77)
    again = PositionedDataset(dataset, 3, shift)
    for item, position in zip(batch, [1, 15, 1, 35], strict=True):
        assert torch.equal(again[position]["images"], item["images"])
    # Another epoch and another seed give the same item with other noise.
    assert batch[1]["labels"] == data[15 + len(dataset)]["labels"]
    assert not torch.equal(batch[1]["images"], data[15 + len(dataset)]["images"])
    assert not torch.equal(batch[1]["images"], PositionedDataset(dataset, 4, shift)[15]["images"])


def test_many_items_are_read_at_once_where_the_data_set_can():
    asked = []

    class Counting(ManyDigits):
        def __getitems__(self, indices):
            asked.append(list(indices))
            return super().__getitems__(indices)

    data = PositionedDataset(Counting(20), 0)
    items = data.__getitems__([0, 21, 42])
    assert asked == [[0, 1, 2]]
    assert torch.equal(items[1]["images"], Digits().images[1])


def test_empty_data_set_is_refused():
    with pytest.raises(InputError, match="empty"):
        PositionedDataset(Digits(0), 0)


def test_loader_gives_the_batches_in_order_and_leaves_the_random_state_alone():
    before = all_states()
    positions = Positions(20, 6, seed=0, steps=range(2, 5))
    loader = batch_loader(PositionedDataset(Digits(), 0), positions, num_workers=0, pin=False)
    batches = list(loader)
    assert all_states() == before
    assert len(batches) == len(loader) == 3
    for step, batch in zip(range(2, 5), batches, strict=True):
        # The order within a batch is the mirrored pairs', sorted; with one part the batch's own.
        assert torch.equal(batch["images"], Digits().images[positions.batch(step) % 20])


def test_forward_seed_is_of_step_and_part():
    def draw(*what):
        seed_forward(*what)
        return torch.rand(()).item(), np.random.rand(), random.random()  # noqa: NPY002

    assert draw(0, 5, 1) == draw(0, 5, 1)
    assert len({draw(*what) for what in [(0, 5, 1), (0, 5, 0), (0, 6, 1), (1, 5, 1)]}) == 4


def _batch(size=8):
    generator = torch.Generator().manual_seed(1)
    return {
        "images": torch.rand(size, 2, 8, 8, generator=generator),
        "labels": torch.randint(5, (size,), generator=generator),
    }


def _mixed(mixing, step, rows=slice(None)):
    return mixing({name: value[rows].clone() for name, value in _batch().items()}, step)


def test_mixup_is_the_published_formula():
    mixing, batch = Mixing(0.8, 0.0, 1.0, 5, seed=0), _batch()
    shares = set()
    for step in range(5):
        mixed = _mixed(mixing, step)
        one_hot = torch.nn.functional.one_hot(batch["labels"], 5).float()
        row = (batch["labels"] != batch["labels"].flip(0)).nonzero()[0, 0]
        share = mixed["labels"][row, batch["labels"][row]].item()
        shares.add(share)
        for name, clean in (("images", batch["images"]), ("labels", one_hot)):
            torch.testing.assert_close(mixed[name], share * clean + (1 - share) * clean.flip(0))
    assert len(shares) == 5


def test_cutmix_labels_are_the_shares_of_the_pixels():
    mixing, batch = Mixing(0.0, 1.0, 1.0, 5, seed=0), _batch()
    for step in range(5):
        mixed = _mixed(mixing, step)
        kept = (mixed["images"] == batch["images"]).float().mean().item()
        row = (batch["labels"] != batch["labels"].flip(0)).nonzero()[0, 0]
        assert mixed["labels"][row, batch["labels"][row]].item() == pytest.approx(kept, abs=1e-6)
        assert ((mixed["images"] == batch["images"]) | (mixed["images"] == batch["images"].flip(0))).all()


def test_mixing_by_parts_is_mixing_the_batch():
    mixing = Mixing(0.8, 1.0, 0.8, 5, seed=0)
    for step in range(10):
        whole = _mixed(mixing, step)
        for rows in ([0, 1, 6, 7], [2, 3, 4, 5]):
            part = _mixed(mixing, step, rows)
            assert torch.equal(part["images"], whole["images"][rows])
            assert torch.equal(part["labels"], whole["labels"][rows])


def test_mixing_refuses_what_it_cannot_mix():
    mixing = Mixing(0.8, 0.0, 1.0, 5, seed=0)
    with pytest.raises(ConfigError, match="one label per image"):
        mixing({"images": torch.rand(4, 1, 2, 2), "labels": torch.zeros(4, 3, dtype=torch.int64)}, 0)


def _send_and_wait(connection):
    # A tensor is sent as the right to fetch the memory that it is in from this process.
    connection.send_bytes(ForkingPickler.dumps(torch.zeros(3)))
    connection.recv_bytes()


def test_a_process_that_dies_before_its_batch_is_fetched():
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_send_and_wait, args=(there,))
    process.start()
    there.close()
    batch = here.recv_bytes()
    process.kill()
    process.join()
    with pytest.raises(AssetError, match="a process that loads data was killed"), loading_errors():
        ForkingPickler.loads(batch)


@pytest.mark.parametrize("error", [OSError("disk"), ConnectionResetError("server"), EOFError(), RuntimeError("other")])
def test_other_errors_are_not_of_loading(error):
    with pytest.raises(type(error)) as caught, loading_errors():
        raise error
    assert caught.value is error
