"""A model, data and objective small enough to train in milliseconds; as a script, one run in a process of its own.

python -m tests.training.tiny '{"directory": ..., "settings": {...}, "kill_at": 7}'
"""

import json
import os
import random
import signal
import sys

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from entreg.training.loop import TrainingSettings, train

FAST = {"steps": 12, "batch_size": 8, "learning_rate": 0.01, "warmup_steps": 2, "log_every": 4, "checkpoint_every": 3}


class Digits:
    """Twenty fixed images (1, 6, 6) of three classes."""

    def __init__(self, size=20):
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randn(size, 1, 6, 6, generator=generator)
        self.labels = torch.randint(3, (size,), generator=generator)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"images": self.images[index].clone(), "labels": self.labels[index]}


class ManyDigits(Digits):
    """The same, read many at once."""

    def __getitems__(self, indices):
        return [self[index] for index in indices]


class NoisyDigits(Digits):
    """The same with noise from all three global generators, as transforms draw it."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        noise = torch.rand(()) + np.random.rand() + random.random()  # noqa: NPY002
        return {**item, "images": item["images"] + noise.float()}


def shift(image):
    """An augmentation that draws from numpy and torch."""
    return image.roll(int(np.random.randint(6)), -1) + 0.1 * torch.randn(())  # noqa: NPY002


class TinyNet(nn.Module):
    """With dropout, so that its randomness counts, and a norm whose statistics are buffers."""

    def __init__(self, dropout=0.2, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Linear(36, 16)
            self.norm = nn.LayerNorm(16)
            self.second = nn.Linear(16, 3)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images):
        if self.training:
            self.seen += 1
        images = images.to(self.first.weight.dtype)
        return self.second(self.dropout(torch.relu(self.norm(self.first(images.flatten(1))))))


class Objective:
    """Cross-entropy and a penalty that an extra parameter and a state of its own scale."""

    def __init__(self, gate=None, kill_at=None):
        self.gate, self.kill_at, self.weight = gate, kill_at, 0.01

    def __call__(self, model, batch, step):
        if step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        logits = model(batch["images"])
        task = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), batch["labels"])
        penalty = torch.zeros(())
        if self.gate is not None:
            self.weight *= 1.05
            penalty = self.weight * (self.gate - task.detach()).square().sum()
        return task + penalty, {"task": task, "penalty": penalty.detach(), "weight": self.weight}

    def state_dict(self):
        return {"weight": self.weight}

    def load_state_dict(self, state):
        self.weight = state["weight"]


def new_run(kill_at=None, dropout=0.2, gated=True):
    """A fresh model, objective and extra parameters."""
    gate = nn.Parameter(torch.full((2,), 0.5)) if gated else None
    return TinyNet(dropout), Objective(gate, kill_at), [gate] if gated else []


def run(directory, settings, *, kill_at=None, dropout=0.2, data="Digits", augment=False, double=False, **options):
    """Train afresh or resumed, ``double`` in float64; gives the model, the extra parameters and the result."""
    model, objective, extra = new_run(kill_at, dropout)
    if double:
        model.double()
        extra = [one.double().detach().requires_grad_() for one in extra]
        objective.gate = extra[0]
    dataset = {"Digits": Digits, "ManyDigits": ManyDigits, "NoisyDigits": NoisyDigits}[data]()
    result = train(
        model,
        objective,
        dataset,
        TrainingSettings(**{**FAST, **settings}),
        directory,
        extra_parameters=extra,
        augment=shift if augment else None,
        device="cpu",
        **options,
    )
    return model, extra, result


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    run(arguments.pop("directory"), arguments.pop("settings"), **arguments)
