"""Budgets by entropy at a given mean sparsity: entropies and entries counted here, and what the model really runs."""

import math

import pytest
import torch
from torch.utils.data import default_collate

from entreg.adapters import sparsify, vision_model
from entreg.errors import ConfigError
from entreg.experiments.vision.entropy_budgets import match_sparsity, sparsity_by_budget
from entreg.experiments.vision.evaluation import check_evaluation, evaluate_everything
from entreg.sparse import EntropyBudget, TokenSparsity

LOADER = {"batch_size": 7, "precision": "float32", "limit": None}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = vision_model(
        "vit_base_patch16_224",
        img_size=24,
        patch_size=4,
        in_chans=1,
        embed_dim=16,
        depth=3,
        num_heads=2,
        num_classes=3,
    )
    # Attention that differs between images, so that their budgets do.
    for block in made.blocks:
        block.attn.qkv.weight.data *= 30.0
    return made.eval()


class Images:
    """Noise of growing contrast in a growing part of the image."""

    images = torch.randn(20, 1, 24, 24, generator=torch.Generator().manual_seed(3))
    images[:, :, :, 4:] *= torch.linspace(0, 6, 20)[:, None, None, None]
    labels = torch.arange(20) % 3

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"images": self.images[index], "labels": self.labels[index], "masks": self.images[index][0] > 0}


def test_sparsity_of_a_budget_is_that_of_the_equal_budget_for_all(model):
    plan = TokenSparsity(entropy_budget=EntropyBudget(), before_layer=1, num_sampled_queries=5)
    found = sparsity_by_budget(plan, num_tokens=37, num_prefix=1, depth=3)
    assert len(found) == 37
    for keep in (0, 1, 9, 35):
        with sparsify(model, TokenSparsity(keep=keep, before_layer=1, num_sampled_queries=5)) as handle:
            assert found[keep].item() == pytest.approx(handle.realised_sparsity(Images.images[:2]))


@pytest.mark.parametrize("reduction", ["drop", "merge"])
def test_the_mean_sparsity_over_the_images_is_the_wanted_one(model, reduction):
    wanted = 0.25
    plan = TokenSparsity(
        entropy_budget=EntropyBudget(minimum=1), score="received", reduction=reduction, num_sampled_queries=None
    )
    matched = match_sparsity(model, Images(), plan, wanted, **LOADER)
    # Budgets from entropies computed here, image by image.
    with sparsify(model, matched, record=True) as handle, torch.no_grad():
        model(Images.images)
        (selection,) = handle.selections
    kept = (selection.kept >= 0).sum(1) - 1
    mean = lambda multiplier: sum(saved(b, 37) for b in budgets(selection.scores, multiplier)) / 20  # noqa: E731
    multiplier = matched.entropy_budget.multiplier
    assert kept.tolist() == budgets(selection.scores, multiplier)
    assert len(set(kept.tolist())) > 3
    # The multiplier lies at the edge where an image changes its budget.
    assert mean(0.9999 * multiplier) >= wanted > mean(1.0001 * multiplier)


def budgets(scores, multiplier):
    result = []
    for row in scores.double().tolist():
        shares = [value / sum(row[1:]) for value in row[1:]]
        entropy = -sum(p * math.log(p) for p in shares if p > 0)
        result.append(min(36, max(1, round(multiplier * math.exp(entropy)))))
    return result


def saved(budget, num_sampled_queries=16):
    """Of three layers, the first is dense and pays for the sampled rows."""
    computed = 37**2 + num_sampled_queries * 37 + 2 * (1 + budget) ** 2
    return 1 - computed / (3 * 37**2)


def test_a_row_tells_mean_and_tail_of_what_the_images_kept(model):
    plans = {"own": {"kind": "tokens", "before_layer": 1, "entropy_budget": {"minimum": 2}, "levels": [0.45]}}
    plans["own"] |= {"scores": ["received"], "reductions": ["drop"]}
    config = {"splits": ["validation", "test"], "plans": plans, "localisation": None, "robustness": None, **LOADER}
    test = Images()
    _, rows = evaluate_everything(model, {"validation": Images(), "test": test}, config, data={})
    dense, row = (one for one in rows if one["split"] == "test")
    assert (row["plan"], row["level"], row["reduction"], row["score"]) == ("own", 0.45, "drop", "received")
    plan = TokenSparsity(entropy_budget=EntropyBudget(row["multiplier"], minimum=2), score="received")
    kept, generator = [], torch.Generator()
    with sparsify(model, plan, record=True, generator=generator) as handle, torch.no_grad():
        for number, first in enumerate(range(0, 20, 7)):
            # Every batch draws its queries by its number.
            generator.manual_seed(number)
            model(default_collate([test[i]["images"] for i in range(first, min(20, first + 7))]))
            kept += ((handle.selections[0].kept >= 0).sum(1) - 1).tolist()
    assert row["budget_mean"] == pytest.approx(sum(kept) / 20)
    assert row["budget_max"] == max(kept)
    assert sorted(kept)[9] <= row["budget_median"] <= sorted(kept)[10]
    assert sorted(kept)[18] <= row["budget_p95"] <= sorted(kept)[19]
    assert row["sparsity"] == pytest.approx(sum(map(saved, kept)) / 20)
    assert "multiplier" not in dense


def test_a_sparsity_that_no_budget_reaches_is_refused(model):
    plan = TokenSparsity(entropy_budget=EntropyBudget(minimum=30), score="received")
    with pytest.raises(ConfigError, match=r"0\.9 cannot be reached by entropy budgets before layer 1; the largest"):
        match_sparsity(model, Images(), plan, 0.9, **LOADER)


def test_levels_of_entropy_budgets_need_validation_images():
    plans = {"own": {"kind": "tokens", "entropy_budget": {"minimum": 1}, "levels": [0.5]}}
    config = {"splits": ["test"], "plans": plans, "localisation": None, "robustness": None, **LOADER}
    with pytest.raises(ConfigError, match="fitted on the split validation"):
        check_evaluation(config)
    check_evaluation({**config, "splits": ["validation", "test"]})
