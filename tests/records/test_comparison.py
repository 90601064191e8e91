import pytest

from entreg.errors import InputError
from entreg.records.comparison import compare_with_reference
from entreg.records.formatting import seconds
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
