"""Other processors at home: sums of torch are rounded another way, so that tests show what hangs on the last digit.

``pytest --rounding 1 tests/...`` (single process; 2, 3, ... are further ways). Every product of matrices, sum, softmax
and norm that the tests' own process computes moves by up to two units in the last place, the same way for the same
operation on tensors of the same shape. So what computes the same stays the same to the bit, as on any one processor,
and what computes the same in another order differs, as between processors. What one unit in the last place decides
fails. Two kinds fail without a reason: what torch traces or compiles as one graph, which does not go together with
this, and what compares sums of parts that are equal but no whole numbers.
"""

import functools
import zlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SUMS = {
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "mv",
    "dot",
    "convolution",
    "sum",
    "mean",
    "var",
    "std",
    "cumsum",
    "logsumexp",
    "_softmax",
    "_log_softmax",
    "native_layer_norm",
    "linalg_vector_norm",
    "_scaled_dot_product_flash_attention_for_cpu",
}
LARGEST = 2
"""Units in the last place."""


class OtherRounding(TorchDispatchMode):
    """Within it, results of sums differ in their last digits.

    Args:
        seed: which way they differ.
    """

    def __init__(self, seed):
        super().__init__()
        self.seed = seed

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        found = operation(*arguments, **(options or {}))
        name = operation.overloadpacket.__name__
        if name not in SUMS or "out" in (options or {}) or torch.jit.is_tracing():
            return found
        if isinstance(found, tuple):
            return (self._moved(name, found[0]), *found[1:])
        return self._moved(name, found)

    def _moved(self, name, value):
        # Half precision is rounded once from sums in float32, whose last digit it does not show.
        if type(value) is not torch.Tensor or value.dtype not in (torch.float32, torch.float64):
            return value
        # Sums of counts are exact on every processor.
        return torch.where(value == value.round(), value, value * _factors(name, value.shape, value.dtype, self.seed))


@functools.lru_cache(maxsize=4096)
def _factors(name, shape, dtype, seed):
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name} {tuple(shape)}".encode()))
    units = torch.randint(-LARGEST, LARGEST + 1, tuple(shape), generator=generator)
    return (1.0 + units.double() * torch.finfo(dtype).eps).to(dtype)
