"""What the mask of a decoder's attention says: which tokens belong together, and which nobody sees.

Most masks are causal within stretches of tokens: padding on the left or right, packed documents. Each stretch is then a
sequence of its own, and is planned and computed as if it stood alone; what the mask hides never enters. What is left
over, a sliding window say, keeps its mask within its stretch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from entreg.errors import InputError

# A model's own selection of keys may leave a query's own key out, and look like padding that sees the text before it.
# So few rows are served in any case.
_LEAST_PADDING = 8

Places = slice | Tensor
"""Places of tokens, ascending: a slice where they are neighbours, int64 positions where they are not."""


@dataclass(frozen=True, eq=False)
class Segment:
    """Tokens that attention treats as a sequence of its own, or queries that see keys but not their own.

    Attributes:
        sequences: the batch elements, ascending.
        queries: places of its queries.
        keys: places of its keys; the last of them are those of the queries.
        mask: (number of sequences or 1, 1, queries, keys) bool, True where attention is allowed; None where every query
            sees all keys of the segment up to its own.
        owned: whether the queries' own keys are among the keys. Others are served densely, and count in no budget.
    """

    sequences: tuple[int, ...]
    queries: Places
    keys: Places
    mask: Tensor | None = None
    owned: bool = True

    @property
    def sizes(self) -> tuple[int, int]:
        """How many queries and keys."""
        return _length(self.queries), _length(self.keys)

    def of_queries(self, x: Tensor) -> Tensor:
        """(number of sequences, heads, queries, d) of x (batch, heads, n, d); a view where the places allow one."""
        return _taken(_of_sequences(x, self.sequences), self.queries)

    def of_keys(self, x: Tensor) -> Tensor:
        """(number of sequences, heads, keys, d) of x (batch, heads, m, d); a view where the places allow one."""
        return _taken(_of_sequences(x, self.sequences), self.keys)

    def put_queries(self, x: Tensor, part: Tensor) -> None:
        """Write (number of sequences, heads, queries, d) into x (batch, heads, n, d)."""
        first, last = self.sequences[0], self.sequences[-1]
        if last - first + 1 == len(self.sequences):
            x[first : last + 1, :, self.queries] = part
        else:
            for sequence, one in zip(self.sequences, part, strict=True):
                x[sequence, :, self.queries] = one

    def of_mask(self, x: Tensor) -> Tensor:
        """(number of sequences, 1, queries, keys) of x (batch, 1, n, m)."""
        x = self.of_queries(x)
        return x[..., self.keys] if isinstance(self.keys, slice) else x.index_select(3, self.keys.to(x.device))

    def entries(self, heads: int, device: torch.device) -> tuple[Tensor, ...]:
        """Indices of the segment's entries in a (batch, heads, n, m) tensor, broadcast to each other."""
        sequences = torch.tensor(self.sequences, device=device)
        queries, keys = (
            torch.arange(one.start, one.stop, device=device) if isinstance(one, slice) else one.to(device)
            for one in (self.queries, self.keys)
        )
        return (
            sequences[:, None, None, None],
            torch.arange(heads, device=device)[:, None, None],
            queries[:, None],
            keys,
        )


@dataclass(frozen=True, eq=False)
class MaskForm:
    """A mask, and the segments that it consists of; see :func:`mask_form`.

    Attributes:
        mask: (batch, 1, n, m) bool, as given.
        plain: whether it says no more than that attention is causal.
        first_keys: of one query only: the first key that it sees in each sequence, if it sees all from there on.
        segments: what it consists of; queries in none of them are padding.
    """

    mask: Tensor
    plain: bool
    first_keys: tuple[int, ...] | None
    segments: tuple[Segment, ...]
    _parts: dict[tuple[int, int], MaskForm] = field(default_factory=dict, repr=False)

    def part(self, first: int, last: int) -> MaskForm:
        """The form for the queries from one to another (exclusive), with the keys up to the last one's own."""
        if (first, last) not in self._parts:
            n, m = self.mask.shape[2:]
            self._parts[first, last] = mask_form(self.mask[:, :, first:last, : m - n + last])
        return self._parts[first, last]


@torch.no_grad()
def mask_form(mask: Tensor) -> MaskForm:
    """Find the segments of a mask: stretches of tokens that see nothing outside of them.

    A token that no query sees is in none, wherever it stands. A query whose own key is such a token belongs to padding:
    its output is zero, but where it sees keys of its own choice.

    Args:
        mask: (batch, 1, n, m) bool, True where attention is allowed; the last query stands at the last key. No query
            may see a later key.

    Raises:
        InputError: a tensor of another kind, or a mask that allows later keys.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1:
        found = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(f"mask must be bool of shape (batch, 1, queries, keys), got {found}")
    n, m = mask.shape[2:]
    if n > m:
        raise InputError(f"causal attention needs at least as many keys as queries, got {m} < {n}")
    if n == 1:
        return _form_of_one_query(mask)
    # Bits of whole masks: numpy's loops over them take a hundredth of PyTorch's on a CPU.
    seen = mask[:, 0].cpu().numpy()
    causal = np.tri(n, m, m - n, dtype=bool)
    if np.array_equal(seen, np.broadcast_to(causal, seen.shape)):
        return MaskForm(mask, True, None, (_whole(mask),))
    if (seen > causal).any():
        raise InputError(
            "the mask lets queries see later keys, which the sparse path of causal decoders does not; keep such layers "
            "or inputs dense"
        )
    same = len(mask) > 1 and (seen == seen[:1]).all()
    repeats = len(mask) if same else 1
    return MaskForm(mask, False, None, tuple(_segments(mask[:1] if same else mask, seen, repeats)))


def _form_of_one_query(mask: Tensor) -> MaskForm:
    seen = mask[:, 0, 0]
    m = seen.shape[1]
    # On the device once, both numbers.
    first, number, own = torch.stack((seen.to(torch.int8).argmax(1), seen.sum(1), seen[:, -1].long())).tolist()
    if all(own) and all(f + count == m for f, count in zip(first, number, strict=True)):
        plain = not any(first)
        return MaskForm(mask, plain, None if plain else tuple(first), (_whole(mask),) if plain else ())
    return MaskForm(mask, False, None, tuple(_segments(mask, mask[:, 0].cpu().numpy(), 1)))


def _whole(mask: Tensor) -> Segment:
    batch, _, n, m = mask.shape
    return Segment(tuple(range(batch)), slice(0, n), slice(0, m))


def _segments(mask: Tensor, seen: np.ndarray, repeats: int) -> Iterator[Segment]:
    """The segments of (batch, 1, n, m), and the same as (batch, n, m) bits; ``repeats`` sequences share one mask."""
    m = mask.shape[3]
    found: dict[tuple, list[Segment]] = {}
    for sequence in range(len(mask)):
        bits = seen[sequence]
        number = bits.view(np.uint8).sum(1, dtype=np.uint16 if m < 2**16 else np.uint32).astype(np.int64)
        for queries, keys, full, owned in _stretches(bits.any(0), bits.argmax(1), number):
            places = _as_slice(queries), _as_slice(keys)
            part = None if full else _taken(_taken(mask[sequence : sequence + 1], places[0]), places[1], 3)
            # Those at the same places are computed together.
            kind = (queries.tobytes(), keys.tobytes(), full, owned)
            found.setdefault(kind, []).append(Segment((sequence,), *places, part, owned))
    for members in found.values():
        while members:
            one = members[0]
            alike = [x for x in members if x.mask is None or x is one or torch.equal(x.mask, one.mask)]
            members = [x for x in members if not any(x is other for other in alike)]
            sequences = tuple(range(repeats)) if repeats > 1 else tuple(x.sequences[0] for x in alike)
            yield replace(one, sequences=sequences)


def _stretches(
    key_seen: np.ndarray, first_key: np.ndarray, number: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, bool, bool]]:
    """Segments of one sequence: places of queries and keys, whether each query sees all up to its own, ``owned``.

    Args:
        key_seen: (m,) whether some query sees the key.
        first_key: (n,) first key that each query sees.
        number: (n,) how many keys it sees.
    """
    n, m = len(first_key), len(key_seen)
    keys = np.flatnonzero(key_seen)
    if not keys.size:
        return
    # From here on tokens are counted without those that nobody sees.
    rank = np.cumsum(key_seen) - 1
    queries = np.flatnonzero(key_seen[m - n :])
    own = rank[queries + m - n]
    first = np.where(number[queries] > 0, rank[first_key[queries]], own)
    earliest = np.arange(len(keys))
    earliest[own] = first
    # A stretch begins where nobody from there on sees anything before.
    earliest = np.minimum.accumulate(earliest[::-1])[::-1]
    starts = np.flatnonzero(earliest == np.arange(len(keys)))
    whole = number[queries] == own - first + 1
    padding = np.zeros(0, np.int64)
    others = np.flatnonzero(~key_seen[m - n :] & (number > 0))
    for start, end in zip(starts, [*starts[1:], len(keys)], strict=True):
        within = slice(*np.searchsorted(own, (start, end)))
        if within.start < within.stop:
            full = bool((whole[within] & (first[within] == start)).all())
            yield queries[within], keys[start:end], full, True
            if full and end == len(keys):
                # What stands behind the last document and sees all of it.
                padding = others[(first_key[others] == keys[start]) & (number[others] == end - start)]
    if others.size and padding.size >= _LEAST_PADDING:
        others = np.setdiff1d(others, padding)
    if others.size:
        yield others, keys, False, False


def _as_slice(places: np.ndarray) -> Places:
    first, last = int(places[0]), int(places[-1])
    return slice(first, last + 1) if last - first + 1 == len(places) else torch.from_numpy(places)


def _length(places: Places) -> int:
    return places.stop - places.start if isinstance(places, slice) else len(places)


def _of_sequences(x: Tensor, sequences: Sequence[int]) -> Tensor:
    first, last = sequences[0], sequences[-1]
    if last - first + 1 == len(sequences):
        return x[first : last + 1]
    return x.index_select(0, torch.tensor(sequences, device=x.device))


def _taken(x: Tensor, places: Places, dim: int = 2) -> Tensor:
    if isinstance(places, slice):
        return x.narrow(dim, places.start, _length(places))
    return x.index_select(dim, places.to(x.device))
