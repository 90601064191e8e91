"""What entropy is here: exact and bounded entropies, differentiable surrogates, attention entropies."""

from entreg.entropy.attention import (
    attention_key_entropy,
    attention_received,
    attention_row_entropy,
    effective_support,
)
from entreg.entropy.ball import BallEntropy
from entreg.entropy.certificate import EntropyCertificate
from entreg.entropy.halfspace import HalfspaceEntropy
from entreg.entropy.soft_partition import annealed_sharpness

__all__ = [
    "BallEntropy",
    "EntropyCertificate",
    "HalfspaceEntropy",
    "annealed_sharpness",
    "attention_key_entropy",
    "attention_received",
    "attention_row_entropy",
    "effective_support",
]
