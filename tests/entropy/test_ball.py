"""BallEntropy against loops in float64, closed forms and its limits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entreg.entropy import BallEntropy, annealed_sharpness, partition_entropy
from entreg.entropy.soft_partition import entropy_of_masses
from entreg.errors import InputError


def points(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ball(data: torch.Tensor, anchors: int, **arguments) -> BallEntropy:
    return BallEntropy(anchors, data.shape[-1], **arguments).to(data.dtype).initialize_from(data, seed=1)


def entropy_by_definition(data: torch.Tensor, anchors: torch.Tensor, alpha: float) -> float:
    """The paper's formula for one set, term by term in Python floats."""
    masses = [0.0] * len(anchors)
    for point in data.tolist():
        logits = [-alpha * sum((x - c) ** 2 for x, c in zip(point, a, strict=True)) for a in anchors.tolist()]
        weights = [math.exp(logit - max(logits)) for logit in logits]
        for j, weight in enumerate(weights):
            masses[j] += weight / sum(weights) / len(data)
    return -sum(mass * math.log(mass) for mass in masses if mass > 0)


def test_equals_the_formula_with_absolute_sharpness():
    data = points(2, 3, 40, 5)
    module = ball(data, 6, sharpness=0.7, sharpness_unit="absolute")
    with torch.no_grad():
        module.anchors += 0.1 * points(6, 5, seed=3)
    value = module(data)
    assert value.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            assert value[i, j].item() == pytest.approx(
                entropy_by_definition(data[i, j], module.anchors.detach(), 0.7), rel=1e-12
            )


def test_data_unit_is_sharpness_over_total_variance_of_each_set():
    data = torch.stack((points(50, 3), 4.0 + 0.2 * points(50, 3, seed=1)))
    module = ball(data, 5, sharpness=8.0)
    for one, value in zip(data, module(data), strict=True):
        variance = one.var(0, correction=0).sum().item()
        expected = entropy_by_definition(one, module.anchors.detach(), 8.0 / variance)
        assert value.item() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_data_unit_does_not_see_scale_or_shift(dtype):
    data = points(200, 2)
    module = ball(data, 8, sharpness=20.0)
    expected = module(data).item()
    for scale, shift in ((1e-3, 0.0), (1e4, 0.0), (1.0, 50.0), (1e-2, -3.0)):
        moved = ball(data, 8, sharpness=20.0).to(dtype)
        with torch.no_grad():
            moved.anchors.copy_(module.anchors * scale + shift)
        tolerance = 1e-9 if dtype is torch.float64 else 2e-3 * max(1.0, abs(shift) / scale / 100)
        assert moved((data * scale + shift).to(dtype)).item() == pytest.approx(expected, abs=tolerance)


def test_closed_forms():
    anchors = 10.0 * torch.eye(4, dtype=torch.float64)
    module = BallEntropy(4, 4, sharpness=5.0, sharpness_unit="absolute").double()
    with torch.no_grad():
        module.anchors.copy_(anchors)
    # Points exactly at far apart anchors: the entropy of the counts.
    counts = [1, 2, 3, 4]
    placed = anchors.repeat_interleave(torch.tensor(counts), dim=0)
    assert module(placed).item() == pytest.approx(partition_entropy(counts), abs=1e-12)
    # A point in the middle of all anchors: log k. One anchor: 0.
    assert module(torch.zeros(1, 4, dtype=torch.float64)).item() == pytest.approx(math.log(4), abs=1e-15)
    assert BallEntropy(1, 4)(torch.randn(9, 4)).item() == 0.0
    # Two anchors, mirror images: log 2 whatever the sharpness.
    mirrored = BallEntropy(2, 1, sharpness=0.3).double()
    with torch.no_grad():
        mirrored.anchors.copy_(torch.tensor([[-1.0], [1.0]]))
    symmetric = torch.tensor([[-2.0], [-0.5], [0.5], [2.0]], dtype=torch.float64)
    assert mirrored(symmetric).item() == pytest.approx(math.log(2), abs=1e-15)


def test_sharp_limit_is_the_hard_entropy_of_nearest_anchors():
    data = points(300, 3)
    module = ball(data, 7)
    nearest = torch.cdist(data, module.anchors.detach()).argmin(-1)
    hard = partition_entropy(torch.bincount(nearest, minlength=7).tolist())
    gaps = []
    for sharpness in (1e2, 1e4, 1e6, 1e9):
        module.sharpness = sharpness
        gaps.append(abs(module(data).item() - hard))
    assert gaps[-1] < 1e-12
    assert gaps[0] > gaps[-1]


def test_permutation_of_the_points_changes_nothing():
    data = points(4, 60, 3)
    module = ball(data, 5)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(data[:, order]), module(data), rtol=1e-13, atol=0)


@pytest.mark.parametrize("chunk_size", [1000, 7])
def test_gradients_in_points_and_anchors(chunk_size):
    data = points(2, 15, 3).requires_grad_()
    module = ball(data, 4, sharpness=0.8, sharpness_unit="absolute", chunk_size=chunk_size)
    anchors = module.anchors.detach().clone().requires_grad_()

    def value(x, c):
        return torch.func.functional_call(module, {"anchors": c}, (x,))

    assert torch.autograd.gradcheck(value, (data, anchors))


def test_data_scale_is_a_constant_in_the_gradient():
    data = points(30, 2).requires_grad_()
    module = ball(data, 4, sharpness=6.0)
    (gradient,) = torch.autograd.grad(module(data), data)
    alpha = 6.0 / data.detach().var(0, correction=0).sum().item()
    fixed = ball(data, 4, sharpness=alpha, sharpness_unit="absolute")
    (expected,) = torch.autograd.grad(fixed(data), data)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("unit", ["data", "absolute"])
def test_chunks_change_neither_value_nor_gradient(unit):
    results = []
    for chunk_size in (10_000, 64, 1):
        data = points(2, 130, 3).requires_grad_()
        module = ball(data, 6, sharpness=3.0, sharpness_unit=unit, chunk_size=chunk_size)
        value = module(data)
        results.append((value.detach(), *torch.autograd.grad(value.sum(), [data, module.anchors])))
    for other in results[1:]:
        for result, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-13)


def test_memory_of_the_backward_pass_stays_below_all_assignments():
    data = torch.randn(4096, 2, requires_grad=True)
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    def largest(chunk_size):
        saved.clear()
        module = BallEntropy(64, 2, chunk_size=chunk_size).initialize_from(data)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(data)
        return max(saved)

    assert largest(4096) >= 4096 * 64
    assert largest(128) <= 4096 * 2  # the points themselves, which live anyway


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_points_lose_only_their_own_digits(dtype):
    data = points(3, 400, 8).to(dtype)
    low = BallEntropy(8, 8, sharpness=30.0).initialize_from(data)
    exact = BallEntropy(8, 8).double()
    exact.load_state_dict(low.state_dict())
    result = low(data)
    assert result.dtype is torch.float32
    torch.testing.assert_close(result.double(), exact(data.double()), rtol=0, atol=2e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(low(data), result, rtol=0, atol=0)


def test_gradient_is_finite_when_cells_are_empty():
    data = points(20, 2, dtype=torch.float32).requires_grad_()
    module = BallEntropy(3, 2, sharpness=1e6)
    with torch.no_grad():
        module.anchors.copy_(torch.tensor([[0.0, 0.0], [1e4, 0.0], [0.0, -1e4]]))
    value = module(data)
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    for gradient in torch.autograd.grad(value, [data, module.anchors]):
        assert torch.isfinite(gradient).all()


def test_sets_without_spread_are_hard_and_finite():
    module = BallEntropy(3, 2).initialize_from(points(30, 2, dtype=torch.float32))
    for degenerate in (torch.zeros(1, 2), torch.zeros(5, 2), torch.full((4, 2), 0.3), torch.full((4, 2), -900.0)):
        degenerate.requires_grad_()
        value = module(degenerate)
        assert value.item() == pytest.approx(0.0, abs=1e-6)
        assert torch.isfinite(torch.autograd.grad(value, degenerate)[0]).all()


@pytest.mark.parametrize("method", ["kmeans++", "farthest", "random"])
def test_initial_anchors_are_distinct_points_of_the_data_and_reproducible(method):
    data = points(2, 50, 3)
    first = BallEntropy(10, 3).double().initialize_from(data, method, seed=5).anchors.detach()
    again = BallEntropy(10, 3).double().initialize_from(data, method, seed=5).anchors.detach()
    other = BallEntropy(10, 3).double().initialize_from(data, method, seed=6).anchors.detach()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.unique(dim=0)) == 10
    assert (first[:, None] == data.reshape(-1, 3)).all(-1).any(-1).all()


@pytest.mark.parametrize("method", ["kmeans++", "farthest"])
def test_separated_clusters_get_one_anchor_each(method):
    centers = 100.0 * torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1], [3, 3]], dtype=torch.float64)
    data = (centers[:, None] + 0.01 * points(5, 40, 2)).reshape(-1, 2)
    for seed in range(10):
        anchors = BallEntropy(5, 2).double().initialize_from(data, method, seed).anchors.detach()
        assert sorted(torch.cdist(anchors, centers).argmin(-1).tolist()) == [0, 1, 2, 3, 4]


def test_training_the_anchors_and_points_lowers_the_entropy():
    data = points(100, 2, dtype=torch.float32).requires_grad_()
    module = BallEntropy(6, 2).initialize_from(data)
    optimizer = torch.optim.SGD([data, *module.parameters()], lr=1.0)
    before = module(data).item()
    for _ in range(50):
        optimizer.zero_grad()
        module(data).backward()
        optimizer.step()
    assert module(data).item() < before - 0.1


def test_sharpness_anneals_and_is_saved():
    module = BallEntropy(3, 2, sharpness=2.0)
    module.sharpness = annealed_sharpness(0.5, 2.0, 50.0)
    assert module.sharpness == pytest.approx(10.0)
    assert annealed_sharpness(-1.0, 2.0, 50.0) == 2.0
    assert annealed_sharpness(3.0, 2.0, 50.0) == pytest.approx(50.0)
    restored = BallEntropy(3, 2)
    restored.load_state_dict(module.state_dict())
    assert restored.sharpness == module.sharpness
    assert torch.equal(restored.anchors, module.anchors)


def test_anchors_can_be_fixed():
    assert not BallEntropy(3, 2, learn_anchors=False).anchors.requires_grad


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 10_000), st.floats(0.01, 1e6))
def test_value_lies_between_zero_and_log_k(n, k, seed, sharpness):
    value = BallEntropy(k, 2, sharpness=sharpness).double()(points(n, 2, seed=seed)).item()
    assert -1e-12 <= value <= math.log(k) + 1e-12


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: BallEntropy(0, 2), "num_anchors"),
        (lambda: BallEntropy(2, 0), "dim"),
        (lambda: BallEntropy(2, 2, sharpness=0.0), "sharpness"),
        (lambda: BallEntropy(2, 2, sharpness=math.nan), "sharpness"),
        (lambda: BallEntropy(2, 2, sharpness_unit="metres"), "sharpness_unit"),
        (lambda: BallEntropy(2, 2, chunk_size=0), "chunk_size"),
        (lambda: BallEntropy(2, 2)(torch.zeros(3, 4)), "shape"),
        (lambda: BallEntropy(2, 2)(torch.zeros(2)), "shape"),
        (lambda: BallEntropy(2, 2)(torch.zeros(0, 2)), "at least one point"),
        (lambda: BallEntropy(2, 2)(torch.zeros(0, 5, 2)), "at least one point"),
        (lambda: BallEntropy(2, 2)(torch.zeros(3, 2, dtype=torch.int64)), "floating-point"),
        (lambda: BallEntropy(2, 2)([[0.0, 1.0]]), "floating-point"),
        (lambda: BallEntropy(2, 2).initialize_from(torch.rand(9, 2), "nearest"), "method"),
        (lambda: BallEntropy(5, 2).initialize_from(torch.rand(4, 2)), "at least 5 points"),
        (lambda: BallEntropy(5, 2).initialize_from(torch.ones(9, 2)), "distinct"),
        (lambda: BallEntropy(2, 2).initialize_from(torch.full((9, 2), math.nan)), "finite"),
        (lambda: annealed_sharpness(math.nan, 1.0, 2.0), "progress"),
        (lambda: annealed_sharpness(0.5, 0.0, 2.0), "start"),
    ],
)
def test_bad_input_gets_one_sentence(call, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("unit", ["data", "absolute"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("anchors", [1, 3])
def test_one_bad_coordinate_among_many_is_found(unit, bad, anchors):
    data = torch.randn(2, 500, 3)
    data[1, 321, 2] = bad
    module = BallEntropy(anchors, 3, sharpness_unit=unit, chunk_size=100)
    if bad == 1e30 and unit == "absolute":
        assert torch.isfinite(module(data)).all()  # far away, but nearest to some anchor
        return
    for call in (module, module.masses, module.certificate):
        if bad == 1e30 and call == module.certificate:
            continue  # float64 has room for it
        with pytest.raises(InputError, match="finite"):
            call(data)


def test_masses_sum_to_one_and_empty_masses_have_a_gradient():
    data = points(3, 40, 2)
    masses = ball(data, 5).masses(data)
    torch.testing.assert_close(masses.sum(-1), torch.ones(3, dtype=torch.float64))
    empty = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    entropy_of_masses(empty).backward()
    assert torch.isfinite(empty.grad).all()
