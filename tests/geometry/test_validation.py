"""What is accepted as points, what is refused, and how."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from entreg.errors import InputError
from entreg.geometry import convex_hull, pareto_front
from entreg.geometry.validation import as_points, first_nonfinite_row, require_finite

SQUARE = [[0, 0], [4, 0], [4, 4], [0, 4], [1, 2]]


def test_float64_arrays_are_not_copied():
    points = np.array(SQUARE, dtype=np.float64)
    assert as_points(points) is points
    points.flags.writeable = False
    alias = as_points(points)
    assert np.shares_memory(alias, points)
    assert alias.flags.writeable


def test_alias_of_a_read_only_array_keeps_its_memory_alive():
    points = np.random.default_rng(0).random((1000, 2))
    total = points.sum()
    points.flags.writeable = False
    alias = as_points(points)
    del points
    assert alias.sum() == total


FORMS = {
    "list": lambda p: p.tolist(),
    "tuples": lambda p: [tuple(row) for row in p.tolist()],
    "float32": lambda p: p.astype(np.float32),
    "float16": lambda p: p.astype(np.float16),
    "int8": lambda p: p.astype(np.int8),
    "int64": lambda p: p.astype(np.int64),
    "uint64": lambda p: p.astype(np.uint64),
    "longdouble": lambda p: p.astype(np.longdouble),
    "fortran order": np.asfortranarray,
    "strided columns": lambda p: np.repeat(p, 2, axis=1)[:, ::2],
    "strided rows": lambda p: np.repeat(p, 3, axis=0)[::3],
    "reversed twice": lambda p: p[::-1].copy()[::-1],
    "big endian": lambda p: p.astype(">f8"),
    "unaligned": lambda p: np.frombuffer(b"\0" + p.tobytes(), np.uint8)[1:].view(np.float64).reshape(p.shape),
    "subclass": lambda p: p.view(np.matrix),
    "torch float64": torch.from_numpy,
    "torch float32": lambda p: torch.from_numpy(p).float(),
    "torch bfloat16": lambda p: torch.from_numpy(p).bfloat16(),
    "torch int64": lambda p: torch.from_numpy(p).long(),
    "torch transposed": lambda p: torch.from_numpy(p.T.copy()).T,
    "torch with gradient": lambda p: torch.from_numpy(p).clone().requires_grad_(),
    "parameter": lambda p: torch.nn.Parameter(torch.from_numpy(p).clone()),
}


@pytest.mark.parametrize("form", FORMS)
def test_accepted_forms(form):
    points = np.array(SQUARE, dtype=np.float64)
    given = FORMS[form](points)
    array = as_points(given)
    assert type(array) is np.ndarray
    assert array.dtype == np.float64
    assert array.dtype.isnative
    assert array.flags.c_contiguous
    assert array.flags.aligned
    assert np.array_equal(array, points)
    assert convex_hull(given).tolist() == [0, 1, 2, 3]
    assert pareto_front(given).tolist() == [2]


REFUSED = {
    "one dimension": np.zeros(4),
    "three columns": np.zeros((4, 3)),
    "three dimensions": np.zeros((2, 2, 2)),
    "scalar": 1.0,
    "none": None,
    "empty list": [],
    "no rows": np.zeros((0, 2)),
    "ragged": [[0.0, 1.0], [2.0]],
    "strings": [["0", "1"]],
    "bool": np.zeros((4, 2), dtype=bool),
    "complex": np.zeros((4, 2), dtype=complex),
    "fractions": [[Fraction(1, 3), Fraction(1)]],
    "dates": np.zeros((4, 2), dtype="datetime64[s]"),
    "records": np.zeros(4, dtype=[("x", "f8"), ("y", "f8")]),
    "masked": np.ma.masked_invalid(np.full((4, 2), np.nan)),
    "unrepresentable int64": np.array([[0, 0], [2**53 + 1, 0]]),
    "largest int64": np.array([[0, 2**63 - 1]]),
    "largest uint64": np.array([[0, 2**64 - 1]], dtype=np.uint64),
    "integers beyond 64 bits": [[0, 2**70]],
    "unrepresentable longdouble": np.array([[1, 0]], dtype=np.longdouble) + np.finfo(np.longdouble).eps,
    "torch bool": torch.zeros((4, 2), dtype=torch.bool),
    "torch complex": torch.zeros((4, 2), dtype=torch.complex64),
    "torch meta": torch.zeros((4, 2), device="meta"),
    "torch sparse": torch.eye(2).to_sparse(),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("function", [as_points, convex_hull, pareto_front])
def test_refused_with_one_sentence(kind, function):
    with pytest.raises(InputError) as caught:
        function(REFUSED[kind])
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    assert 20 < len(message) < 160


def test_integers_beyond_two_to_the_53_are_taken_when_exact():
    values = np.array([[2**60, -(2**62)], [2**53 + 2, -(2**63)]])
    assert np.array_equal(as_points(values), values.astype(np.float64))
    assert as_points(np.array([[2**63, 0]], dtype=np.uint64))[0, 0] == 2.0**63


def test_too_few_points():
    with pytest.raises(InputError, match="At least 4 points are needed, but there are 3"):
        as_points(np.zeros((3, 2)), minimum=4)


@pytest.mark.parametrize("n", [1, 4095, 4096, 10_000])
def test_first_nonfinite_row(n):
    points = np.ones((n, 2))
    assert first_nonfinite_row(points) == -1
    require_finite(points)
    for value in (np.nan, np.inf, -np.inf):
        for column in (0, 1):
            points[:] = 1.0
            points[n - 1, column] = value
            assert first_nonfinite_row(points) == n - 1
            points[n // 3, 1 - column] = value
            assert first_nonfinite_row(points) == n // 3
            with pytest.raises(InputError, match=f"point {n // 3} "):
                require_finite(points)
