"""EntropyRegularizer: weights, hinge, controller, resume and its three lines."""

import doctest
import math

import pytest
import torch

import entreg.regularizer
from entreg.entropy import attention_key_entropy
from entreg.errors import InputError
from entreg.regularizer import EntropyRegularizer, Term


def test_the_three_lines_of_the_docstring_work():
    q = torch.randn(2, 3, 7, 4, requires_grad=True)
    context = {
        "EntropyRegularizer": EntropyRegularizer,
        "Term": Term,
        "attention_key_entropy": attention_key_entropy,
        "q": q,
        "k": torch.randn(2, 3, 7, 4),
        "step": 50,
        "task_loss": q.square().mean(),
    }
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(EntropyRegularizer, module=entreg.regularizer, globs=context)
    assert len(example.examples) == 3
    assert doctest.DocTestRunner().run(example, clear_globs=False).failed == 0
    assert q.grad is not None


def test_penalty_is_the_weighted_sum_and_values_are_floats():
    regularizer = EntropyRegularizer({"row": 0.5, "key": Term(weight=2.0, floor=1.0)})
    row = torch.tensor([1.0, 3.0], requires_grad=True)
    key = torch.tensor([[0.5, 1.5], [2.5, 1.0]], dtype=torch.float64, requires_grad=True)
    penalty, values = regularizer({"key": key, "row": row}, 0)
    # Excess of key over 1: 0, 0.5, 1.5, 0.
    assert penalty.item() == pytest.approx(0.5 * 2.0 + 2.0 * 0.5)
    assert values == pytest.approx(
        {
            "row/entropy": 2.0,
            "row/weight": 0.5,
            "row/penalty": 1.0,
            "key/entropy": 1.375,
            "key/weight": 2.0,
            "key/penalty": 1.0,
        }
    )
    assert all(type(value) is float for value in values.values())
    penalty.backward()
    assert row.grad.tolist() == [0.25, 0.25]
    assert key.grad.tolist() == [[0.0, 0.5], [0.5, 0.0]]


def test_a_floor_per_layer_and_a_list_of_layers():
    layers = [torch.full((2, 3), 2.0), torch.full((2, 3), 4.0)]
    regularizer = EntropyRegularizer({"keys": Term(weight=1.0, floor=torch.tensor([1.5, 5.0])[:, None, None])})
    penalty, _ = regularizer({"keys": layers}, 0)
    assert penalty.item() == pytest.approx(0.25)
    vector = EntropyRegularizer({"keys": Term(weight=1.0, floor=[1.5, 5.0, 0.0])})
    penalty, _ = vector({"keys": layers}, 0)
    assert penalty.item() == pytest.approx((0.5 + 0 + 2.0 + 2.5 + 0 + 4.0) / 6)


def test_warm_up_and_schedules():
    constant = Term(weight=1.0, start_step=10, warmup_steps=4)
    assert [constant.scheduled_weight(step) for step in (0, 9, 10, 11, 13, 14, 1000)] == pytest.approx(
        [0, 0, 0.2, 0.4, 0.8, 1.0, 1.0]
    )
    linear = Term(weight=1.0, schedule="linear", total_steps=100, final_weight=3.0)
    assert [linear.scheduled_weight(step) for step in (0, 50, 100, 500)] == pytest.approx([1, 2, 3, 3])
    cosine = Term(weight=1.0, schedule="cosine", warmup_steps=20, total_steps=120)
    assert [cosine.scheduled_weight(step) for step in (20, 45, 70, 120, 500)] == pytest.approx(
        [1, 0.5 * (1 + math.sqrt(0.5)), 0.5, 0, 0]
    )


@pytest.mark.parametrize("start", [1e-3, 50.0])
def test_controller_reaches_the_target(start):
    # A task that wants an entropy of 2: its pull at the target, 2 * (2 - 1.2), is the weight to be found.
    entropy = torch.tensor(2.5, requires_grad=True)
    term = Term(weight=start, schedule="target", target=1.2, gain=0.05, warmup_steps=5)
    regularizer = EntropyRegularizer({"h": term})
    optimizer = torch.optim.SGD([entropy], lr=0.05)
    for step in range(1500):
        penalty, values = regularizer({"h": entropy}, step)
        optimizer.zero_grad()
        ((entropy - 2.0).square() + penalty).backward()
        optimizer.step()
    assert values["h/entropy"] == pytest.approx(1.2, abs=1e-3)
    assert values["h/weight"] == pytest.approx(1.6, abs=1e-2)


def test_controller_moves_the_right_way_once_per_step_within_its_limits():
    term = Term(1.0, "target", target=2.0, gain=0.5, smoothing=0.0, minimum_weight=0.5, maximum_weight=2.0)
    regularizer = EntropyRegularizer({"h": term})
    high, low = torch.tensor(3.0), torch.tensor(0.0)
    regularizer({"h": high}, 0)
    assert regularizer.weight("h", 1) == pytest.approx(math.exp(0.5))
    regularizer({"h": high}, 0)  # gradient accumulation
    regularizer({"h": high}, 1, adapt=False)  # validation
    assert regularizer.weight("h", 1) == pytest.approx(math.exp(0.5))
    regularizer({"h": torch.tensor(1e30)}, 1)
    assert regularizer.weight("h", 2) == 2.0
    for step in range(2, 6):
        regularizer({"h": low}, step)
    assert regularizer.weight("h", 6) == 0.5


def test_a_resumed_run_continues_exactly():
    terms = {"h": Term(0.1, "target", target=1.0, gain=0.1), "g": Term(0.3, warmup_steps=7)}
    entropies = torch.rand(20, generator=torch.Generator().manual_seed(0)) * 2

    def advance(regularizer, steps):
        return [regularizer({"h": entropies[s], "g": entropies[s]}, s)[1] for s in steps]

    whole = EntropyRegularizer(terms)
    expected = advance(whole, range(20))
    first = EntropyRegularizer(terms)
    advance(first, range(11))
    resumed = EntropyRegularizer(terms)
    resumed.load_state_dict(first.state_dict())
    assert advance(resumed, range(11, 20)) == expected[11:]
    assert resumed.state_dict() == whole.state_dict()


def test_a_state_that_does_not_fit_changes_nothing():
    regularizer = EntropyRegularizer({"h": Term(0.1, "target", target=1.0)})
    before = regularizer.state_dict()
    for state in (
        {},
        {"last_step": 3, "learned": {}},
        {"last_step": 3, "learned": {"other": {"weight": 1.0, "entropy": 1.0}}},
        {"last_step": 3, "learned": {"h": {"weight": 1e9, "entropy": 1.0}}},
    ):
        with pytest.raises(InputError, match="state"):
            regularizer.load_state_dict(state)
    assert regularizer.state_dict() == before


def test_zero_weight_still_reports():
    penalty, values = EntropyRegularizer({"h": 0.0})({"h": torch.tensor([2.0])}, 3)
    assert penalty.item() == 0.0
    assert values["h/entropy"] == 2.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_entropy_raises_with_the_terms_name(bad):
    regularizer = EntropyRegularizer({"good": 1.0, "rotten": Term(0.0)})
    with pytest.raises(InputError, match=r"'rotten'.*step 4"):
        regularizer({"good": torch.ones(2), "rotten": torch.tensor([1.0, bad])}, 4)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: EntropyRegularizer({}), "at least one term"),
        (lambda: EntropyRegularizer({"a/b": 1.0}), "name"),
        (lambda: Term(-1.0), "weight"),
        (lambda: Term(math.nan), "weight"),
        (lambda: Term(1.0, "exponential"), "schedule"),
        (lambda: Term(1.0, warmup_steps=-1), "warmup_steps"),
        (lambda: Term(1.0, "cosine"), "total_steps"),
        (lambda: Term(1.0, "linear", warmup_steps=10, total_steps=10), "total_steps"),
        (lambda: Term(1.0, "target"), "target"),
        (lambda: Term(0.0, "target", target=1.0), "minimum_weight"),
        (lambda: Term(1.0, "target", target=1.0, gain=0.0), "gain"),
        (lambda: Term(1.0, floor=math.inf), "floor"),
        (lambda: EntropyRegularizer({"h": 1.0})({"g": torch.ones(1)}, 0), "must be given for"),
        (lambda: EntropyRegularizer({"h": 1.0})({"h": torch.ones(1)}, -1), "step"),
        (lambda: EntropyRegularizer({"h": 1.0})({"h": torch.ones(0)}, 0), "non-empty"),
        (lambda: EntropyRegularizer({"h": 1.0})({"h": [torch.ones(1), torch.ones(2)]}, 0), "equal shapes"),
        (lambda: EntropyRegularizer({"h": Term(1.0, floor=[1.0, 2.0])})({"h": torch.ones(3)}, 0), "broadcast"),
        (lambda: EntropyRegularizer({"h": Term(1.0, floor=[1.0, 2.0])})({"h": torch.ones(())}, 0), "broadcast"),
        (lambda: EntropyRegularizer({"h": 1.0}).weight("g", 0), "no term"),
    ],
)
def test_bad_input_gets_one_sentence(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()
