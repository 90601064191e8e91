import pytest

from entreg.errors import InputError
from entreg.records import reference as comparison
from entreg.records.formatting import seconds
from entreg.records.reference import Basis, compare_with_reference
from tests.records.samples import sample_record


def rows(*values):
    return [{"points": name, "n": n, "seconds": value} for name, n, value in values]


def test_side_by_side_in_the_order_of_the_new_rows():
    here = [sample_record(rows=rows(("square", 1000, 0.2), ("disk", 1000, 0.9), ("cities", 10, 1.0)))]
    reference = [sample_record(rows=rows(("disk", 1000.0, 0.3), ("square", 1000, 0.2), ("gone", 1, 5.0)))]
    table = compare_with_reference(here, reference, ["points", "n"], "seconds", text=seconds)
    assert list(table.columns) == ["points", "n", "here", "reference", "here / reference"]
    assert table.rows == [
        ["square", 1000, "200 ms", "200 ms", "1.00x"],
        ["disk", 1000, "900 ms", "300 ms", "3.00x"],
        ["cities", 10, "1.00 s", "no reference", "–"],
    ]
    assert table.notes == ["1 of 2 measurements lie within 25 % of the reference; median ratio 2.00."]
    assert "900 ms" in table.to_text()


def test_equal_keys_are_averaged_and_missing_values_left_out():
    here = [sample_record(rows=[*rows(("a", 1, 1.0), ("a", 1, 3.0), ("a", 1, None)), {"other": 1}])]
    reference = [sample_record(rows=rows(("a", 1, 4.0)))]
    table = compare_with_reference(here, reference, ["experiment", "points"], "seconds")
    assert table.rows == [["geometry/hull", "a", "2.00", "4.00", "0.500x"]]
    assert table.notes[0].startswith("0 of 1")


def test_tolerance_is_symmetric_in_ratio():
    def verdict(value):
        table = compare_with_reference(
            [sample_record(rows=rows(("a", 1, value)))],
            [sample_record(rows=rows(("a", 1, 1.0)))],
            ["points"],
            "seconds",
            tolerance=0.25,
        )
        return table.notes[0].startswith("1 of 1")

    assert [verdict(value) for value in (0.79, 0.81, 1.0, 1.24, 1.26)] == [False, True, True, True, False]


def test_zero_against_zero_agrees():
    record = sample_record(rows=rows(("a", 1, 0.0)))
    assert compare_with_reference([record], [record], ["points"], "seconds").notes[0].startswith("1 of 1")


def test_no_reference_and_no_rows():
    table = compare_with_reference([sample_record()], [], ["distribution"], "seconds")
    assert table.notes == ["The reference holds none of these measurements."]
    with pytest.raises(InputError, match="None of the new records"):
        compare_with_reference([sample_record()], [], ["colour"], "seconds")


def said(values, basis, processor="this one"):
    """What follows from values of which the reference's are all 1."""
    here = sample_record(rows=rows(*((str(place), 1, value) for place, value in enumerate(values))))
    there = sample_record(rows=rows(*((str(place), 1, 1.0) for place in range(len(values)))))
    here["device"] = {**here["device"], "cpu": processor}
    there["device"] = {**there["device"], "cpu": "this one"}
    return compare_with_reference([here], [there], ["points"], "seconds", basis=basis).notes[1]


def test_a_deviation_is_said_to_be_load_machine_or_a_fault(monkeypatch):
    timed = Basis(timed=True, verdicts=("geo-hull-speed", "geo-tri-speed"))
    computed = Basis(timed=False, verdicts=("geo-error",), deviates="the network is trained anew")
    assert said([1.0, 1.1, 0.9, 1.0, 3.0], timed) == (
        "What follows: this run confirms the reference, and the verdicts on geo-hull-speed, geo-tri-speed can be "
        "relied on."
    )
    monkeypatch.setattr(comparison.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(comparison.os, "getloadavg", lambda: (0.0, 0.0, 5.0), raising=False)
    busy = said([0.5, 0.5, 1.0], timed, "another one")
    for words in ("5.0 wanted the 2 cores, which explains a deviation", "another one, not this one", "force=true"):
        assert words in busy
    monkeypatch.setattr(comparison.os, "getloadavg", lambda: (9.0, 9.0, 1.0), raising=False)
    idle = said([0.5, 0.5, 1.0], timed)
    assert "1.0 wanted the 2 cores, so it is not that" in idle
    assert "here as there this one" in idle
    wrong = said([0.5, 0.5, 1.0], computed)
    for words in ("neither load nor a slower machine", "the network is trained anew", "a fault", "geo-error"):
        assert words in wrong
