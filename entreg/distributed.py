"""One run in several processes, as ``torchrun`` or ``accelerate launch`` start them.

Every process calls the same functions. The first one writes and prints; work that falls into items is shared, item i
being the turn of process i modulo their number, and what was found is put back in the order of one process. Without a
launcher all of this is the identity.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from entreg.errors import ProcessError

T = TypeVar("T")

_PATIENCE = datetime.timedelta(hours=2)
"""How long a process waits for the others: while the first one writes a large checkpoint, say."""

_LOST = (
    "The run was ended, because one of its processes was killed or failed; what was finished is kept, and the same "
    "command goes on from the newest checkpoint."
)


def launched() -> bool:
    """Whether a launcher started this process together with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process is the one that writes and prints; known before the processes have met."""
    return not launched() or int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def joined(device: str) -> Iterator[None]:
    """The processes of a launcher meet, if they have not yet; what ends them inside the block is said in one sentence.

    Args:
        device: ``cpu``, or ``cuda``, of which each process on a machine then has one of its own.

    Raises:
        ProcessError: another process of the run ended in the middle of it.
    """
    if not launched():
        yield
        return
    import torch
    from accelerate import PartialState

    if num_processes() == 1:
        PartialState(cpu=device == "cpu", timeout=_PATIENCE)
        atexit.register(_leave)
    # A launcher ends the other processes so when one has failed: that needs a sentence and no traceback.
    previous = signal.signal(signal.SIGTERM, _ended)
    try:
        yield
    except BaseException as error:
        # The others may be gone, and saying goodbye would wait for them; and the launcher must not end this process
        # before it has said why.
        atexit.unregister(_leave)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            raise ProcessError(_LOST) from error
        raise
    signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing is printed inside the block by any process but the first; errors are."""
    if is_first():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nothing, contextlib.redirect_stdout(nothing):
        yield


def num_processes() -> int:
    """Processes that work together now."""
    return _group().get_world_size() if _group() is not None else 1


def my_turns(count: int) -> range:
    """Which of ``count`` items are this process's."""
    group = _group()
    return range(count) if group is None else range(group.get_rank(), count, group.get_world_size())


def in_order(mine: Sequence[T]) -> list[T]:
    """What all processes found, in the order of one process; every process calls it and gets the same.

    Args:
        mine: what this process found, one value for each of its turns, see :func:`my_turns`.
    """
    found = from_all(list(mine))
    return [found[item % len(found)][item // len(found)] for item in range(sum(map(len, found)))]


def from_all(value: T) -> list[T]:
    """The values of all processes; every process calls it and gets the same."""
    group = _group()
    if group is None:
        return [value]
    found: list[Any] = [None] * group.get_world_size()
    group.all_gather_object(found, value)
    return found


def mean_of_all(value: float) -> float:
    """The mean of what all processes have; every process calls it and gets the same."""
    return math.fsum(found := from_all(value)) / len(found)


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, for all of them; the others do not call ``make``."""
    group = _group()
    if group is None:
        return make()
    content = [make() if group.get_rank() == 0 else None]
    group.broadcast_object_list(content)
    return content[0]


def tells() -> bool:
    """Whether this process is to say why the run ends: of all processes that ask, the first one."""
    if not launched():
        return True
    import torch

    try:
        # The launcher's own store, which outlives the processes.
        store = torch.distributed.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=5),
        )
        return store.add(f"entreg/told/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except (RuntimeError, KeyError):
        # Better said twice than never.
        return True


def _group() -> Any:
    """torch.distributed with its process group, or None while this process is alone."""
    import sys

    # Without torch nothing can have been joined, and loading it takes seconds.
    group = getattr(sys.modules.get("torch"), "distributed", None)
    return group if group is not None and group.is_available() and group.is_initialized() else None


def _leave() -> None:
    _group().destroy_process_group()


def _ended(number: int, frame: Any) -> None:
    raise ProcessError(_LOST)
