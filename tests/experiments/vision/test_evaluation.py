"""What is measured on a trained vision model, against accuracies, overlaps and means computed here."""

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from entreg.adapters import vision_model
from entreg.data.corruptions import CORRUPTIONS, EXTRA_CORRUPTIONS
from entreg.errors import AssetError, ConfigError
from entreg.experiments.vision import evaluation as vision_evaluation
from entreg.experiments.vision.evaluation import check_evaluation, evaluate_everything, expand_plans, open_datasets

SCENES = {"name": "digit_scenes", "canvas": 48, "digit_size": 16}
PLAN = {"kind": "tokens", "keep": 4, "before_layer": 1, "num_sampled_queries": 4, "score": "mixed"}


def evaluation(**changed):
    """The ``evaluation`` part of a configuration, with nothing to measure but accuracy."""
    return {
        "splits": ["test"],
        "limit": None,
        "batch_size": 4,
        "precision": "float32",
        "plans": {},
        "localisation": None,
        "robustness": None,
        **changed,
    }


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return vision_model(
        "vit_base_patch16_224",
        img_size=16,
        patch_size=4,
        in_chans=1,
        embed_dim=16,
        depth=2,
        num_heads=2,
        num_classes=3,
    ).eval()


class Images:
    """Ten noise images with a label and the mask of an object in the upper left."""

    def __init__(self, masks=True):
        generator = torch.Generator().manual_seed(3)
        self.images = torch.randn(10, 1, 16, 16, generator=generator)
        self.labels = torch.randint(3, (10,), generator=generator)
        self.masks = torch.zeros(10, 16, 16, dtype=torch.bool) if masks else None
        if masks:
            self.masks[:, :8, :8] = True

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        item = {"images": self.images[index], "labels": self.labels[index]}
        return item if self.masks is None else {**item, "masks": self.masks[index]}


def test_lists_stand_for_one_plan_each():
    plans = {
        "a": {"kind": "tokens", "keep": 4, "reductions": ["drop", "merge"], "scores": ["mixed", "gate"]},
        "b": {"kind": "columns", "levels": [0.5, 0.8]},
        "c": {"kind": "tokens", "sparsity": 0.3, "score": "prefix"},
        "left_out": None,
    }
    found = expand_plans(plans)
    assert [tuple(names.values()) for names, _ in found] == [
        ("a", None, "drop", "mixed"),
        ("a", None, "drop", "gate"),
        ("a", None, "merge", "mixed"),
        ("a", None, "merge", "gate"),
        ("b", 0.5, None, None),
        ("b", 0.8, None, None),
        ("c", None, None, "prefix"),
    ]
    assert found[2][1] == {"kind": "tokens", "keep": 4, "reduction": "merge", "score": "mixed"}
    assert found[5][1] == {"kind": "columns", "sparsity": 0.8}
    assert found[6][1] == {"kind": "tokens", "sparsity": 0.3, "score": "prefix"}
    assert plans["a"]["scores"] == ["mixed", "gate"]


def test_accuracy_dense_and_sparse_and_overlap_of_what_was_kept(model):
    data = Images()
    stock = {name: value.clone() for name, value in model.state_dict().items()}
    metrics, rows = evaluate_everything(model, {"test": data}, evaluation(plans={"a": PLAN}), data={})
    assert metrics == {}
    dense, sparse = rows
    batch = default_collate([data[index] for index in range(10)])
    with torch.no_grad():
        logits = model(batch["images"])
    assert (dense["plan"], dense["split"], dense["sparsity"], dense["images"]) == ("dense", "test", 0.0, 10)
    assert dense["top1"] == pytest.approx((logits.argmax(-1) == batch["labels"]).double().mean().item())
    assert dense["loss"] == pytest.approx(nn.functional.cross_entropy(logits, batch["labels"]).item(), rel=1e-5)
    # The second of two layers has 1 + 4 of 17 tokens; the selection took four sampled rows and the class token's.
    computed = (17**2 + 5**2 + 5 * 17) / (2 * 17**2)
    assert sparse["sparsity"] == pytest.approx(1 - computed)
    assert (sparse["plan"], sparse["score"], sparse["split"]) == ("a", "mixed", "test")
    # Four patches are kept, the mask covers four: the best overlap is 1, a random choice has much less.
    assert 0 <= sparse["kept_iou"] <= 1
    assert sparse["kept_best"] == pytest.approx(1.0)
    assert sparse["kept_random"] < 0.3
    with torch.no_grad():
        assert torch.equal(model(batch["images"]), logits)
    assert all(torch.equal(value, stock[name]) for name, value in model.state_dict().items())


def test_only_the_first_images_count_under_a_limit(model):
    _, (row,) = evaluate_everything(model, {"test": Images()}, evaluation(limit=3), data={})
    assert row["images"] == 3


def test_plans_by_gate_are_left_out_without_one(model):
    plans = {"a": {**PLAN, "scores": ["mixed", "gate"]}}
    plans["a"].pop("score")
    data = {"test": Images()}
    scores = lambda rows: [row["score"] for row in rows if row["plan"] == "a"]  # noqa: E731
    _, rows = evaluate_everything(model, data, evaluation(plans=plans), data={})
    assert scores(rows) == ["mixed"]
    gate = nn.ModuleDict({"1": nn.Linear(16, 1)})
    _, rows = evaluate_everything(model, data, evaluation(plans=plans), data={}, gate=gate)
    assert scores(rows) == ["mixed", "gate"]
    _, rows = evaluate_everything(model, data, evaluation(plans=plans), data={}, gate=nn.ModuleDict({"0": gate["1"]}))
    assert scores(rows) == ["mixed"]


def test_localisation_by_layer_and_for_the_mean_against_brute_force(model):
    data = Images()
    config = evaluation(localisation={"coverage": 0.5, "scores": ["received"]})
    _, rows = evaluate_everything(model, {"test": data}, config, data={})
    rows = {row["layer"]: row for row in rows if row["plan"] == "localisation"}
    assert list(rows) == [0, 1, "mean"]
    assert all(row["split"] == "test" and row["images"] == 10 for row in rows.values())
    attention = {}
    for layer, block in enumerate(model.blocks):
        block.attn.qkv.register_forward_hook(
            lambda module, inputs, output, layer=layer: attention.update({layer: output.double()})
        )
    with torch.no_grad():
        model(data.images)
    for block in model.blocks:
        block.attn.qkv._forward_hooks.clear()
    covered = {0, 1, 4, 5}
    masses = []
    for layer in (0, 1):
        queries, keys, _ = attention[layer].reshape(10, 17, 3, 2, 8).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(queries @ keys.transpose(-1, -2) / 8**0.5, dim=-1)
        received = weights.mean((1, 2))[:, 1:]
        masses.append(received / received.sum(-1, keepdim=True))
    for layer, mass in ((0, masses[0]), (1, masses[1]), ("mean", (masses[0] + masses[1]) / 2)):
        chosen = [set(row.topk(4).indices.tolist()) for row in mass]
        expected = sum(len(one & covered) / len(one | covered) for one in chosen) / 10
        assert rows[layer]["iou_matched"] == pytest.approx(expected)


class Constant(nn.Module):
    """Answers 0, whatever it sees."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, images):
        return self.bias.expand(len(images), 2)


BINARY = Images(masks=False)
BINARY.labels = torch.zeros(10, dtype=torch.long)


def wrong_answers(corruption, severity):
    """How many of ten images :class:`Constant` gets wrong."""
    return ((*CORRUPTIONS, *EXTRA_CORRUPTIONS).index(corruption) + 2 * severity) % 11


@pytest.fixture
def planted(monkeypatch):
    """Corrupted sets with a known error, and sparsity that changes nothing."""

    def dataset(data, corruption, severity, *, limit):
        images = Images(masks=False)
        images.labels = (torch.arange(10) < wrong_answers(corruption, severity)).long()
        return images

    class Handle:
        remove = staticmethod(lambda: None)

    monkeypatch.setattr(vision_evaluation, "corrupted_dataset", dataset)
    monkeypatch.setattr(vision_evaluation, "sparsify", lambda model, path, **_: Handle)


def robustness(severities, extra):
    return evaluation(robustness={"severities": severities, "extra": extra, "sparsity": PLAN})


def test_mean_corruption_error_is_of_the_fifteen_at_five_severities(planted):
    config = robustness([1, 2, 3, 4, 5], extra=True)
    metrics, rows = evaluate_everything(Constant(), {"test": BINARY}, config, data={})
    cells = [wrong_answers(corruption, severity) / 10 for corruption in CORRUPTIONS for severity in range(1, 6)]
    expected = sum(cells) / 75
    assert metrics == pytest.approx(
        {f"{name}_{setting}": expected for name in ("mce", "corrupted_error") for setting in ("dense", "sparse")}
    )
    rows = [row for row in rows if row["plan"] == "robustness"]
    assert len(rows) == 2 * 19 * 5
    assert {row["setting"] for row in rows} == {"dense", "sparse"}
    for row in rows:
        assert row["error"] == pytest.approx(wrong_answers(row["corruption"], row["severity"]) / 10)


@pytest.mark.parametrize("extra", [False, True])
def test_a_mean_over_some_severities_is_not_called_mean_corruption_error(planted, extra):
    metrics, rows = evaluate_everything(Constant(), {"test": BINARY}, robustness([2, 4], extra), data={})
    expected = sum(wrong_answers(corruption, s) / 10 for corruption in CORRUPTIONS for s in (2, 4)) / 30
    assert metrics["mce_dense"] is metrics["mce_sparse"] is None
    assert metrics["corrupted_error_dense"] == pytest.approx(expected)
    assert len([row for row in rows if row["plan"] == "robustness"]) == 2 * 2 * (19 if extra else 15)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"precision": "float16"}, "precision must be one of float32, bfloat16"),
        ({"batch_size": 0}, "at least 1"),
        ({"splits": ["validation"], "overlays": 2}, "split test"),
        ({"limit": 0}, "at least 1"),
        ({"plans": {"a": {"kind": "tokenz"}}}, "tokenz"),
        ({"plans": {"a": {"kind": "tokens", "keep": 4, "kep": 3}}}, "kep"),
        ({"robustness": {"severities": [], "extra": True, "sparsity": PLAN}}, "severities"),
        ({"robustness": {"severities": [1, 6], "extra": True, "sparsity": PLAN}}, "severities"),
        ({"robustness": {"severities": [1], "extra": True, "sparsity": {"kind": "colums"}}}, "colums"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_beforehand(changed, message):
    check_evaluation(evaluation(plans={"a": PLAN}))
    with pytest.raises(ConfigError, match=message):
        check_evaluation(evaluation(**changed))


def test_all_data_are_opened_at_once(tmp_path, monkeypatch):
    datasets = open_datasets(evaluation(splits=["validation", "test"]), SCENES)
    assert list(datasets) == ["train", "validation", "test"]
    assert datasets["test"][0]["images"].shape == (1, 48, 48)
    with pytest.raises(ConfigError, match="unknown split 'tset'"):
        open_datasets(evaluation(splits=["tset"]), SCENES)
    monkeypatch.setattr(vision_evaluation, "vision_dataset", lambda data, split: Images(masks=False))
    with pytest.raises(ConfigError, match="needs a data set with masks"):
        open_datasets(evaluation(localisation={"coverage": 0.5, "scores": ["mixed"]}), SCENES)
    cifar = {"name": "cifar100", "root": str(tmp_path), "validation_fraction": 0.1, "preprocessing": {"model": None}}
    with pytest.raises(AssetError, match="CIFAR"):
        open_datasets(robustness([1], extra=False), cifar)


def test_an_extra_corruption_that_the_files_lack_is_said_beforehand(monkeypatch):
    class Published:
        corruptions = CORRUPTIONS

    monkeypatch.setattr(vision_evaluation, "open_corrupted", lambda data, limit: (Published, None))
    with pytest.raises(ConfigError, match="no images under speckle_noise; set"):
        open_datasets(robustness([1], extra=True), SCENES)
    open_datasets(robustness([1], extra=False), SCENES)
