"""Training of EntropyNet: the Chamfer term, determinism, and what the two terms do."""

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from entreg.errors import InputError
from entreg.geometry.generators import generate
from entreg.training.entropy_net import EntropyNetSettings, chamfer_distance, train_entropy_net

FAST = {"subset_size": 128, "steps": 60, "hidden": 16}


def test_chamfer_distance_against_a_search_tree():
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((3, 40, 2)), rng.standard_normal((3, 55, 2))
    expected = [
        (cKDTree(b).query(a)[0] ** 2).mean() + (cKDTree(a).query(b)[0] ** 2).mean()
        for a, b in zip(first, second, strict=True)
    ]
    value = chamfer_distance(torch.from_numpy(first), torch.from_numpy(second))
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-12)


def test_chamfer_gradient_is_right_and_finite_where_points_coincide():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(2, 9, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    second = torch.randn(2, 7, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(chamfer_distance, (first, second))
    same = first.detach().clone().requires_grad_()
    chamfer_distance(same, first.detach()).sum().backward()
    assert (same.grad == 0).all()


@pytest.mark.parametrize(
    "settings",
    [
        EntropyNetSettings(surrogate="halfspace", initialization="random", **FAST),
        EntropyNetSettings(surrogate="ball", num_cells=8, **FAST),
    ],
)
def test_equal_seeds_give_equal_weights_and_leave_the_global_state_alone(settings):
    points = generate("disk", 2_000, 0)
    state = torch.random.get_rng_state()
    first, second = train_entropy_net(points, settings, 1), train_entropy_net(points, settings, 1)
    assert torch.equal(state, torch.random.get_rng_state())
    other = train_entropy_net(points, settings, 2)
    for name, value in first.net.state_dict().items():
        if torch.is_tensor(value):
            assert torch.equal(value, second.net.state_dict()[name])
    assert not torch.equal(first.net.hidden_layer.weight, other.net.hidden_layer.weight)
    assert first.seconds > 0


@pytest.mark.parametrize("surrogate", ["ball", "halfspace"])
def test_more_weight_buys_lower_entropy_with_larger_steps(surrogate):
    points = generate("disk", 2_000, 0)
    results = []
    for weight in (0.0, 1.0):
        settings = EntropyNetSettings(
            surrogate=surrogate,
            initialization="random",
            entropy_weight=weight,
            learning_rate=0.01,
            **{**FAST, "steps": 120},
        )
        trained = train_entropy_net(points, settings, 0)
        results.append((trained.entropy, np.abs(trained.net.rewrite(points) - points).max()))
    (free_entropy, free_step), (low_entropy, large_step) = results
    assert low_entropy < 0.7 * free_entropy
    assert free_step < 1e-6 < 0.05 < large_step


def test_number_of_halfspaces_follows_the_number_of_cells():
    points = generate("disk", 500, 0)
    settings = EntropyNetSettings(surrogate="halfspace", num_cells=8, initialization="principal", steps=1)
    assert train_entropy_net(points, settings, 0).net.surrogate.num_cells == 8


def test_small_point_sets_train_on_all_their_points():
    trained = train_entropy_net(generate("square", 40, 0), EntropyNetSettings(num_cells=4, **FAST), 0)
    assert np.isfinite(trained.net.rewrite(generate("square", 40, 0))).all()


@pytest.mark.parametrize(
    "arguments",
    [
        {"surrogate": "cube"},
        {"num_cells": 1},
        {"steps": 0},
        {"subset_size": 1},
        {"hidden": 0},
        {"entropy_weight": -0.1},
        {"entropy_weight": float("nan")},
        {"learning_rate": 0.0},
        {"sharpness": -1.0},
    ],
)
def test_settings_out_of_range_are_refused(arguments):
    with pytest.raises(InputError):
        EntropyNetSettings(**arguments)


def test_equal_points_and_divergence_are_one_sentence():
    with pytest.raises(InputError, match="not all equal"):
        train_entropy_net(np.ones((30, 2)), EntropyNetSettings(**FAST), 0)
    settings = EntropyNetSettings(learning_rate=1e30, entropy_weight=1e30, **FAST)
    with pytest.raises(InputError):
        train_entropy_net(generate("square", 300, 0), settings, 0)
