import csv
import io
import re
import shutil
import subprocess

import pytest

from entreg.errors import InputError
from entreg.records.statistics import Estimate
from entreg.records.tables import Table, provenance
from tests.records.samples import sample_record

TABLE = Table(
    "example",
    "Hull of 1_000 points & more",
    ["points", "time", "speed-up"],
    [["square|1", 0.00123456, Estimate(4.0, 3.0, 5.0, 3)], ["`disk`", None, "not run"]],
    notes=["Median of 7\nrounds, 95 %."],
)


def test_markdown():
    assert TABLE.to_markdown() == (
        "<!-- generated from run records by scripts/tables.py; do not edit -->\n"
        "\n"
        "# Hull of 1_000 points & more\n"
        "\n"
        "| points | time | speed-up |\n"
        "| --- | ---: | ---: |\n"
        "| square\\|1 | 0.00123 | 4.00 [3.00, 5.00] |\n"
        "| `disk` | – | not run |\n"
        "\n"
        "- Median of 7 rounds, 95 %.\n"
    )


def test_latex():
    text = TABLE.to_latex()
    assert r"\caption{Hull of 1\_000 points \& more}" in text
    assert r"\begin{tabular}{lrr}" in text
    assert r"square\textbar{}1 & 0.00123 & 4.00 [3.00, 5.00] \\" in text
    assert r"\texttt{disk} & -- & not run \\" in text
    assert r"\par\raggedright\footnotesize Median of 7 rounds, 95 \%." in text
    assert text.index(r"\toprule") < text.index(r"\midrule") < text.index(r"\bottomrule")
    # Outside comments no special character stands unescaped.
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert not re.search(r"(?<!\\)[%#$](?![\\])", body)
    assert text.count(r"\begin{") == text.count(r"\end{")


def test_csv_reads_back_as_the_cells_without_marks():
    rows = list(csv.reader(io.StringIO(TABLE.to_csv())))
    assert rows == [
        ["points", "time", "speed-up"],
        ["square|1", "0.00123", "4.00 [3.00, 5.00]"],
        ["disk", "–", "not run"],
    ]


def test_plain_text_is_aligned():
    lines = TABLE.to_text().splitlines()
    assert lines[0] == "Hull of 1_000 points & more"
    assert lines[1] == "points       time           speed-up"
    assert lines[3] == "square|1  0.00123  4.00 [3.00, 5.00]"
    assert lines[4] == "`disk`          –            not run"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((["a", "b"], [["x"]]), "2 columns but a row of 1"),
        (([], []), "at least one column"),
        ((["a"], [["x"]], (), "lr"), "1 letters"),
        ((["a"], [["x"]], (), "q"), "out of l, r, c"),
    ],
)
def test_bad_tables(arguments, words):
    with pytest.raises(InputError, match=words):
        Table("t", "T", *arguments)


def test_provenance_names_records_device_and_commit():
    first = sample_record(config={"n": 1})
    second = sample_record(config={"n": 2})
    other = sample_record("geometry/law", config={"n": 3}, scale="paper")
    first["code"] = {"commit": "a" * 40, "dirty": False}
    second["code"] = {"commit": "b" * 40, "dirty": True}
    other["code"] = {"commit": None, "dirty": None}
    first["device"] = {**first["device"], "cpu": "CPU 1", "gpu": "GPU 1", "memory_gib": 24.4}
    lines = provenance([other, second, first])
    hashes = sorted([first["config_hash"], second["config_hash"]])
    assert lines[0] == (
        f"Records (offline, paper scale): geometry/hull: {', '.join(hashes)}; geometry/law: {other['config_hash']}."
    )
    assert "CPU 1, " in lines[1]
    assert ", 24 GiB, GPU 1" in lines[1]
    assert lines[2] == "Code: aaaaaaaaaa, bbbbbbbbbb with uncommitted changes, commit unknown."
    assert provenance([first, second], [first["id"]])[0].endswith(f"{first['config_hash']}.")
    assert provenance([first], []) == []
    with pytest.raises(InputError, match="not among the records"):
        provenance([first], [second["id"]])


LONG = Table("long", "Long", ["points", "n"], [[f"row {place}", place] for place in range(90)], ["A note."])
WIDE = Table("wide", "Wide", ["name"] * 9, [["word " * 20] * 9] * 3, align="l" * 9)
LONG_AND_WIDE = Table("both", "Both", ["name"] * 9, [["word " * 6] * 9] * 90, align="l" * 9)


def test_latex_of_long_and_wide_tables():
    assert r"\begin{longtable}{lr}" in LONG.to_latex()
    assert r"\resizebox" in WIDE.to_latex()
    assert r"\begin{tabular}{" + "p{18em}" * 9 + "}" in WIDE.to_latex()
    assert r"\begin{landscape}" in LONG_AND_WIDE.to_latex()


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex here")
@pytest.mark.parametrize("table", [TABLE, LONG, WIDE, LONG_AND_WIDE], ids=lambda table: table.name)
def test_latex_compiles_and_fits_the_page(table, tmp_path):
    text = table.to_latex()
    packages = re.search(r"\\usepackage\{.*\}", text).group()
    (tmp_path / "paper.tex").write_text(
        f"\\documentclass{{article}}\n{packages}\n\\begin{{document}}\n{text}\\end{{document}}\n"
    )
    for _ in range(2):  # longtable learns its columns' widths in the first run
        result = subprocess.run(
            ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode == 0, result.stdout[-2000:]
    assert "Float too large" not in result.stdout
    if table is not LONG_AND_WIDE:
        assert "Overfull" not in result.stdout
