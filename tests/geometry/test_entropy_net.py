"""EntropyNet against a float64 twin, its symmetries, and its advice."""

import numpy as np
import pytest
import torch

from entreg.entropy.ball import BallEntropy
from entreg.entropy.halfspace import HalfspaceEntropy
from entreg.errors import InputError
from entreg.geometry.convex_hull import convex_hull
from entreg.geometry.entropy_net import EntropyNet
from entreg.geometry.generators import generate
from entreg.geometry.pareto import pareto_front


def make_net(points: np.ndarray, surrogate=None, seed: int = 0, **arguments) -> EntropyNet:
    """A network whose last layer is random instead of zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = EntropyNet(surrogate or HalfspaceEntropy(4, 2), **arguments)
        torch.nn.init.normal_(net.output_layer.weight, std=0.1)
        torch.nn.init.normal_(net.output_layer.bias, std=0.1)
    net.fit_normalisation(points)
    return net


def float64_twin(net: EntropyNet, points: np.ndarray) -> np.ndarray:
    """The formula in plain numpy and float64, context over all points."""
    weights = {name: value.double().numpy() for name, value in net.state_dict().items() if torch.is_tensor(value)}
    x = (points - weights["center"]) / weights["scale"]
    features = np.maximum(x @ weights["point_layer.weight"].T + weights["point_layer.bias"], 0.0)
    pooled = np.concatenate([features.mean(axis=0), features.max(axis=0)])
    context = weights["context_layer.weight"] @ pooled
    hidden = np.maximum(x @ weights["point_layer.weight"].T + weights["point_layer.bias"] + context, 0.0)
    hidden = np.maximum(hidden @ weights["hidden_layer.weight"].T + weights["hidden_layer.bias"], 0.0)
    step = hidden @ weights["output_layer.weight"].T + weights["output_layer.bias"]
    return points + weights["scale"] * step


@pytest.mark.parametrize("hidden", [1, 7, 32])
def test_rewrite_and_forward_agree_with_the_float64_twin(hidden):
    points = generate("gaussian", 700, 0)
    net = make_net(points, hidden=hidden)
    expected = float64_twin(net, points)
    assert np.abs(expected - points).max() > 0.01
    # Three layers of float32 sums: a few hundred roundings of numbers of order one, times the scale.
    tolerance = 300 * np.finfo(np.float32).eps * net.scale.item()
    np.testing.assert_allclose(net.rewrite(points), expected, rtol=0, atol=tolerance)
    with torch.no_grad():
        forward = net(net.normalise(points)).double().numpy() * net.scale.item() + net.center.numpy()
    np.testing.assert_allclose(forward, expected, rtol=0, atol=tolerance)


def test_an_untrained_network_changes_not_a_bit():
    points = generate("circle", 20_000, 0)
    net = EntropyNet(BallEntropy(8, 2))
    net.fit_normalisation(points)
    np.testing.assert_array_equal(net.rewrite(points), points)


def test_reordering_the_input_reorders_the_output():
    points = generate("disk", 1_000, 0)
    net = make_net(points)
    order = np.random.default_rng(0).permutation(1_000)
    np.testing.assert_allclose(net.rewrite(points[order]), net.rewrite(points)[order], rtol=0, atol=1e-6)


def test_position_and_scale_of_the_data_do_not_matter():
    points = generate("square", 500, 0)
    # A power of two and a sum that is exact, so that the same network sees the same normalised points.
    far = 1024.0 * np.round(points * 2**20) / 2**20 + 2.0**20
    net, other = make_net(points), make_net(far)
    near_step = (net.rewrite(points) - points) / net.scale.item()
    far_step = (other.rewrite(far) - far) / other.scale.item()
    np.testing.assert_allclose(far_step, near_step, rtol=0, atol=1e-5)


def test_threads_and_memory_layout_do_not_matter():
    points = generate("disk", 40_000, 0)
    net = make_net(points)
    expected = net.rewrite(points, threads=1)
    np.testing.assert_array_equal(net.rewrite(np.asfortranarray(points), threads=3), expected)


def test_context_sees_the_whole_set():
    points = generate("square", 400, 0)
    net = make_net(points)
    changed = points.copy()
    changed[200:] = 0.0
    assert np.abs(net.rewrite(changed)[:200] - net.rewrite(points)[:200]).max() > 1e-4


@pytest.mark.parametrize("make_surrogate", [lambda: HalfspaceEntropy(4, 2), lambda: BallEntropy(8, 2)])
def test_advice_has_the_learned_directions_and_cells_in_data_coordinates(make_surrogate):
    points = 50.0 + 10.0 * generate("disk", 3_000, 0)
    net = make_net(points, make_surrogate())
    net.surrogate.initialize_from(net.normalise(points), "random", 0)
    advice = net.advice(points)
    assert 1 <= len(advice.anchors) <= net.surrogate.num_cells
    assert (np.abs(advice.anchors - 50.0) <= 10.0).all()
    np.testing.assert_array_equal(advice.convex_hull(points), convex_hull(points))
    np.testing.assert_array_equal(advice.pareto_front(points), pareto_front(points))
    assert advice.delaunay(points).shape[1] == 3
    if isinstance(net.surrogate, HalfspaceEntropy):
        normals = net.surrogate.normals.detach().double().numpy()
        np.testing.assert_array_equal(advice.directions, np.concatenate([normals, -normals]))
        # Each cell's centre lies on the same side of every boundary as the points of one sign pattern.
        inside = (advice.anchors - 50.0) / 10.0 @ normals.T >= net.surrogate.offsets.detach().double().numpy()
        assert len(np.unique(inside, axis=0)) == len(advice.anchors)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.full((5, 2), 3.0), "not all equal"),
        (np.array([[-1.7e308, 0.0], [1.7e308, 1.0]]), "finite"),
    ],
)
def test_points_without_a_usable_extent_are_refused(points, message):
    net = EntropyNet(BallEntropy(2, 2))
    with np.errstate(over="ignore"), pytest.raises(InputError, match=message):
        net.fit_normalisation(points)


def test_bad_arguments_are_refused():
    with pytest.raises(InputError, match="at least 1"):
        EntropyNet(BallEntropy(2, 2), hidden=0)
    net = EntropyNet(BallEntropy(2, 2))
    with pytest.raises(InputError, match="point 1"):
        net.rewrite([[0.0, 0.0], [np.nan, 1.0]])
    with pytest.raises(InputError, match="shape"):
        net.rewrite(np.zeros((4, 3)))
