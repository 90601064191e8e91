from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entreg.entropy import run_boundaries, run_entropy
from entreg.errors import InputError


def is_monotone(values: list[int]) -> bool:
    return values in (sorted(values), sorted(values, reverse=True))


def fewest_runs(values: list[int]) -> int:
    """By dynamic programming over all ways to cut."""
    best = [0]
    for stop in range(1, len(values) + 1):
        best.append(1 + min(best[start] for start in range(stop) if is_monotone(values[start:stop])))
    return best[-1]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=14))
@settings(max_examples=300, deadline=None)
def test_runs_are_monotone_maximal_and_as_few_as_possible(values: list[int]) -> None:
    offsets = run_boundaries(values).tolist()
    assert offsets[0] == 0
    assert offsets[-1] == len(values)
    for start, stop in pairwise(offsets):
        assert start < stop
        assert is_monotone(values[start:stop])
        assert stop == len(values) or not is_monotone(values[start : stop + 1])
    assert len(offsets) - 1 == fewest_runs(values)
    sizes = np.diff(offsets) / len(values)
    assert run_entropy(values) == pytest.approx(-(sizes * np.log(sizes)).sum(), abs=1e-14)


def test_ties_extend_a_run_and_the_first_unequal_pair_sets_its_direction() -> None:
    assert run_boundaries([2, 2, 1, 1, 0, 0, 5]).tolist() == [0, 6, 7]
    assert run_boundaries([1, 2, 2, 1, 1, 3]).tolist() == [0, 3, 6]
    assert run_boundaries([4, 4, 4]).tolist() == [0, 3]


def test_known_entropies() -> None:
    n = 100_000
    rng = np.random.default_rng(0)
    assert run_entropy(np.arange(n)) == 0.0
    assert run_entropy(np.arange(n)[::-1]) == 0.0
    for runs in (2, 16, 1000):
        # A piece's first element nearly always lies below the last of the piece before, which ends that run.
        pieces = np.sort(rng.random((runs, n // runs)), axis=1)
        assert run_entropy(pieces.ravel()) == pytest.approx(np.log(runs), rel=1e-3)
    assert np.log(n) - 1.2 < run_entropy(rng.random(n)) < np.log(n)


def test_every_kind_of_number_is_compared_exactly() -> None:
    big = 2**53
    assert len(run_boundaries(np.array([big, big + 1, big]))) == 3
    assert len(run_boundaries(np.array([big, big + 1, big], dtype=np.uint64) + np.uint64(2**63))) == 3
    assert len(run_boundaries([-np.inf, 0.0, np.inf])) == 2
    assert len(run_boundaries(torch.tensor([1.0, 2.0, 1.0], dtype=torch.bfloat16))) == 3
    assert len(run_boundaries(np.arange(20.0, dtype=np.float32)[::-2])) == 2
    assert len(run_boundaries([False, True, False])) == 3


@pytest.mark.parametrize(
    ("sequence", "words"),
    [
        ([], "not empty"),
        ([[1, 2]], "one-dimensional"),
        (3.0, "one-dimensional"),
        ([1.0, np.nan], "NaN"),
        (["a"], "real numbers"),
        ([1j], "real numbers"),
        ([[1], [1, 2]], "real numbers"),
        (np.zeros(3, dtype=np.longdouble), "64 bits"),
    ],
)
def test_bad_sequences_give_one_sentence(sequence: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        run_entropy(sequence)
