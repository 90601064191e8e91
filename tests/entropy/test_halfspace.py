"""HalfspaceEntropy against products over all sign patterns, closed forms and its limits."""

import itertools
import math

import pytest
import torch

from entreg.entropy import HalfspaceEntropy, partition_entropy
from entreg.errors import InputError
from tests.entropy.test_ball import points


def halfspace(data: torch.Tensor, number: int, **arguments) -> HalfspaceEntropy:
    module = HalfspaceEntropy(number, data.shape[-1], **arguments).to(data.dtype)
    return module.initialize_from(data, "random", seed=2)


def masses_by_definition(data, normals, offsets, tau):
    """Mean product of indicators of one set, pattern by pattern, first halfspace slowest."""
    patterns = list(itertools.product((0, 1), repeat=len(normals)))
    masses = [0.0] * len(patterns)
    for point in data.tolist():
        inside = []
        for normal, offset, width in zip(normals.tolist(), offsets.tolist(), tau, strict=True):
            margin = sum(w * x for w, x in zip(normal, point, strict=True)) - offset
            inside.append(1.0 / (1.0 + math.exp(-margin / width)))
        for index, pattern in enumerate(patterns):
            factors = (s if bit else 1.0 - s for bit, s in zip(pattern, inside, strict=True))
            masses[index] += math.prod(factors) / len(data)
    return masses


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_equals_the_formula(number):
    data = points(2, 25, 3)
    module = halfspace(data, number, sharpness=4.0, sharpness_unit="absolute")
    for one, value, masses in zip(data, module(data), module.masses(data), strict=True):
        expected = masses_by_definition(one, module.normals, module.offsets, [0.25] * number)
        torch.testing.assert_close(masses, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-14)
        assert value.item() == pytest.approx(-sum(m * math.log(m) for m in expected), rel=1e-11)


def test_data_unit_is_the_standard_deviation_of_each_projection():
    data = points(40, 3) * torch.tensor([1.0, 5.0, 0.1], dtype=torch.float64)
    module = halfspace(data, 3, sharpness=2.0)
    tau = ((data @ module.normals.detach().t()).std(0, correction=0) / 2.0).tolist()
    expected = masses_by_definition(data, module.normals, module.offsets, tau)
    assert module(data).item() == pytest.approx(-sum(m * math.log(m) for m in expected), rel=1e-11)


def test_data_unit_does_not_see_the_scale_of_data_or_normals():
    data = points(100, 2)
    module = halfspace(data, 4)
    expected = module(data).item()
    scaled = halfspace(data, 4)
    with torch.no_grad():
        scaled.normals.copy_(module.normals * 7.0)
        scaled.offsets.copy_(module.offsets * 7.0 * 1e3)
    assert scaled(1e3 * data).item() == pytest.approx(expected, rel=1e-10)


def test_closed_forms():
    module = HalfspaceEntropy(2, 2, sharpness=1e3, sharpness_unit="absolute").double()
    with torch.no_grad():
        module.normals.copy_(torch.eye(2))
    quadrants = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    assert module(quadrants).item() == pytest.approx(math.log(4), abs=1e-12)
    assert module(quadrants[:2]).item() == pytest.approx(math.log(2), abs=1e-12)
    assert module(quadrants[:1]).item() == pytest.approx(0.0, abs=1e-12)
    # On every boundary at once, all cells are equally likely, at any sharpness.
    assert module(torch.zeros(1, 2, dtype=torch.float64)).item() == pytest.approx(math.log(4), abs=1e-12)
    # Cell index: the first halfspace is the most significant bit.
    torch.testing.assert_close(
        module.masses(quadrants[1:2]), torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64), atol=1e-12, rtol=0
    )


def test_sharp_limit_is_the_entropy_of_sign_patterns():
    data = points(200, 3)
    module = halfspace(data, 6, sharpness=1e9)
    signs = (data @ module.normals.detach().t() - module.offsets.detach() >= 0).int()
    counts = signs.unique(dim=0, return_counts=True)[1]
    assert module(data).item() == pytest.approx(partition_entropy(counts.tolist()), abs=1e-9)


@pytest.mark.parametrize("chunk_size", [1000, 7])
def test_gradients_in_points_normals_and_offsets(chunk_size):
    data = points(2, 15, 2).requires_grad_()
    module = halfspace(data, 3, sharpness=1.5, sharpness_unit="absolute", chunk_size=chunk_size)
    parameters = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]

    def value(x, w, b):
        return torch.func.functional_call(module, {"normals": w, "offsets": b}, (x,))

    assert torch.autograd.gradcheck(value, (data, *parameters))


@pytest.mark.parametrize("unit", ["data", "absolute"])
def test_chunks_and_order_change_neither_value_nor_gradient(unit):
    results = []
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1))
    for chunk_size, permutation in ((10_000, slice(None)), (32, slice(None)), (32, order)):
        data = points(2, 90, 3).requires_grad_()
        module = halfspace(data, 4, sharpness=3.0, sharpness_unit=unit, chunk_size=chunk_size)
        value = module(data[:, permutation])
        results.append((value.detach(), *torch.autograd.grad(value.sum(), [data, *module.parameters()])))
    for other in results[1:]:
        for result, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-13)


def test_low_precision_points_lose_only_their_own_digits():
    data = points(2, 300, 4).to(torch.bfloat16)
    low = HalfspaceEntropy(4, 4).initialize_from(data)
    exact = HalfspaceEntropy(4, 4).double()
    exact.load_state_dict(low.state_dict())
    result = low(data)
    assert result.dtype is torch.float32
    torch.testing.assert_close(result.double(), exact(data.double()), rtol=0, atol=2e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(low(data), result, rtol=0, atol=0)


def test_many_halfspaces_on_one_point_each():
    # 16 halfspaces, 65,536 cells: the axes of a 16-cube whose corners are the points.
    corners = torch.randint(0, 2, (50, 16), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    module = HalfspaceEntropy(16, 16, sharpness=1e3, sharpness_unit="absolute").double()
    with torch.no_grad():
        module.normals.copy_(torch.eye(16))
    assert module(corners).item() == pytest.approx(math.log(len(corners.unique(dim=0))), abs=1e-9)


@pytest.mark.parametrize("method", ["principal", "random"])
def test_initial_halfspaces_cut_evenly_and_are_reproducible(method):
    data = points(1001, 3) * torch.tensor([1.0, 3.0, 0.2], dtype=torch.float64)
    first = HalfspaceEntropy(3, 3).double().initialize_from(data, method, seed=4)
    again = HalfspaceEntropy(3, 3).double().initialize_from(data, method, seed=4)
    assert torch.equal(first.normals, again.normals)
    assert torch.equal(first.offsets, again.offsets)
    torch.testing.assert_close(first.normals.detach().norm(dim=-1), torch.ones(3, dtype=torch.float64))
    inside = (data @ first.normals.detach().t() > first.offsets.detach()).double().mean(0)
    torch.testing.assert_close(inside, torch.full((3,), 0.5, dtype=torch.float64), rtol=0, atol=2e-3)


def test_principal_halfspaces_repeat_directions_at_quantiles():
    data = points(3001, 2) * torch.tensor([10.0, 1.0], dtype=torch.float64)
    module = HalfspaceEntropy(5, 2).double().initialize_from(data)
    inside = (data @ module.normals.detach().t() > module.offsets.detach()).double().mean(0)
    expected = torch.tensor([3 / 4, 2 / 3, 2 / 4, 1 / 3, 1 / 4], dtype=torch.float64)
    torch.testing.assert_close(inside, expected, rtol=0, atol=2e-3)
    assert module.normals[0, 0].item() == pytest.approx(1.0, abs=1e-2)
    assert torch.equal(module.normals[0], module.normals[2])


def test_sets_without_spread_are_hard_and_finite():
    module = HalfspaceEntropy(3, 2).initialize_from(points(31, 2, dtype=torch.float32), "random")
    for degenerate in (torch.full((1, 2), 0.4), torch.full((5, 2), -3.0)):
        degenerate.requires_grad_()
        value = module(degenerate)
        assert value.item() == pytest.approx(0.0, abs=1e-5)
        assert torch.isfinite(torch.autograd.grad(value, degenerate)[0]).all()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: HalfspaceEntropy(0, 2), "num_halfspaces"),
        (lambda: HalfspaceEntropy(17, 2), "num_halfspaces"),
        (lambda: HalfspaceEntropy(2, 2)(torch.zeros(3, 1)), "shape"),
        (lambda: HalfspaceEntropy(2, 2)(torch.zeros(0, 2)), "at least one point"),
        (lambda: HalfspaceEntropy(2, 2)(torch.full((3, 2), math.nan)), "finite"),
        (lambda: HalfspaceEntropy(2, 2).initialize_from(torch.rand(9, 2), "kmeans++"), "method"),
        (lambda: HalfspaceEntropy(2, 2).initialize_from(torch.full((9, 2), math.inf)), "finite"),
    ],
)
def test_bad_input_gets_one_sentence(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()
