import os
import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def memory_folder(tmp_path):
    """A folder in memory where there is one: a disk that others use takes seconds for what is forced to it."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="faults-", dir=shared) as folder:
        yield Path(folder)
