"""The score that a gate learns."""

from __future__ import annotations

import torch
from torch import Tensor

from entreg.errors import InputError
from entreg.sparse.registries import SCORES
from entreg.sparse.scores.score import Score, ScoreInputs


class Gate(Score):
    """The value in [0, 1] of a learned gate for each token after the prefix; 1 for the prefix."""

    learned = True

    def scores(self, inputs: ScoreInputs) -> Tensor:
        if inputs.gate is None:
            raise InputError("a gate's scores are computed by the gate: pass them on as a tensor")
        x, prefix = inputs.features, inputs.sizes.num_prefix
        gate = torch.sigmoid(inputs.gate(x[:, prefix:]).squeeze(-1).float())
        return torch.cat((gate.new_ones(len(x), prefix), gate), 1).unsqueeze(1)


SCORES.register("gate", Gate())
