import pytest

from entreg.records.formatting import estimate, latex, markdown_cell, number, percent, ratio, seconds
from entreg.records.statistics import Estimate


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (1_000_000, "1,000,000"),
        (True, "yes"),
        (1234567.0, "1,230,000"),
        (123.4, "123"),
        (12.34, "12.3"),
        (1.234, "1.23"),
        (0.9996, "1.00"),
        (0.001234, "0.00123"),
        (0.0000123, "1.23e-05"),
        (-9.999, "-10.0"),
        (float("inf"), "∞"),
    ],
)
def test_number(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not run"),
        (0.0, "0 ns"),
        (2.2e-9, "2.20 ns"),
        (4.5e-6, "4.50 µs"),
        (0.0071, "7.10 ms"),
        (0.99951, "1.00 s"),
        (1.0, "1.00 s"),
        (13.2, "13.2 s"),
        (600.0, "10.0 min"),
        (7200.0, "2.00 h"),
    ],
)
def test_seconds(value, text):
    assert seconds(value) == text


def test_ratio_percent_and_estimate():
    assert ratio(18.29) == "18.3x"
    assert ratio(None) == "not run"
    assert ratio(Estimate(4.6, 4.1, 5.1, 3)) == "4.60x [4.10, 5.10]"
    assert percent(0.0018) == "0.180 %"
    assert percent(None) == "not run"
    assert estimate(None) == "not run"
    assert estimate(Estimate(4.6, None, None, 1), " ms") == "4.60 ms"


def test_markdown_cells_cannot_break_out():
    assert markdown_cell("a | b\nc") == "a \\| b c"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5 % & $3 #1 a_b {x} ~ ^", r"5 \% \& \$3 \#1 a\_b \{x\} \textasciitilde{} \textasciicircum{}"),
        (r"\input{/etc/passwd}", r"\textbackslash{}input\{/etc/passwd\}"),
        ("4–5x ≥ 450K ± 1 λ", r"4--5x $\geq$ 450K $\pm$ 1 $\lambda$"),
        ("`a_b %`", r"\texttt{a\_b \%}"),
        ("**best_of** rest", r"\textbf{best\_of} rest"),
        ("2 * 3 ** 4", "2 * 3 ** 4"),
        ('<b> | "x"', r"\textless{}b\textgreater{} \textbar{} \textquotedbl{}x\textquotedbl{}"),
        ("two\nlines", "two lines"),
    ],
)
def test_latex(text, expected):
    assert latex(text) == expected
