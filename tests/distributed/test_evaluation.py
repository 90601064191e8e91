"""Evaluation by two processes gives the numbers of one, bit for bit, whatever the size of the data set."""

import json

import pytest
import torch

from tests.distributed.evaluations import SIZES, everything
from tests.distributed.launch import launch_forked


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    for done in launch_forked("tests/distributed/evaluations.py", tmp_path):
        assert done.returncode == 0, done.stderr
    # As many threads as there, in which sums are added up in the same order.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = everything()
    finally:
        torch.set_num_threads(threads)
    # Every process knows everything: what is decided by it is then decided alike.
    assert (tmp_path / "0.json").read_text() == alone
    assert (tmp_path / "1.json").read_text() == alone
    # The comparison is one of numbers that differ from size to size.
    found = json.loads(alone)
    losses = {str(found[str(size)][part]) for size in SIZES for part in (0, 1)}
    assert len(losses) == 2 * len(SIZES)
