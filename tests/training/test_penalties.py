"""Every penalty against its formula written out in float64, and what a configuration may say about it."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from entreg.errors import ConfigError
from entreg.training.penalties import Penalties, penalty_from_mapping

BATCH, HEADS, N, D, PREFIX = 2, 3, 9, 4, 2
CONFIGS = Path(__file__).parents[2] / "configs" / "regularizer"


def capture(layer: int = 0, seed: int = 0) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed + layer)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    queries, keys, values = (draw(BATCH, HEADS, N, D).requires_grad_() for _ in range(3))
    return SimpleNamespace(
        layer=layer,
        queries=queries,
        keys=keys,
        values=values,
        scale=0.7,
        tokens=draw(BATCH, N, HEADS * D),
        num_prefix=PREFIX,
        causal=False,
        key_mask=None,
        query_mask=None,
    )


def attention(one: SimpleNamespace) -> torch.Tensor:
    return (one.scale * one.queries @ one.keys.transpose(-1, -2)).softmax(-1)


def entropy(masses: torch.Tensor) -> torch.Tensor:
    return -(masses * masses.log()).sum(-1)


def values_of(quantity: str, captures: list, gates=(), **settings):
    """Mean over layers of the unhinged quantity, as the penalty of weight 1 gives it."""
    mapping = {"quantity": quantity, "weight": 1.0, "num_sampled_queries": None, **settings}
    penalties = Penalties({"one": penalty_from_mapping(mapping)})
    penalties.prepare(captures, seed=0)
    penalty, _ = penalties(captures, gates, step=0)
    return penalty, penalties


def test_row_entropy_is_the_mean_entropy_of_attention_rows():
    one = capture()
    penalty, _ = values_of("row_entropy", [one])
    torch.testing.assert_close(penalty, entropy(attention(one)).mean())


def test_key_entropy_is_the_entropy_of_the_mean_row():
    one = capture()
    penalty, _ = values_of("key_entropy", [one])
    torch.testing.assert_close(penalty, entropy(attention(one).mean(2)).mean())


def test_selection_entropy_is_that_of_the_mixed_score_over_the_patches():
    one = capture()
    received, prefix = attention(one).mean(2), attention(one)[:, :, :PREFIX].mean(2)
    patches = (0.5 * received + 0.5 * prefix).mean(1)[:, PREFIX:]
    penalty, _ = values_of("selection_entropy", [one])
    torch.testing.assert_close(penalty, entropy(patches / patches.sum(-1, keepdim=True)).mean(), rtol=1e-6, atol=0)


def test_l1_logits_is_the_mean_absolute_logit():
    one = capture()
    penalty, _ = values_of("l1_logits", [one])
    logits = one.scale * one.queries @ one.keys.transpose(-1, -2)
    torch.testing.assert_close(penalty.double(), logits.abs().mean(), rtol=1e-5, atol=0)


def test_rate_distortion_is_entropy_plus_relative_distance_to_the_anchors():
    one = capture()
    penalty, penalties = values_of(
        "rate_distortion", [one], points="tokens", num_cells=3, distortion=2.5, sharpness=7.0
    )
    anchors = penalties.anchors["one_0"].anchors.double()
    expected = []
    for points in one.tokens:
        squared = ((points[:, None] - anchors) ** 2).sum(-1)
        variance = ((points - points.mean(0)) ** 2).sum(-1).mean()
        weights = torch.softmax(-7.0 * squared / variance, dim=-1)
        expected.append(entropy(weights.mean(0)) + 2.5 * (weights * squared).sum(-1).mean() / variance)
    torch.testing.assert_close(penalty.double(), torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)


def test_distortion_keeps_partitions_from_collapsing_into_one_part():
    """Two far clusters: with one anchor far away the entropy alone is 0, the distortion is not."""
    one = capture()
    one.tokens = torch.cat([torch.zeros(1, 5, 2), torch.full((1, 5, 2), 8.0)], 1)
    _, penalties = values_of("rate_distortion", [one], points="tokens", num_cells=2, sharpness=50.0, distortion=4.0)
    anchors = penalties.anchors["one_0"].anchors
    with torch.no_grad():
        anchors.copy_(torch.tensor([[4.0, 4.0], [1e3, 1e3]]))
    collapsed, _ = penalties([one], (), 0)
    with torch.no_grad():
        anchors.copy_(torch.tensor([[0.0, 0.0], [8.0, 8.0]]))
    split, _ = penalties([one], (), 0)
    torch.testing.assert_close(collapsed.item(), 4.0, rtol=1e-4, atol=0)
    torch.testing.assert_close(split.item(), math.log(2), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("quantity", "cells"), [("ball", 4), ("halfspace", 4)])
def test_partition_entropies_lie_in_their_range_and_reach_points_and_anchors(quantity, cells):
    one = capture()
    initialization = "random"
    penalty, penalties = values_of(
        quantity, [one], num_cells=cells, initialization=initialization, sharpness=3.0, points="keys"
    )
    assert 0 < penalty.item() < math.log(cells)
    penalty.backward()
    assert one.keys.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in penalties.parameters())


def decoder_capture(masked: bool) -> SimpleNamespace:
    """Six query heads on three key heads, two more keys than queries, and, if masked, padding on the left of one."""
    one = capture()
    generator = torch.Generator().manual_seed(3)
    one.queries = torch.randn(BATCH, 2 * HEADS, N - 2, D, generator=generator, dtype=torch.float64).requires_grad_()
    one.causal = True
    if masked:
        one.key_mask = torch.ones(BATCH, N, dtype=torch.bool)
        one.key_mask[0, :5] = False
        one.query_mask = one.key_mask[:, 2:]
    return one


def causal_rows(one: SimpleNamespace):
    """For every batch element and head the rows that count: (visible keys' positions, their logits)."""
    offset = one.keys.shape[2] - one.queries.shape[2]
    for b in range(BATCH):
        for h in range(one.queries.shape[1]):
            rows = []
            for i in range(one.queries.shape[2]):
                if one.query_mask is not None and not one.query_mask[b, i]:
                    continue
                seen = [j for j in range(i + offset + 1) if one.key_mask is None or one.key_mask[b, j]]
                logits = torch.stack([one.scale * (one.queries[b, h, i] * one.keys[b, h // 2, j]).sum() for j in seen])
                rows.append((seen, logits))
            yield rows


def blocks_of(seen: list[int], size: int) -> list[list[int]]:
    return [[at for at, j in enumerate(seen) if j // size == block] for block in sorted({j // size for j in seen})]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_causal_row_and_block_entropies_are_loops_over_what_a_row_sees(masked, normalize):
    one = decoder_capture(masked)
    for quantity, size in (("row_entropy", 1), ("block_entropy", 3)):
        heads = []
        for rows in causal_rows(one):
            values = []
            for seen, logits in rows:
                masses = torch.stack([logits.softmax(0)[block].sum() for block in blocks_of(seen, size)])
                if normalize and len(masses) == 1:
                    continue
                values.append(entropy(masses) / (math.log(len(masses)) if normalize else 1.0))
            heads.append(torch.stack(values).mean())
        penalty, _ = values_of(quantity, [one], normalize=normalize, block_size=3)
        torch.testing.assert_close(penalty, torch.stack(heads).mean(), rtol=1e-10, atol=0)
    penalty.backward()
    assert one.queries.grad.abs().sum() > 0
    if masked:
        assert (one.keys.grad[0, :, :5] == 0).all()


@pytest.mark.parametrize("masked", [False, True])
def test_causal_key_entropy_is_that_of_the_mean_of_what_each_key_gets(masked):
    one = decoder_capture(masked)
    heads, shares = [], []
    for index, rows in enumerate(causal_rows(one)):
        received = torch.zeros(N, dtype=torch.float64)
        for seen, logits in rows:
            received = received + torch.zeros(N, dtype=torch.float64).index_add(
                0, torch.tensor(seen), logits.softmax(0) / len(rows)
            )
        heads.append(torch.special.entr(received).sum())
        available = N - 5 if masked and index < 2 * HEADS else N
        shares.append(heads[-1] / math.log(available))
    penalty, _ = values_of("key_entropy", [one])
    torch.testing.assert_close(penalty, torch.stack(heads).mean(), rtol=1e-10, atol=0)
    penalty, _ = values_of("key_entropy", [one], normalize=True)
    torch.testing.assert_close(penalty, torch.stack(shares).mean(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_causal_l1_counts_visible_logits_only(masked):
    one = decoder_capture(masked)
    heads = [torch.cat([logits for _, logits in rows]).abs().mean() for rows in causal_rows(one)]
    penalty, _ = values_of("l1_logits", [one])
    torch.testing.assert_close(penalty.double(), torch.stack(heads).mean(), rtol=1e-5, atol=0)


def test_partitions_of_a_decoder_need_keys_without_padding():
    penalty, _ = values_of("ball", [decoder_capture(masked=False)], num_cells=3, initialization="random")
    assert 0 < penalty.item() < math.log(3)
    with pytest.raises(ConfigError, match="without padding"):
        values_of("ball", [decoder_capture(masked=True)], num_cells=3, initialization="random")


def test_a_floor_of_normalised_entropies_is_a_fraction():
    one = decoder_capture(masked=False)
    plain, _ = values_of("row_entropy", [one], normalize=True)
    hinged, penalties = values_of("row_entropy", [one], normalize=True, floor=0.5)
    assert 0 < hinged.item() < plain.item() < 1
    _, numbers = penalties([one], (), 0)
    assert numbers["one/entropy"] == pytest.approx(plain.item())


def test_gate_penalty_is_the_mean_gate():
    gates = [torch.tensor([[0.1, 0.5], [0.3, 0.9]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])]
    penalty, penalties = values_of("l1_gate", [], gates)
    torch.testing.assert_close(penalty.item(), (0.3 + 0.6 + 0.5 + 0.0) / 4)
    assert penalties.needs_gate
    assert not penalties.need_captures
    with pytest.raises(ConfigError, match="score: gate"):
        penalties([], (), 0)


def test_layers_choose_among_captures_and_a_missing_one_is_named():
    captures = [capture(0), capture(1), capture(2)]
    penalty, _ = values_of("row_entropy", captures, layers=[2, 0])
    expected = (entropy(attention(captures[0])).mean() + entropy(attention(captures[2])).mean()) / 2
    torch.testing.assert_close(penalty, expected)
    with pytest.raises(ConfigError, match="names layer 7"):
        values_of("row_entropy", captures, layers=[7])


def test_budget_is_a_hinge_at_its_logarithm():
    one = capture()
    penalty, penalties = values_of("row_entropy", [one], budget=4)
    expected = torch.relu(entropy(attention(one)).mean(-1) - math.log(4)).mean()
    torch.testing.assert_close(penalty, expected)
    assert penalties.regularizer.terms["one"].floor == math.log(4)
    free, _ = values_of("row_entropy", [one], budget=N)
    assert free.item() == 0


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_committed_regulariser_is_possible(path):
    values = yaml.safe_load(path.read_text())
    terms = {name: penalty_from_mapping(one) for name, one in values.get("penalties", {}).items()}
    if path.parent.name == "decoder":
        Penalties(terms).require_decoder()
        # The study's methods are named by the quantity.
        assert [one.quantity for one in terms.values()] == [values["name"]]


def test_no_penalties_is_none():
    assert Penalties({})([], (), 0) == (None, {})


@pytest.mark.parametrize(
    ("mapping", "word"),
    [
        ({"quantity": "entropi", "weight": 1.0}, "unknown penalty 'entropi'"),
        ({"quantity": "row_entropy", "weight": 1.0, "lambda": 2}, "unknown key 'lambda'"),
        ({"quantity": "row_entropy", "weight": -1.0}, "weight must be"),
        ({"quantity": "row_entropy"}, "weight"),
        ({"quantity": "row_entropy", "weight": 1.0, "budget": 0.5}, "budget must be at least 1"),
        ({"quantity": "row_entropy", "weight": 1.0, "budget": 3, "floor": 1.0}, "no floor"),
        ({"quantity": "ball", "weight": 1.0, "points": "pixels"}, "one of keys, tokens"),
        ({"quantity": "l1_logits", "weight": 1.0, "normalize": True}, "normalize is for row_entropy"),
        ({"quantity": "row_entropy", "weight": 1.0, "normalize": True, "budget": 9}, "give its floor, the fraction"),
        ({"quantity": "row_entropy", "weight": 1.0, "normalize": True, "floor": 2.5}, r"must be in \[0, 1\)"),
        ({"quantity": "block_entropy", "weight": 1.0, "block_size": 0}, "block_size of a penalty"),
    ],
)
def test_a_wrong_mapping_is_one_sentence(mapping, word):
    with pytest.raises(ConfigError, match=word) as caught:
        penalty_from_mapping(mapping)
    assert "\n" not in str(caught.value)
