"""What the overlays of single images say, against the model run by hand and against counting pixels."""

from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from entreg.adapters import sparsify, vision_model
from entreg.data.scenes import ClutteredDigits, DigitScenes
from entreg.errors import ConfigError
from entreg.experiments.studies import study_configs
from entreg.experiments.vision.evaluation import evaluate_everything, expand_plans
from entreg.experiments.vision.experiment import plan_run
from entreg.experiments.vision.overlays import overlays
from entreg.records.record import to_plain
from entreg.sparse import sparsity_from_mapping

CONFIGS = Path(__file__).parents[3] / "configs"
OPTIONS = {"img_size": 48, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
PLAN = {"kind": "tokens", "keep": 14, "before_layer": 1, "score": "mixed", "num_sampled_queries": None}
DROP = {"drop": {**PLAN, "reduction": "drop"}}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    one = vision_model("vit_base_patch16_224", num_classes=10, reg_tokens=3, global_pool="", **OPTIONS)
    # Random weights attend almost evenly: larger ones make the scores differ.
    with torch.no_grad():
        for block in one.blocks:
            block.attn.qkv.weight.mul_(10)
    return one.eval()


@pytest.fixture(scope="module")
def scenes():
    return DigitScenes("test", length=6)


def only(result):
    (plan,) = result["plans"].values()
    return plan


def test_images_labels_masks_and_answers_are_those_of_the_data_set_and_the_model(model, scenes):
    found = overlays(model, scenes, 3, expand_plans(DROP), coverage=0.125)
    pixels, labels, masks = scenes.pixels(range(3))
    assert np.array_equal(np.array(found["image"]), np.rint(255 * pixels[:, 0]))
    assert found["labels"] == labels.tolist()
    assert found["grid"] == [12, 12]
    for index in range(3):
        tiles = [(row, column) for row in range(12) for column in range(12)]
        counts = [masks[index, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].sum() for row, column in tiles]
        assert found["mask"][index] == [patch for patch, count in enumerate(counts) if count >= 2]
    batch = torch.stack([scenes[index]["images"] for index in range(3)])
    with torch.no_grad():
        assert found["answers"] == model(batch)[:, :4].argmax(-1).tolist()
        with sparsify(model, sparsity_from_mapping(DROP["drop"])):
            assert only(found)["answers"] == model(batch)[:, :4].argmax(-1).tolist()
    assert to_plain(found, "overlays") == found


def test_dropping_keeps_the_heaviest_patches_and_nothing_stands_for_the_others(model, scenes):
    plan = only(overlays(model, scenes, 2, expand_plans(DROP)))
    for kept, assignment, mass in zip(plan["kept"], plan["assignment"], plan["mass"], strict=True):
        assert len(mass) == len(assignment) == 144
        assert sum(mass) == pytest.approx(1.0, abs=1e-4)
        assert min(mass[patch] for patch in kept) >= max(mass[patch] for patch in range(144) if patch not in kept)
        assert kept == sorted(kept)
        assert len(kept) == 14
        assert [patch for patch in range(144) if assignment[patch] >= 0] == kept
        assert [assignment[patch] for patch in kept] == list(range(14))


def test_a_partition_assigns_every_patch_and_every_anchor_to_itself(model, scenes):
    plans = {"ours": {**PLAN, "reduction": "partition"}}
    plan = only(overlays(model, scenes, 2, expand_plans(plans)))
    for kept, assignment in zip(plan["kept"], plan["assignment"], strict=True):
        assert set(assignment) == set(range(14))
        assert [assignment[patch] for patch in kept] == list(range(14))


def test_each_token_plan_has_its_words_and_other_kinds_are_left_out(model, scenes):
    plans = {"both": {**PLAN, "reductions": ["drop", "partition"]}, "columns": {"kind": "columns", "sparsity": 0.5}}
    found = overlays(model, scenes, 1, expand_plans(plans))["plans"]
    assert list(found) == ["both drop mixed", "both partition mixed"]
    assert found["both drop mixed"]["reduction"] == "drop"
    assert type(model.blocks) is torch.nn.Sequential


def test_one_label_per_image_counts_as_one_answer():
    digits = ClutteredDigits("test", length=2)
    one = vision_model("vit_base_patch16_224", num_classes=10, **OPTIONS)
    found = overlays(one, digits, 2, expand_plans(DROP), precision="bfloat16")
    assert np.shape(found["labels"]) == np.shape(found["answers"]) == np.shape(only(found)["answers"]) == (2, 1)


@pytest.mark.parametrize("count", [0, 7])
def test_more_images_than_there_are_is_one_sentence(model, scenes, count):
    with pytest.raises(ConfigError, match=r"lie in \[1, 6\]"):
        overlays(model, scenes, count, expand_plans(DROP))


def test_without_a_token_plan_that_chooses_there_is_nothing_to_show(model, scenes):
    for plans in ({}, {"columns": {"kind": "columns", "sparsity": 0.5}}, {"all": {**DROP["drop"], "keep": 144}}):
        with pytest.raises(ConfigError, match="keeps fewer tokens"):
            overlays(model, scenes, 1, expand_plans(plans))


def test_only_configurations_that_name_overlays_get_them(model, scenes):
    config = {"splits": ["test"], "limit": 2, "batch_size": 2, "precision": "float32", "plans": DROP}
    config |= {"localisation": None, "robustness": None}
    metrics, _ = evaluate_everything(model, {"test": scenes}, config, data={})
    assert "overlays" not in metrics
    metrics, _ = evaluate_everything(model, {"test": scenes}, {**config, "overlays": 2}, data={})
    assert metrics["overlays"] == overlays(model, scenes, 2, expand_plans(DROP))


def test_the_experiment_runs_each_method_with_its_own_reduction_and_leaves_the_studys_configuration_alone():
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        overrides = ["experiment=vit/overlays", "profile=offline"]
        runs = [plan_run(one) for one in study_configs(hydra.compose("vision", overrides), overrides, "vision")]
        study = OmegaConf.to_container(hydra.compose("vision", ["experiment=vit/digit_scenes"]), resolve=True)
    found = {run.config["method"]: run.config for run in runs}
    reductions = {
        method: [names["reduction"] for names, _ in expand_plans(config["evaluation"]["plans"])]
        for method, config in found.items()
    }
    assert reductions == {"plain": ["drop"], "loop_a": ["drop"], "ours_a": ["partition"]}
    # The plan and the training are those of the study.
    plan = study["evaluation"]["plans"]["setting_a"]
    assert {**found["plain"]["evaluation"]["plans"]["setting_a"], "reductions": None, "scores": None} == {
        **plan,
        "reductions": None,
        "scores": None,
    }
    assert found["plain"]["trainer"] == study["trainer"]
    # A new key would change the hash by which the study's records are found.
    assert "overlays" not in study["evaluation"]


def test_an_image_that_is_cropped_for_the_model_is_shown_as_the_model_sees_it(model, scenes):
    class Cropped:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return scenes[index]

        def raw(self, index):
            return np.zeros((50, 60, 1), dtype=np.uint8)

    found = overlays(model, Cropped(), 2, expand_plans(DROP))
    for picture, index in zip(found["image"], range(2), strict=True):
        seen = scenes[index]["images"][0].numpy()
        wanted = 255 * (seen - seen.min()) / (seen.max() - seen.min())
        assert np.abs(np.array(picture) - wanted).max() <= 0.5 + 1e-3
