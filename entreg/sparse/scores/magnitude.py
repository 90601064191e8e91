"""The score that looks at no attention."""

from __future__ import annotations

import torch
from torch import Tensor

from entreg.errors import InputError
from entreg.sparse.registries import SCORES
from entreg.sparse.scores.score import Score, ScoreInputs, at_least_float32


class Magnitude(Score):
    """L2 norm of the value vector, or of the token if only features are given."""

    def scores(self, inputs: ScoreInputs) -> Tensor:
        values = inputs.values
        if values is None:
            if inputs.features is None:
                raise InputError("the score 'magnitude' needs values or features")
            return torch.linalg.vector_norm(at_least_float32(inputs.checked_features()), dim=-1).unsqueeze(1)
        keys = inputs.keys
        if values.shape[:3] != keys.shape[:3]:
            raise InputError(f"values must have shape {tuple(keys.shape[:3])} + (d_v,), got {tuple(values.shape)}")
        norms = torch.linalg.vector_norm(at_least_float32(values), dim=-1)
        return inputs.of_query_heads(norms)


SCORES.register("magnitude", Magnitude())
