"""How numbers look in tables: three significant digits, units, intervals, and words for what is missing."""

import math
import re

from entreg.records.statistics import Estimate

NOT_RUN = "not run"
MISSING = "–"

_LATEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "–": "--",
    "—": "---",
    "−": "$-$",
    "×": r"$\times$",
    "±": r"$\pm$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "≈": r"$\approx$",
    "∞": r"$\infty$",
    "→": r"$\rightarrow$",
    "·": r"$\cdot$",
    "µ": r"$\mu$",
    "²": r"$^2$",
    "³": r"$^3$",
    "α": r"$\alpha$",
    "λ": r"$\lambda$",
    "τ": r"$\tau$",
    "Δ": r"$\Delta$",
    "…": r"\ldots{}",
}


def number(value: float | None, digits: int = 3) -> str:
    """A number with ``digits`` significant digits, thousands separated, never in scientific notation above 1e-4."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "∞" if value > 0 else ("−∞" if value < 0 else MISSING)
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    exponent = math.floor(math.log10(abs(rounded)))
    if exponent < -4:
        return f"{value:.{digits - 1}e}"
    return f"{rounded:,.{max(0, digits - 1 - exponent)}f}"


def estimate(value: Estimate | None, unit: str = "", digits: int = 3) -> str:
    """A mean with its 95 % interval in brackets, for example ``4.61x [4.12, 5.10]``."""
    if value is None:
        return NOT_RUN
    text = f"{number(value.mean, digits)}{unit}"
    if value.interval is None:
        return text
    return f"{text} [{number(value.low, digits)}, {number(value.high, digits)}]"


def ratio(value: float | Estimate | None, digits: int = 3) -> str:
    """A speed-up or other ratio, for example ``18.3x``."""
    if isinstance(value, Estimate):
        return estimate(value, "x", digits)
    return NOT_RUN if value is None else f"{number(float(value), digits)}x"


def seconds(value: float | None, digits: int = 3) -> str:
    """A duration in the unit that reads best: ns, µs, ms, s, min or h."""
    if value is None:
        return NOT_RUN
    for limit, factor, unit in ((1e-6, 1e9, "ns"), (1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (120.0, 1.0, "s")):
        # Compared after rounding, so that 0.9999 s is "1.00 s" and not "1,000 ms".
        if float(f"{abs(value):.{digits - 1}e}") < limit:
            return f"{number(value * factor, digits)} {unit}"
    if value < 7200.0:
        return f"{number(value / 60.0, digits)} min"
    return f"{number(value / 3600.0, digits)} h"


def percent(fraction: float | None, digits: int = 3) -> str:
    """A fraction as per cent, for example ``0.18 %``."""
    return NOT_RUN if fraction is None else f"{number(100.0 * float(fraction), digits)} %"


def p_value(value: float | None) -> str:
    """A p-value with two digits, ``< 0.001`` where it is smaller than that."""
    if value is None:
        return MISSING
    return "< 0.001" if value < 0.001 else number(float(value), 2)


def markdown_cell(text: str) -> str:
    """Text that cannot break out of its table cell."""
    return " ".join(text.split()).replace("|", "\\|")


def latex(text: str) -> str:
    """Text for LaTeX: specials escaped; `code` and **bold** of Markdown kept."""
    forms = {"code": r"\texttt{%s}", "bold": r"\textbf{%s}", "plain": "%s"}
    return "".join(forms[kind] % _escape(part) for kind, part in spans(text))


def spans(text: str) -> list[tuple[str, str]]:
    """Parts of a text in the Markdown that tables use, white space made single.

    Returns:
        Pairs of ``code``, ``bold`` or ``plain`` and the part without its marks.
    """
    result = []
    for part in re.split(r"(`[^`]+`|\*\*[^*]+\*\*)", " ".join(text.split())):
        if len(part) > 2 and part[0] == part[-1] == "`":
            result.append(("code", part[1:-1]))
        elif len(part) > 4 and part.startswith("**") and part.endswith("**"):
            result.append(("bold", part[2:-2]))
        elif part:
            result.append(("plain", part))
    return result


def _escape(text: str) -> str:
    return "".join(_LATEX_SPECIAL.get(character, character) for character in text)
