"""The last lines of a run: one per claim, what the reference gave beside it, no wider than a terminal."""

import re

import pytest

from entreg.experiments.printing import verdict_lines
from entreg.records import REFERENCE_ROOT, RecordStore
from entreg.records.claims import load_claims


@pytest.fixture(scope="module")
def speed_records():
    """The reference records that take no time to read and give verdicts: speed and training cost."""
    store = RecordStore(REFERENCE_ROOT)
    return store.load_all("vit/speed") + store.load_all("benchmark/training_cost")


def test_a_line_per_judged_claim_with_the_reference_beside_it(speed_records):
    (text,) = verdict_lines(speed_records, ("vit-", "train-", "amortise"))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    told = {cells[0]: cells[1:] for cells in (re.split(" {2,}", line) for line in lines[3:-2])}
    assert set(told) == {"vit-speed", "vit-flash", "vit-flash-only", "train-cost", "amortise"}
    # Records that are the reference give the reference's numbers.
    assert all(here == reference for _, here, reference, _ in told.values())
    assert told["vit-flash"] == ["2.07x", "2.97x", "2.97x", "not comparable"]
    assert "results/tables/claims.md" in lines[-2]


def test_only_the_claims_asked_for_and_none_without_records(speed_records):
    (text,) = verdict_lines(speed_records, ("vit-speed",))
    assert sum(line.startswith(tuple(claim.id for claim in load_claims())) for line in text.splitlines()) == 1
    assert verdict_lines(speed_records, ("geo-",)) == []
    assert verdict_lines([], ("",)) == []


def test_a_quick_run_is_told_as_one(speed_records):
    (text,) = verdict_lines([{**record, "scale": "reproduce"} for record in speed_records], ("vit-speed", "train-"))
    assert "This was a quick run" in text
    assert max(map(len, text.splitlines())) <= 100
    assert "This was a quick run" not in "".join(verdict_lines(speed_records, ("vit-speed",)))
