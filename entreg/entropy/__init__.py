"""What H is: the entropy of a partition of the data bounds the work that the data cost.

A list cut into parts of sizes ``n_1, n_2, ...`` has entropy ``H = sum (n_j / n) log(n / n_j)`` nats. If each part is
easy on its own (already sorted, or hidden inside the hull), an adaptive algorithm needs O(n (1 + H)) steps: the parts
cost nothing but being told apart. For attention, exp(H) of a row of weights is the number of keys that the row really
uses. Exact and bounded entropies of counts, sequences and planar lists live here, and differentiable surrogates that a
training loop can lower.
"""

from entreg.entropy.attention import (
    attention_block_entropy,
    attention_key_entropy,
    attention_received,
    attention_row_entropy,
    effective_support,
)
from entreg.entropy.ball import BallEntropy
from entreg.entropy.certificate import EntropyCertificate
from entreg.entropy.halfspace import HalfspaceEntropy
from entreg.entropy.hull_bounds import (
    EntropyBounds,
    HullPartition,
    PartKind,
    check_partition,
    hull_entropy,
)
from entreg.entropy.partition import partition_entropy
from entreg.entropy.runs import run_boundaries, run_entropy
from entreg.entropy.soft_partition import annealed_sharpness

__all__ = [
    "BallEntropy",
    "EntropyBounds",
    "EntropyCertificate",
    "HalfspaceEntropy",
    "HullPartition",
    "PartKind",
    "annealed_sharpness",
    "attention_block_entropy",
    "attention_key_entropy",
    "attention_received",
    "attention_row_entropy",
    "check_partition",
    "effective_support",
    "hull_entropy",
    "partition_entropy",
    "run_boundaries",
    "run_entropy",
]
