"""What a training step sees, as a function of seed and step alone.

A *position* counts items over all epochs: position = epoch * len(dataset) + index. Every epoch is a permutation of
the data set drawn from (seed, epoch); step s of a run takes the ranks s * batch_size onward. Whatever is random in an
item is drawn from (seed, position), mixing from (seed, step), and the model's own randomness from (seed, step, part).
So a batch depends neither on what ran before, nor on the number of workers, and a resumed run needs only its step.
"""

from __future__ import annotations

import contextlib
import random
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from entreg.errors import AssetError, ConfigError, EntregError, InputError

# Streams of random numbers under one seed.
_ORDER, _ITEM, _MIXING, _FORWARD = range(4)

_QUEUE_PLACES = 8
"""Of a batch that draw from one queue of blocks: fewer would mix better, more would read fewer blocks at a time."""


def _draw(seed: int, *what: int) -> int:
    """A 64-bit seed for one purpose; different arguments give independent streams."""
    return int(np.random.SeedSequence([seed, *what]).generate_state(1, np.uint64)[0])


def _seed_everything(value: int) -> None:
    """Seeds Python, numpy and torch's CPU generator; a CUDA generator is left alone."""
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002 - timm's transforms draw from numpy's global state
    torch.default_generator.manual_seed(value)


@contextlib.contextmanager
def kept_random_state(*, cuda: bool = False) -> Iterator[None]:
    """Leaves the random states of Python, numpy and torch as they were.

    Args:
        cuda: those of all CUDA devices, too; not in a process that loads data, which must not touch them.
    """
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda else ()):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


def seed_forward(seed: int, step: int, part: int) -> None:
    """Seeds everything that the model may draw from in one forward and backward pass.

    Args:
        seed: of the run.
        step: number of the step, from 0.
        part: number of the part of the step's batch, over processes and accumulation.
    """
    value = _draw(seed, _FORWARD, step, part)
    _seed_everything(value)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(value)


class PositionedDataset(Dataset):
    """A data set by position instead of index, with everything random in an item drawn from (seed, position).

    Python's, numpy's and torch's generators are seeded before an item is read and augmented, and put back afterwards.
    A data set that has ``__getitems__(indices)`` is read by it, many items at once; what it returns must then depend
    on the index alone (``torch.utils.data.Subset`` counts only when the data set below it has one).

    Args:
        dataset: map-style; items are mappings of tensors.
        seed: of the run.
        augment: applied to ``images`` of every item, which must then have them; for example a transform of timm or
            torchvision. It does not see masks: whatever moves pixels must not be used when masks are trained on.

    Raises:
        InputError: the data set is empty.
    """

    def __init__(self, dataset: Any, seed: int, augment: Callable[[Tensor], Tensor] | None = None) -> None:
        if len(dataset) == 0:
            raise InputError("the training data set is empty; training needs at least one item")
        self.dataset = dataset
        self.seed = seed
        self.augment = augment
        self._at_once = _reads_many(dataset)

    @property
    def blocks(self) -> np.ndarray | None:
        """How many items, in order, are read together, for :class:`Positions`; None where each is read by itself."""
        return getattr(self.dataset, "blocks", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> Mapping[str, Any]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Mapping[str, Any]]:
        """Items at any positions, at least 0."""
        indices = [position % len(self.dataset) for position in positions]
        if self._at_once and self.augment is None:
            return self.dataset.__getitems__(indices)
        items = self.dataset.__getitems__(indices) if self._at_once else [None] * len(indices)
        with kept_random_state():
            return [self._item(*each) for each in zip(positions, indices, items, strict=True)]

    def _item(self, position: int, index: int, item: Mapping[str, Any] | None) -> Mapping[str, Any]:
        _seed_everything(_draw(self.seed, _ITEM, position))
        if item is None:
            item = self.dataset[index]
        return item if self.augment is None else {**item, "images": self.augment(item["images"])}


def _reads_many(dataset: Any) -> bool:
    # Subset always has the method, and falls back to a loop inside it, which cannot be seeded item by item.
    if isinstance(dataset, Subset):
        return _reads_many(dataset.dataset)
    return hasattr(dataset, "__getitems__")


class Positions:
    """The positions of every part of every step, from a given step on; the batch sampler of :func:`batch_loader`.

    The global batch of a step is split into ``parts`` parts of equal size, over processes and accumulation. A part
    holds pairs (i, batch_size - 1 - i) of the batch, in order, so that reversing each part reverses the whole batch:
    mixing, which mixes a batch with its reverse, is then the same for every number of parts.

    Args:
        size: items of the data set, at least 1.
        batch_size: global, a multiple of ``parts``.
        seed: of the run.
        steps: range of steps, for example ``range(first, total)``.
        parts: of one step.
        mine: which of them, in order.
        blocks: numbers of items, in order, that are read together; they add up to ``size``. Epochs are then permuted
            so that few of them are needed at a time: every eight places in a batch have a queue of blocks of their own,
            drawn at random, which they go through one after the other, each in random order. A part, which has always
            the same places, reads its own blocks and no others, but where the queues end.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        steps: range,
        parts: int = 1,
        mine: Sequence[int] = (0,),
        blocks: np.ndarray | None = None,
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.steps = steps
        self.blocks = blocks
        pairs = np.stack([np.arange(batch_size), np.arange(batch_size)[::-1]], axis=1).ravel()[:batch_size]
        self._parts = [np.sort(pairs.reshape(parts, -1)[part]) for part in mine]
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.steps) * len(self._parts)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            batch = self.batch(step)
            for part in self._parts:
                yield batch[part].tolist()

    def batch(self, step: int) -> np.ndarray:
        """Positions (batch_size,) int64 of the whole batch of one step."""
        ranks = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = ranks // self.size
        result = np.empty_like(ranks)
        for epoch in range(epochs[0], epochs[-1] + 1):
            inside = epochs == epoch
            result[inside] = epoch * self.size + self._epoch(epoch)[ranks[inside] % self.size]
        return result

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            generator = np.random.default_rng(_draw(self.seed, _ORDER, epoch))
            whole = self.blocks is None
            self._order = (epoch, generator.permutation(self.size) if whole else self._queued(epoch, generator))
        return self._order[1]

    def _queued(self, epoch: int, generator: np.random.Generator) -> np.ndarray:
        """A permutation that reads few blocks at a time; see the arguments of the class."""
        places = np.arange(self.batch_size)
        # As parts hold pairs of places, so do queues.
        queue_of = np.minimum(places, places[::-1]) // (_QUEUE_PLACES // 2)
        starts = np.cumsum(self.blocks) - self.blocks
        order = generator.permutation(len(self.blocks))
        items = np.concatenate([starts[block] + generator.permutation(self.blocks[block]) for block in order])
        # Blocks are dealt out to the queues in turn.
        num_queues = int(queue_of.max()) + 1
        queues = np.repeat(np.arange(len(order)) % num_queues, self.blocks[order])
        batch, place = np.empty(self.size, dtype=np.int64), np.empty(self.size, dtype=np.int64)
        for queue in range(num_queues):
            mine, own = np.flatnonzero(queues == queue), np.flatnonzero(queue_of == queue)
            batch[mine], place[mine] = np.arange(len(mine)) // len(own), own[np.arange(len(mine)) % len(own)]
        # The epoch may begin in the middle of a batch.
        return items[np.lexsort(((place - epoch * self.size) % self.batch_size, batch))]


def batch_loader(dataset: PositionedDataset, positions: Positions, *, num_workers: int, pin: bool) -> DataLoader:
    """Batches in the order of ``positions``; with ``num_workers`` processes that load ahead, or none."""
    return DataLoader(
        dataset,
        batch_sampler=positions,
        num_workers=num_workers,
        pin_memory=pin,
        collate_fn=default_collate,
        # Without it, the loader would draw its workers' seed from the caller's random state.
        generator=torch.Generator(),
    )


@contextlib.contextmanager
def loading_errors() -> Iterator[None]:
    """One sentence for what goes wrong in the processes of a loader; to be put around whatever its batches are used by.

    Around the use, too: the death of such a process interrupts this one wherever it is.

    Raises:
        AssetError: such a process was killed.
        EntregError: of the class and with the sentence that the data set raised in such a process.
    """
    try:
        yield
    except EntregError as error:
        # From another process torch gives on the whole traceback as text, the sentence at its end.
        kind = type(error)
        sentence = str(error).strip().rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2]
        if sentence == str(error):
            raise
        raise kind(sentence) from error
    except (RuntimeError, OSError, EOFError) as error:
        if not _tells_of_a_death(error):
            raise
        # As long as a loader is held by the frames of a kept exception, torch tells of the death again, anywhere.
        traceback.clear_frames(error.__traceback__)
        raise AssetError(
            "a process that loads data was killed, most likely for want of memory; lower num_workers or batch_size"
        ) from error


def _tells_of_a_death(error: Exception) -> bool:
    """Whether an exception comes from the death of a process that loads data."""
    if isinstance(error, RuntimeError):
        return "DataLoader worker" in str(error)
    # It died between sending a batch and handing over the memory that the batch is in.
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == "multiprocessing.resource_sharer" for frame, _ in frames)


class Mixing:
    """Mixup and CutMix of timm, one draw per step.

    Args:
        mixup: alpha of mixup (Zhang et al., 2018); 0 for none.
        cutmix: alpha of CutMix (Yun et al., 2019); 0 for none. With both, each step takes one of them, evenly.
        probability: of mixing at all, in [0, 1].
        num_classes: of the labels.
        seed: of the run.
    """

    def __init__(self, mixup: float, cutmix: float, probability: float, num_classes: int, seed: int) -> None:
        from timm.data import Mixup

        self.seed = seed
        self._mix = Mixup(
            mixup_alpha=mixup, cutmix_alpha=cutmix, prob=probability, label_smoothing=0.0, num_classes=num_classes
        )

    def __call__(self, batch: Mapping[str, Any], step: int) -> dict[str, Any]:
        """The batch with mixed images (in place) and labels (batch, classes) as probabilities.

        Raises:
            ConfigError: items have no images, several labels each, or an odd number of them is to be mixed.
        """
        if "images" not in batch:
            raise ConfigError(f"mixup and cutmix mix images, the items of this data set have {', '.join(batch)}")
        images, labels = batch["images"], batch["labels"]
        if labels.dim() != 1 or len(labels) % 2:
            raise ConfigError(
                "mixup and cutmix need one label per image and an even number of images in every part of a batch, "
                f"got labels of shape {tuple(labels.shape)}"
            )
        # timm draws from numpy's global state.
        np.random.seed(_draw(self.seed, _MIXING, step) % 2**32)  # noqa: NPY002
        images, labels = self._mix(images, labels)
        return {**batch, "images": images, "labels": labels}
