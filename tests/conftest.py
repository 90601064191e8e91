"""What all tests share: how they are spread over processes, and other processors' rounding on demand."""

import os

import pytest

MEMORY_PER_WORKER = 5 * 2**30
"""Bytes that one process of tests, with what it starts, may take."""


def cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Workers share the cores: each has its part of the threads, of torch too, which reads this when it is imported.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, str(max(1, cores() // WORKERS)))


def pytest_addoption(parser):
    parser.addoption("--rounding", type=int, metavar="SEED", help="round sums another way; see tests/rounding.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Of ``-n auto``: a worker per core, as far as memory goes; more than four are not tried."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores(), memory // MEMORY_PER_WORKER, 4))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Of ``--dist loadgroup``: slow tests one by one, and first; then the other tests of a file together.

    Together, because they share the file's fixtures. A mark ``xdist_group`` of a test or a file says otherwise:
    "compiling" has what starts torch's compiler, which takes long for the first time in a process, and "report" what
    builds the report of the committed records.
    """
    if WORKERS == 1:
        return
    for item in items:
        if item.get_closest_marker("xdist_group") is None and item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.xdist_group(item.location[0]))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    seed = session.config.getoption("rounding")
    if seed is None:
        return (yield)
    from tests.rounding import OtherRounding

    with OtherRounding(seed):
        return (yield)


@pytest.fixture(scope="session")
def reference_records():
    """The committed records, read once in a process."""
    from entreg.records import REFERENCE_ROOT, RecordStore

    return [record for record in RecordStore(REFERENCE_ROOT).load_all() if record["scale"] != "smoke"]
