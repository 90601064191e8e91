"""Certificates: the bound always holds, tightens with the sharpness, and is not vacuous."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entreg.entropy import BallEntropy, HalfspaceEntropy, partition_entropy
from entreg.entropy.certificate import certify, entropy_continuity_bound
from tests.entropy.test_ball import points


def exact_nearest_counts(data: torch.Tensor, anchors: torch.Tensor) -> list[int]:
    """Points per nearest anchor in rational arithmetic; first anchor among ties."""
    centers = [[Fraction(value) for value in anchor] for anchor in anchors.tolist()]
    counts = [0] * len(centers)
    for point in data.tolist():
        distances = [sum((Fraction(x) - c) ** 2 for x, c in zip(point, a, strict=True)) for a in centers]
        counts[distances.index(min(distances))] += 1
    return counts


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 10**6),
    st.floats(1e-3, 1e12),
    st.sampled_from(["data", "absolute"]),
    st.sampled_from(["generic", "grid", "duplicates", "far"]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_ball_bound_always_holds(n, k, dim, seed, sharpness, unit, kind, dtype):
    data = points(n, dim, seed=seed)
    if kind == "grid":  # exact ties between anchors
        data = data.round()
    elif kind == "duplicates":
        data = data[:1].expand(n, dim).clone()
    elif kind == "far":
        data = data + 1e5
    data = data.to(dtype)
    module = BallEntropy(k, dim, sharpness=sharpness, sharpness_unit=unit, chunk_size=7).to(dtype)
    with torch.no_grad():
        module.anchors.copy_(data[torch.arange(k) % n] + 0.5 * module.anchors.round())
    certificate = module.certificate(data)
    assert (certificate.soft - certificate.hard).abs() <= certificate.bound
    assert certificate.bound <= math.log(k) + 1e-9
    # The guarantee is about the true nearest-anchor partition, ties going either way; without near ties it is unique.
    counts = exact_nearest_counts(data, module.anchors.detach())
    assert abs(certificate.soft.item() - partition_entropy(counts)) <= certificate.bound.item()


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 6),
    st.integers(0, 10**6),
    st.floats(1e-3, 1e12),
    st.sampled_from(["data", "absolute"]),
    st.booleans(),
)
def test_halfspace_bound_always_holds(n, number, seed, sharpness, unit, on_grid):
    data = points(n, 2, seed=seed)
    if on_grid:  # points exactly on the boundaries
        data = data.round()
    module = HalfspaceEntropy(number, 2, sharpness=sharpness, sharpness_unit=unit).double()
    with torch.no_grad():
        if on_grid:
            module.normals.copy_(module.normals.round())
    certificate = module.certificate(data)
    assert (certificate.soft - certificate.hard).abs() <= certificate.bound
    signs = (data @ module.normals.detach().t() >= 0).int()
    counts = signs.unique(dim=0, return_counts=True)[1]
    assert abs(certificate.soft.item() - partition_entropy(counts.tolist())) <= certificate.bound.item()


@pytest.mark.parametrize("module", [BallEntropy(6, 3), HalfspaceEntropy(4, 3)], ids=["ball", "halfspace"])
def test_bound_tightens_with_sharpness_to_the_hard_entropy(module):
    data = points(5, 200, 3)
    module = module.double().initialize_from(data, "random", seed=1)
    bounds = []
    for sharpness in (1.0, 10.0, 1e2, 1e3, 1e4, 1e5, 1e9):
        module.sharpness = sharpness
        certificate = module.certificate(data)
        assert ((certificate.soft - certificate.hard).abs() <= certificate.bound).all()
        bounds.append(certificate.bound)
    for wide, narrow in itertools.pairwise(bounds):
        assert (narrow <= wide).all()
    assert (bounds[-2] < 0.1 * bounds[2]).all()
    assert (bounds[-1] < 1e-6).all()


@pytest.mark.parametrize("module", [BallEntropy(6, 3), HalfspaceEntropy(4, 3)], ids=["ball", "halfspace"])
def test_soft_is_what_forward_returns_and_shapes_agree(module):
    data = points(2, 4, 90, 3)
    module.initialize_from(data, "random")
    certificate = module.certificate(data.float().requires_grad_())
    for value in (certificate.soft, certificate.hard, certificate.bound):
        assert value.shape == (2, 4)
        assert value.dtype is torch.float64
        assert not value.requires_grad
    torch.testing.assert_close(certificate.soft, module(data.float().double()), rtol=0, atol=1e-11)
    torch.testing.assert_close(certificate.soft.float(), module(data.float()), rtol=0, atol=1e-5)


def test_one_cell_is_certain():
    certificate = BallEntropy(1, 2).certificate(torch.randn(9, 2))
    assert (certificate.soft.item(), certificate.hard.item(), certificate.bound.item()) == (0.0, 0.0, 0.0)


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 7), st.integers(0, 10**6), st.floats(0.0, 1.0))
def test_continuity_bound_holds_for_random_pairs(k, seed, mixing):
    generator = torch.Generator().manual_seed(seed)
    first = torch.softmax(4 * torch.randn(k, generator=generator, dtype=torch.float64), 0)
    second = torch.softmax(4 * torch.randn(k, generator=generator, dtype=torch.float64), 0)
    second = torch.lerp(first, second, mixing)
    distance = 0.5 * (first - second).abs().sum()
    difference = (torch.special.entr(first).sum() - torch.special.entr(second).sum()).abs()
    assert difference <= entropy_continuity_bound(distance, k) + 1e-12


@pytest.mark.parametrize("k", [2, 5])
def test_continuity_bound_is_attained_and_flat_beyond_its_maximum(k):
    # One certain outcome against mass T spread evenly over the others attains the bound.
    for distance in (0.0, 0.1, 0.4, 1 - 1 / k):
        spread = torch.tensor([1 - distance] + [distance / (k - 1)] * (k - 1), dtype=torch.float64)
        bound = entropy_continuity_bound(torch.tensor(distance, dtype=torch.float64), k)
        assert torch.special.entr(spread).sum().item() == pytest.approx(bound.item(), abs=1e-14)
    for distance in (1 - 1 / k, 0.95, 1.0, 1.3):
        bound = entropy_continuity_bound(torch.tensor(distance, dtype=torch.float64), k)
        assert bound.item() == pytest.approx(math.log(k))


def test_certify_covers_rounding_where_the_margins_say_zero():
    masses = torch.full((3,), 1 / 3, dtype=torch.float64)
    certificate = certify(masses, masses, torch.zeros((), dtype=torch.float64), count=1000)
    assert 0 < certificate.bound.item() < 1e-9


def certified_on_near_ties(module, data, exact_counts) -> int:
    """Checks the guarantee on sets whose hard partition float64 cannot tell; returns how many it got wrong."""
    certificate = module.certificate(data)
    wrong = 0
    for index, counts in enumerate(exact_counts):
        hard = partition_entropy(counts)
        assert abs(certificate.soft[index].item() - hard) <= certificate.bound[index].item()
        wrong += abs(certificate.hard[index].item() - hard) > 0.1
    return wrong


def test_ball_bound_covers_assignments_that_rounding_gets_wrong():
    anchors = 1.0 + points(2, 3)
    module = BallEntropy(2, 3, sharpness=1e40, sharpness_unit="absolute").double()
    with torch.no_grad():
        module.anchors.copy_(anchors)
    # One point at an anchor, one as near to the bisector as float64 coordinates allow.
    across = torch.linalg.cross((anchors[1] - anchors[0])[None], points(200, 3, seed=1))
    near = anchors.mean(0) + across
    data = torch.stack((anchors[:1].expand(200, 3), near), dim=1)
    counts = [exact_nearest_counts(one, anchors) for one in data]
    assert certified_on_near_ties(module, data, counts) > 10


def test_halfspace_bound_covers_signs_that_rounding_gets_wrong():
    normal, reference = points(3), points(200, 3, seed=1)
    # Points as near to the plane w . x = 1 as float64 coordinates allow, and one far inside.
    near = reference + normal * ((1.0 - reference @ normal) / (normal @ normal))[:, None]
    data = torch.stack(((10.0 * normal).expand(200, 3), near), dim=1)
    module = HalfspaceEntropy(1, 3, sharpness=1e40, sharpness_unit="absolute").double()
    with torch.no_grad():
        module.normals.copy_(normal[None])
        module.offsets.fill_(1.0)
    counts = []
    for one in data.tolist():
        margins = [sum(Fraction(w) * Fraction(x) for w, x in zip(normal.tolist(), point, strict=True)) for point in one]
        inside = sum(margin >= 1 for margin in margins)
        counts.append([inside, 2 - inside])
    assert certified_on_near_ties(module, data, counts) > 10
