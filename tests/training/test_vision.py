"""The vision objective against its parts computed by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from entreg.errors import InputError
from entreg.training.penalties import Penalties
from entreg.training.vision import VisionObjective, answer_logits, cross_entropy, distillation_loss
from entreg.weights import frozen_copy


def test_answers_are_the_first_tokens():
    logits = torch.randn(2, 7, 5)
    assert torch.equal(answer_logits(logits, torch.zeros(2, 3, dtype=torch.long)), logits[:, :3])
    flat = torch.randn(2, 5)
    assert answer_logits(flat, torch.zeros(2, dtype=torch.long)) is flat
    with pytest.raises(InputError, match="token for each"):
        answer_logits(torch.randn(2, 2, 5), torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(InputError, match="cannot answer"):
        answer_logits(torch.randn(2, 2, 5), torch.zeros(2, dtype=torch.long))


def test_cross_entropy_is_the_mean_over_images_and_answers():
    logits, labels = torch.randn(3, 4, 6, dtype=torch.float64), torch.randint(6, (3, 4))
    by_hand = [-logits[i, j].log_softmax(-1)[labels[i, j]] for i in range(3) for j in range(4)]
    torch.testing.assert_close(cross_entropy(logits, labels).double(), torch.stack(by_hand).mean(), rtol=1e-6, atol=0)


def test_soft_labels_of_mixing_are_understood():
    logits = torch.randn(3, 6)
    hard = torch.tensor([1, 5, 0])
    torch.testing.assert_close(cross_entropy(logits, F.one_hot(hard, 6).float()), cross_entropy(logits, hard))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_is_the_divergence_times_temperature_squared(temperature):
    student, teacher = torch.randn(4, 2, 5), torch.randn(4, 2, 5)
    p = torch.distributions.Categorical(logits=teacher.double() / temperature)
    q = torch.distributions.Categorical(logits=student.double() / temperature)
    expected = torch.distributions.kl_divergence(p, q).mean() * temperature**2
    found = distillation_loss(student, teacher, temperature)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    assert distillation_loss(teacher, teacher, temperature).abs() < 1e-6


def test_loss_mixes_task_and_distillation():
    torch.manual_seed(0)
    model, other = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    batch = {"images": torch.randn(5, 1, 2, 2), "labels": torch.tensor([0, 1, 2, 1, 0])}
    teacher = frozen_copy(other)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    objective = VisionObjective(Penalties({}), teacher=teacher, distillation=0.25, temperature=2.0)
    loss, parts = objective(model, batch, 0)
    task = F.cross_entropy(model(batch["images"]), batch["labels"])
    distance = distillation_loss(model(batch["images"]), other(batch["images"]), 2.0)
    torch.testing.assert_close(loss, 0.75 * task + 0.25 * distance)
    torch.testing.assert_close(parts["task"], task.detach())
    plain, _ = VisionObjective(Penalties({}))(model, batch, 0)
    torch.testing.assert_close(plain, task)
