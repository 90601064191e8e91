"""Tables as Markdown and LaTeX, and the build of everything that is generated from records."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from entreg.errors import InputError
from entreg.records.formatting import (
    MISSING,
    NOT_RUN,
    estimate,
    latex,
    markdown_cell,
    number,
    percent,
    ratio,
    seconds,
    spans,
)
from entreg.records.registry import Registry
from entreg.records.statistics import Estimate

__all__ = [
    "MISSING",
    "NOT_RUN",
    "Table",
    "TracedRow",
    "estimate",
    "number",
    "percent",
    "provenance",
    "ratio",
    "register_table",
    "seconds",
    "table_registry",
]

GENERATED = "generated from run records by scripts/tables.py; do not edit"

Cell = str | int | float | Estimate | None
TableBuilder = Callable[[list[dict[str, Any]]], "Table | None"]

table_registry: Registry[TableBuilder] = Registry("table")


def register_table(name: str, experiments: Sequence[str] = ("",)) -> Callable[[TableBuilder], TableBuilder]:
    """Decorator: the function builds ``results/tables/<name>.md``, ``.csv`` and ``.tex``; see :mod:`entreg.records`.

    Args:
        name: file stem, lower case with hyphens.
        experiments: prefixes of the experiments whose records the function is given.
    """
    return table_registry.register(name, experiments)


_MOST_LISTED = 30
_LATEX_NEEDS = r"% needs \usepackage{booktabs,graphicx,longtable,lscape}"
# In characters: where words wrap, and from where on a table is scaled by so much that more rows fit on a page.
_LATEX_LINE = 36
_LATEX_WIDE = 110
_LATEX_ROWS = {False: 30, True: 60}


class TracedRow(list[Cell]):
    """A table's row that names the records behind its own numbers, for the report.

    Args:
        cells: the row.
        record_ids: identifiers out of the table's own, in any order; none for a row that only says what was not run.
    """

    def __init__(self, cells: Iterable[Cell], record_ids: Iterable[str]) -> None:
        super().__init__(cells)
        self.record_ids = tuple(sorted(set(record_ids)))


@dataclass(frozen=True)
class Table:
    """A table whose cells are text or numbers.

    Attributes:
        name: file stem and LaTeX label.
        title: heading and caption.
        columns: headings, at least one.
        rows: cells, as many per row as there are columns. Text stays as it is (``code`` and ``**bold**`` of Markdown
            are understood), numbers get three significant digits, an :class:`Estimate` its interval, None a dash.
            A :class:`TracedRow` names its own records; for any other row those of the whole table stand.
        notes: sentences under the table.
        align: one of ``l``, ``r``, ``c`` per column; by default the first is left and the others right.
        record_ids: the records that the footer names; by default all those given to the builder.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = field(default_factory=tuple)
    align: str | None = None
    record_ids: Sequence[str] | None = None

    def __post_init__(self) -> None:
        width = len(self.columns)
        if width == 0:
            raise InputError(f"The table {self.name!r} needs at least one column.")
        for row in self.rows:
            if len(row) != width:
                raise InputError(f"The table {self.name!r} has {width} columns but a row of {len(row)}: {list(row)!r}.")
        if self.align is not None and (len(self.align) != width or set(self.align) - set("lrc")):
            raise InputError(f"align of the table {self.name!r} must be {width} letters out of l, r, c.")

    @property
    def alignment(self) -> str:
        return self.align or "l" + "r" * (len(self.columns) - 1)

    def with_notes(self, notes: Sequence[str]) -> "Table":
        """The same table with further sentences under it."""
        return replace(self, notes=(*self.notes, *notes))

    def text_rows(self) -> list[list[str]]:
        """All cells as text."""
        return [[_text(cell) for cell in row] for row in self.rows]

    def body_markdown(self) -> str:
        """The bare table in Markdown, without heading and notes."""
        rule = {"l": "---", "r": "---:", "c": ":---:"}
        lines = [
            _markdown_row(self.columns),
            "|" + "|".join(f" {rule[letter]} " for letter in self.alignment) + "|",
            *(_markdown_row(row) for row in self.text_rows()),
        ]
        return "\n".join(lines) + "\n"

    def to_markdown(self) -> str:
        """A whole Markdown file: heading, table, notes."""
        notes = "".join(f"\n- {' '.join(note.split())}" for note in self.notes)
        text = f"<!-- {GENERATED} -->\n\n# {self.title}\n\n{self.body_markdown()}"
        return text + (notes + "\n" if notes else "")

    def to_latex(self) -> str:
        """A LaTeX table in booktabs style, notes below, all text escaped.

        Tables wider than the text are scaled down to it; long ones break over pages, turned where they are wide as
        well. Columns of long words wrap.
        """
        cells = [list(self.columns), *self.text_rows()]
        widths = [max(len(row[index]) for row in cells) for index in range(len(self.columns))]
        wraps = [a == "l" and width > _LATEX_LINE for a, width in zip(self.alignment, widths, strict=True)]
        letters = "".join(
            f"p{{{_LATEX_LINE / 2:g}em}}" if wrap else letter
            for letter, wrap in zip(self.alignment, wraps, strict=True)
        )
        is_wide = sum(_LATEX_LINE if wrap else width for width, wrap in zip(widths, wraps, strict=True)) > _LATEX_WIDE
        notes = [rf"\par\raggedright\footnotesize {latex(note)}" for note in self.notes]
        title = [rf"\caption{{{latex(self.title)}}}", rf"\label{{tab:{self.name}}}"]
        top = [r"\toprule", _latex_row(self.columns), r"\midrule"]
        body = [_latex_row(row) for row in self.text_rows()]
        if len(body) > _LATEX_ROWS[is_wide]:
            # A float cannot break over pages, and what breaks cannot be scaled: small letters instead.
            size, turn = (
                (r"\tiny\setlength{\tabcolsep}{2pt}", "landscape") if is_wide else (r"\footnotesize", "flushleft")
            )
            lines = [
                rf"\begin{{{turn}}}{size}",
                rf"\begin{{longtable}}{{{letters}}}",
                *(title[0], title[1] + r" \\"),
                *(*top, r"\endfirsthead", *top, r"\endhead", r"\bottomrule", r"\endlastfoot"),
                *(*body, r"\end{longtable}", *notes, rf"\end{{{turn}}}"),
            ]
        else:
            lines = [
                *(r"\begin{table}[t]", r"\centering", *title),
                r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{",
                *(rf"\begin{{tabular}}{{{letters}}}", *top, *body, r"\bottomrule", r"\end{tabular}}"),
                *(*notes, r"\end{table}"),
            ]
        return "\n".join([f"% {GENERATED}", _LATEX_NEEDS, *lines]) + "\n"

    def to_csv(self) -> str:
        """The table as comma-separated values: headings and cells as text, without Markdown's marks and the notes."""
        plain = [
            ["".join(part for _, part in spans(cell)) for cell in row] for row in (self.columns, *self.text_rows())
        ]
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows(plain)
        return buffer.getvalue()

    def to_text(self) -> str:
        """The table in aligned plain text, for a terminal."""
        cells = [[str(column) for column in self.columns], *self.text_rows()]
        widths = [max(len(row[index]) for row in cells) for index in range(len(self.columns))]
        pad = {"l": str.ljust, "r": str.rjust, "c": str.center}

        def line(row: Sequence[str]) -> str:
            aligned = zip(row, widths, self.alignment, strict=True)
            return "  ".join(pad[letter](cell, width) for cell, width, letter in aligned).rstrip()

        rule = "  ".join("-" * width for width in widths)
        return "\n".join([self.title, line(cells[0]), rule, *(line(row) for row in cells[1:]), *self.notes]) + "\n"


def provenance(records: Sequence[Mapping[str, Any]], record_ids: Sequence[str] | None = None) -> list[str]:
    """Sentences that say where a table's numbers come from: records, scale, device, commit.

    Args:
        records: the records at hand.
        record_ids: those that were used; by default all.

    Raises:
        InputError: an identifier is not among the records.
    """
    by_id = {record["id"]: record for record in records}
    unknown = sorted(set(record_ids or ()) - set(by_id))
    if unknown:
        raise InputError(f"A table names the record {unknown[0]!r}, which is not among the records it was built from.")
    used = [by_id[key] for key in sorted(by_id if record_ids is None else set(record_ids))]
    if not used:
        return []
    hashes: dict[str, list[str]] = {}
    for record in used:
        hashes.setdefault(record["experiment"], []).append(record["config_hash"])
    listed = "; ".join(f"{name}: {_listed(digests)}" for name, digests in hashes.items())
    scales = ", ".join(sorted({record["scale"] for record in used}))
    devices = "; ".join(sorted({device_text(record["device"]) for record in used}))
    commits = ", ".join(sorted({commit_text(record["code"]) for record in used}))
    return [f"Records ({scales} scale): {listed}.", f"Device: {devices}.", f"Code: {commits}."]


def _listed(digests: Sequence[str]) -> str:
    if len(digests) <= _MOST_LISTED:
        return ", ".join(digests)
    return f"{len(digests)} records, {', '.join(digests[:3])} ..."


def device_text(device: Mapping[str, Any]) -> str:
    """A record's device in words."""
    # Which method ran on how many threads is said by the table: one record holds methods of both kinds.
    parts = [f"{device['cpu']}, {device['available_cores']} cores"]
    if device["memory_gib"] is not None:
        parts.append(f"{device['memory_gib']:.0f} GiB")
    parts.append(device["gpu"] or "no GPU")
    return ", ".join(parts)


def commit_text(code: Mapping[str, Any], digits: int = 10) -> str:
    """A record's commit in ``digits`` hexadecimal digits, and whether the tree had changed since."""
    if code["commit"] is None:
        return "commit unknown"
    return code["commit"][:digits] + (" with uncommitted changes" if code["dirty"] else "")


def _text(cell: Cell) -> str:
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Estimate):
        return estimate(cell)
    return number(cell)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(markdown_cell(cell) for cell in cells) + " |"


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(latex(cell) for cell in cells) + r" \\"
