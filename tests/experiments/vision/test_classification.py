"""Accuracy and calibration against counting by hand, and what an evaluation leaves behind."""

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from entreg.errors import ConfigError, InputError
from entreg.experiments.vision.classification import (
    Classification,
    classify,
    evaluate,
    evaluation_mode,
    expected_calibration_error,
)


def slow_calibration_error(confidence, correct, bins):
    total, error = len(confidence), 0.0
    for index in range(bins):
        low, high = index / bins, (index + 1) / bins
        inside = [i for i, c in enumerate(confidence) if low < c <= high or (index == 0 and c == 0)]
        if inside:
            accuracy = sum(correct[i] for i in inside) / len(inside)
            mean = sum(confidence[i] for i in inside) / len(inside)
            error += len(inside) / total * abs(accuracy - mean)
    return error


def test_top1_and_top5_are_counted_per_answer():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 6, 10, generator=generator)
    labels = torch.randint(10, (50, 4), generator=generator)
    result = classify(logits, labels)
    for image in range(50):
        for answer in range(4):
            row = logits[image, answer].tolist()
            ranked = sorted(range(10), key=lambda c, row=row: -row[c])
            label = int(labels[image, answer])
            assert result.correct[image, answer] == (ranked[0] == label)
            assert result.in_top5[image, answer] == (label in ranked[:5])
    expected = nn.functional.cross_entropy(logits[:, :4].flatten(0, 1).double(), labels.flatten())
    assert result.mean_loss == pytest.approx(expected.item(), rel=1e-6)
    assert result.top1 == pytest.approx(result.per_image.mean().item())
    assert 0 < result.top1 < result.top5 < 1


def test_one_label_per_image_is_one_answer():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    result = classify(logits, torch.tensor([0, 0]))
    assert result.correct.tolist() == [[True], [False]]
    assert result.top5 == 1.0
    assert result.metrics()["images"] == 2
    with_tokens = classify(logits[:, None].expand(2, 4, 3), torch.tensor([0, 0]))
    assert with_tokens.correct.tolist() == [[True], [False]]


def test_calibration_error_agrees_with_its_definition():
    generator = torch.Generator().manual_seed(1)
    confidence = torch.rand(500, generator=generator)
    confidence[:4] = torch.tensor([0.0, 1.0, 1 / 15, 0.2])
    correct = torch.rand(500, generator=generator) < confidence**2
    for bins in (1, 7, 15):
        slow = slow_calibration_error(confidence.double().tolist(), correct.tolist(), bins)
        assert expected_calibration_error(confidence, correct, bins) == pytest.approx(slow, abs=1e-12)
    # Always right with probability one half is off by one half.
    assert expected_calibration_error(torch.full((8,), 0.5), torch.ones(8, dtype=torch.bool)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("logits", "labels", "sentence"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), "lie in"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), "lie in"),
        (torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.long), "fit"),
        (torch.zeros(3, 3), torch.zeros(2, dtype=torch.long), "fit"),
        (torch.zeros(2, 3), torch.zeros(2, 3), "class indices"),
        (torch.zeros(2, 1, 3), torch.zeros(2, 2, dtype=torch.long), "answer"),
        (torch.full((2, 3), float("nan")), torch.zeros(2, dtype=torch.long), "NaN"),
    ],
)
def test_what_does_not_fit_gets_one_sentence(logits, labels, sentence):
    with pytest.raises(InputError, match=sentence):
        classify(logits, labels)


def test_calibration_of_nothing_gets_one_sentence():
    with pytest.raises(InputError, match="non-empty"):
        expected_calibration_error(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        expected_calibration_error(torch.tensor([1.5]), torch.ones(1, dtype=torch.bool))
    with pytest.raises(InputError, match="no images"):
        Classification.concatenate([])


class Numbers(Dataset):
    """Images that are their own logits, two answers each."""

    def __init__(self, count: int = 7):
        self.images = torch.randn(count, 2, 4, generator=torch.Generator().manual_seed(2))
        self.labels = torch.randint(4, (count, 2), generator=torch.Generator().manual_seed(3))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"images": self.images[index], "labels": self.labels[index]}


class Identity(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(4, 4, bias=False)
        nn.init.eye_(self.linear.weight)
        self.seen = []

    def forward(self, images):
        self.seen.append((self.training, torch.is_grad_enabled(), len(images)))
        return self.linear(self.dropout(images))


def test_an_evaluation_is_in_order_without_dropout_and_restores_every_mode():
    model, dataset = Identity(), Numbers()
    model.train()
    model.linear.eval()
    observed = []
    result = evaluate(model, dataset, batch_size=3, observe=lambda batch: observed.append(batch["labels"]))
    assert torch.equal(result.correct, dataset.images.argmax(-1) == dataset.labels)
    assert model.seen == [(False, False, 3), (False, False, 3), (False, False, 1)]
    assert torch.equal(torch.cat(observed), dataset.labels)
    assert model.training
    assert model.dropout.training
    assert not model.linear.training


def test_limit_and_precision():
    model, dataset = Identity(), Numbers()
    assert len(evaluate(model, dataset, limit=5, batch_size=2).correct) == 5
    assert len(evaluate(model, dataset, limit=50).correct) == 7
    low = evaluate(model, dataset, precision="bfloat16")
    high = evaluate(model, dataset)
    assert low.mean_loss == pytest.approx(high.mean_loss, rel=1e-2)
    assert low.mean_loss != high.mean_loss


def test_modes_return_after_an_error():
    model = Identity().train()
    with pytest.raises(RuntimeError), evaluation_mode(model):
        raise RuntimeError
    assert model.training


@pytest.mark.parametrize("change", [{"precision": "float16"}, {"batch_size": 0}, {"limit": 0}])
def test_impossible_settings_get_one_sentence(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        evaluate(Identity(), Numbers(), **change)
    with pytest.raises(InputError, match="no images"):
        evaluate(Identity(), Numbers(0))
