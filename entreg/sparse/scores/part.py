"""The score of whole parts of a partition."""

from __future__ import annotations

import torch
from torch import Tensor

from entreg.sparse.ball_partition import token_parts
from entreg.sparse.registries import SCORES
from entreg.sparse.scores.attention import AttentionRows
from entreg.sparse.scores.score import ScoreInputs


class Part(AttentionRows):
    """The mean score of a token's part, so that parts stay whole.

    The tokens after the prefix are partitioned by their features (the keys of all heads if none are given).
    """

    def scores(self, inputs: ScoreInputs) -> Tensor:
        scores = super().scores(inputs)
        features, prefix = inputs.features, inputs.sizes.num_prefix
        points = inputs.keys.transpose(1, 2).flatten(2) if features is None else inputs.checked_features()
        labels = token_parts(points.detach(), inputs.num_parts, num_prefix=prefix)
        return _part_means(scores, labels, prefix, inputs.num_parts)


SCORES.register("part", Part(prefix=0.5, sampled=0.5))


def _part_means(scores: Tensor, labels: Tensor, num_prefix: int, num_parts: int) -> Tensor:
    """Every token's score replaced by the mean of its part; the prefix, part 0, keeps its own scores."""
    member = torch.nn.functional.one_hot(labels, num_parts + 1).to(scores.dtype)
    means = (scores @ member) / member.sum(1).clamp_min(1.0).unsqueeze(1)
    pooled = means.gather(2, labels.unsqueeze(1).expand(-1, scores.shape[1], -1))
    return torch.cat((scores[..., :num_prefix], pooled[..., num_prefix:]), dim=-1)
