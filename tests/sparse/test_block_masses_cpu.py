"""Block masses in compiled loops against softmax in float64."""

import pytest
import torch

from entreg.sparse._block_masses_cpu import block_masses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("keys", "size"), [(64, 16), (70, 16), (5, 8), (33, 1)])
def test_masses_are_sums_of_softmax(dtype, keys, size):
    generator = torch.Generator().manual_seed(keys)
    logits = (4.0 * torch.randn(2, 3, 7, keys, generator=generator)).to(dtype)
    visible = torch.randint(1, keys + 1, (7,), generator=generator)
    hidden = torch.arange(keys) >= visible[:, None]
    # Garbage behind what is visible does not count.
    logits[:, :, hidden] = torch.nan
    wanted = torch.softmax(logits.double().masked_fill(hidden, -torch.inf), dim=-1)
    wanted = torch.nn.functional.pad(wanted, (0, -keys % size)).unflatten(-1, (-1, size)).sum(-1)
    assert torch.allclose(block_masses(logits, visible, size).double(), wanted, atol=1e-6)


def test_far_apart_logits_neither_overflow_nor_vanish():
    logits = torch.tensor([[3e4, 0.0, -3e4, 3e4], [-1e5, -1e5, -2e5, -1e5]])
    masses = block_masses(logits, torch.tensor([4, 2]), 2)
    assert torch.allclose(masses, torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
