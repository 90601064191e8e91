"""Selection scores: how much each key or token seems to be needed, from few query rows.

The paper does not say how keys are chosen; all scores are our choice. A score must cost far less than the attention
that it saves, so attention rows are computed for a small sample of the queries: O(sampled x n), never n x n.

Each module here registers what it defines in :data:`entreg.sparse.registries.SCORES`, with its cost: ``received``,
``prefix`` and ``mixed`` (attention), ``magnitude``, ``part`` and ``gate``. They are loaded with this package.
"""

from entreg.names import import_modules
from entreg.sparse.scores.attention import sampled_positions
from entreg.sparse.scores.score import Score, ScoreInputs, ScoreSizes
from entreg.sparse.scores.selection import score_entries, score_of, selection_scores

__all__ = [
    "Score",
    "ScoreInputs",
    "ScoreSizes",
    "sampled_positions",
    "score_entries",
    "score_of",
    "selection_scores",
]

import_modules(__name__)
