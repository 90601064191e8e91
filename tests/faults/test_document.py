"""The document shows the table of faults that the tests go by."""

from tests.faults.catalogue import DOCUMENT, document_with_table, markdown


def test_the_document_shows_the_table():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert document_with_table(text) == text, "run python -m tests.faults.catalogue"


def test_the_table_has_every_family():
    table = markdown()
    words = (
        "kill -9",
        "Disk full",
        "Damaged",
        "disappear",
        "Two processes",
        "backwards",
        "no permission",
        "pickle",
        "zip",
    )
    for word in words:
        assert word in table
    assert table.count("\n| ") - 2 * table.count("### ") >= 70
