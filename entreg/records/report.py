"""``results/report.html``: verdicts, tables and figures on one page without a network, each number with its records.

The page is made from the same :class:`Table` objects as the Markdown and LaTeX files. It holds its style, script and
figures; a content security policy lets a browser load nothing else and run no other script.
"""

import base64
import functools
import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup, escape

from entreg.errors import InputError
from entreg.records.claims import DAGGER, JUDGED_SCALES, VERDICTS, Claim, Verdict, tally, why
from entreg.records.figures import fingerprint
from entreg.records.formatting import MISSING, NOT_RUN, estimate, number, seconds, spans
from entreg.records.statistics import Estimate
from entreg.records.tables import GENERATED, Cell, Table, TracedRow, commit_text, device_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SECTIONS = (
    ("overview", "All claims in one picture", "Picture", ("claims",)),
    ("vision", "Vision transformers", "Vision", ("vision-setting", "vision-equal", "vision-speed-cells", "vision-")),
    ("robustness", "Robustness to corruptions", "Robustness", ("cifar-mce", "cifar-")),
    ("language", "Language models", "Language", ("llm-aims", "llm-quality", "llm-speed", "llm-")),
    ("rewriting", "Geometry: learned rewriting and advice", "Rewriting", ("geometry-",)),
    ("geometry", "Geometry: speed and exactness", "Geometry", ("benchmark-aims", "benchmark-")),
    ("cost", "What the regulariser costs in training", "Training cost", ("regularizer-", "training-")),
    ("further", "Further tables", "Further", ("",)),
)
"""Identifier, heading, word in the navigation, and how the names of its tables and figures begin, in their order."""

_SUBJECTS = ("method", "variant", "distribution", "family", "model")
"""Fields of a configuration that say what a record is of, as far as they are text."""

_SCALE_TITLES = {"offline": "Offline", "paper": "At the paper’s scale"}
_BADGES = {*VERDICTS, "met", "missed"}
_PICTURE = re.compile(rb'<img src="data:[^"]*"')
_UNITS = {"ns": 1e-9, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "KiB": 2.0**10, "MiB": 2.0**20}
_LEADING_NUMBER = re.compile(
    r"^(?:>=|<=|[<>≥≤~(]|n =|\s)*(?P<number>[-+−]?(?:\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?|∞))(?:\s?(?P<unit>[A-Za-zµ]+)\b)?"
)


@dataclass(frozen=True)
class PageFigure:
    """A figure as the page shows it.

    Attributes:
        name: file stem.
        title: the figure's own, or its name in words.
        caption: the first paragraph of its builder's docstring.
        description: its panels, axes and legend in words, for those who do not see it.
        fingerprint: of what it shows, see :func:`entreg.records.figures.fingerprint`.
        size: width and height in CSS pixels.
        record_ids: the records that its builder was given.
    """

    name: str
    title: str
    caption: str
    description: str
    fingerprint: str
    size: tuple[int, int]
    record_ids: tuple[str, ...]


def page_figure(name: str, figure: "Figure", documentation: str | None, record_ids: Iterable[str]) -> PageFigure:
    """What the page says about a figure.

    Args:
        name: file stem.
        figure: as its builder drew it.
        documentation: the builder's docstring.
        record_ids: the records that the builder was given.
    """
    title = (figure.get_suptitle() or name.replace("-", " ").capitalize()).rstrip(".")
    axes = [one for one in figure.axes if one.get_visible()]
    panels = [text for one in axes if (text := one.get_title())]
    parts = [f"Figure: {title}"]
    for word, texts in (
        ("Panels", panels),
        ("Across", [one.get_xlabel() for one in axes]),
        ("Upwards", [one.get_ylabel() for one in axes]),
        ("Legend", _legend(figure)),
    ):
        shown = [" ".join(text.split()) for text in dict.fromkeys(texts) if text]
        if shown:
            parts.append(f"{word}: {'; '.join(shown)}")
    width, height = (math.ceil(96 * inches) for inches in figure.get_size_inches())
    caption = (documentation or "").split("\n\n")[0]
    return PageFigure(
        name,
        title,
        " ".join(caption.split()),
        ". ".join(parts) + ".",
        fingerprint(figure),
        (width, height),
        tuple(sorted(record_ids)),
    )


def build_page(
    claims: Sequence[Claim],
    verdicts: Sequence[Mapping[str, Verdict]],
    tables: Sequence[Table],
    figures: Sequence[PageFigure],
    records: Sequence[Mapping[str, Any]],
    links: Mapping[str, str],
    pictures: Mapping[str, bytes],
) -> str:
    """The whole page as HTML; equal arguments give equal text.

    Args:
        claims: in the order of the page.
        verdicts: per claim, by scale.
        tables: without footers; each names the records behind it in ``record_ids``.
        figures: what to say about each figure.
        records: all that the tables, figures and verdicts rest on.
        links: record identifier to the relative path of its file, ``/`` between folders.
        pictures: figure name to its SVG file; a figure without one has an empty picture, for comparing pages.

    Raises:
        InputError: a table, figure or verdict names a record that is not among ``records``.
    """
    ordered = sorted(records, key=lambda record: record["id"])
    places = {record["id"]: place for place, record in enumerate(ordered)}
    script = _part("report.js")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    days = sorted(record["utc"][:10] for record in ordered)
    return environment.from_string(_part("report.html.jinja")).render(
        generated=GENERATED,
        style=Markup(_part("report.css")),
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
        not_run=NOT_RUN,
        dagger=DAGGER,
        table_count=len(tables),
        dates=" to ".join(dict.fromkeys((days[0], days[-1]))) if days else "",
        devices=sorted({device_text(record["device"]) for record in ordered}),
        tallies=[_tally(scale, verdicts) for scale in JUDGED_SCALES],
        claims=[_claim(claim, at, places) for claim, at in zip(claims, verdicts, strict=True)],
        sections=_sections(tables, figures, places, pictures),
        records=[_record(record, links[record["id"]]) for record in ordered],
    )


def same_page(old: bytes | None, new: str) -> bool:
    """Whether a page on disk says what a new one says, the pictures' pixels apart, which depend on matplotlib."""
    if old is None:
        return False
    return _PICTURE.sub(b"", old) == _PICTURE.sub(b"", new.encode("utf-8"))


def sort_key(cell: Cell) -> float | None:
    """The number by which a cell sorts in a column of numbers, units made equal; None when it has none.

    Of a range the first end counts, of a text like ``5.85x (parabola)`` the number that it begins with.
    """
    if isinstance(cell, Estimate):
        return cell.mean
    if isinstance(cell, int | float):
        return float(cell) if math.isfinite(cell) else None
    found = _LEADING_NUMBER.match(cell.replace("**", "")) if cell else None
    if found is None:
        return None
    text = found["number"].replace(",", "").replace("−", "-").replace("∞", "inf")
    return float(text) * _UNITS.get(found["unit"] or "", 1.0)


def compact_places(places: Iterable[int]) -> str:
    """Whole numbers as text: ``0-4 9`` for 0, 1, 2, 3, 4 and 9."""
    runs: list[list[int]] = []
    for place in sorted(set(places)):
        if runs and place == runs[-1][1] + 1:
            runs[-1][1] = place
        else:
            runs.append([place, place])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def shrink_svg(svg: str) -> str:
    """An SVG of matplotlib without its metadata, coordinates to a hundredth of a point: about half as long."""
    svg = re.sub(r"<\?xml.*?\?>|<!DOCTYPE[^>]*>|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'( (?:d|x|y|points)="|translate\()([^")]*)', lambda found: found[1] + _rounded(found[2]), svg)
    return re.sub(r"\s+", " ", svg).replace("> <", "><").strip()


@functools.cache
def _part(name: str) -> str:
    return resources.files("entreg.records").joinpath("page", name).read_text(encoding="utf-8")


def _sections(
    tables: Sequence[Table], figures: Sequence[PageFigure], places: Mapping[str, int], pictures: Mapping[str, bytes]
) -> list[dict[str, Any]]:
    found = []
    for place, (identifier, title, short, _) in enumerate(SECTIONS):
        own_tables, own_figures = (
            sorted((one for one in many if _place(one.name)[0] == place), key=lambda one: _place(one.name))
            for many in (tables, figures)
        )
        if own_tables or own_figures:
            found.append(
                {
                    "id": identifier,
                    "title": title,
                    "short": short,
                    "tables": [_table(table, places) for table in own_tables],
                    "figures": [_figure(figure, places, pictures) for figure in own_figures],
                }
            )
    return found


def _place(name: str) -> tuple[int, int, str]:
    """Section and place in it of a table or figure."""
    return next(
        (section, place, name)
        for section, (*_, beginnings) in enumerate(SECTIONS)
        for place, beginning in enumerate(beginnings)
        if name.startswith(beginning)
    )


def _table(table: Table, places: Mapping[str, int]) -> dict[str, Any]:
    used = _places(table.name, table.record_ids, places)
    # Words that are the same in every row are said once, above; they would fill a phone's screen.
    first = next(
        index for index in range(len(table.columns)) if index == len(table.columns) - 1 or not _constant(table, index)
    )
    rows = []
    for row in table.rows:
        own = _places(table.name, row.record_ids, places) if isinstance(row, TracedRow) else used
        cells = list(map(_cell, row[first:], table.alignment[first:]))
        rows.append({"records": compact_places(own), "cells": cells})
    columns = [
        {"text": column, "align": align}
        for column, align in zip(table.columns[first:], table.alignment[first:], strict=True)
    ]
    common = [(column, _rich(text)) for column, text in zip(table.columns, table.text_rows()[0][:first], strict=False)]
    return {
        "common": common,
        "name": table.name,
        "title": table.title,
        "columns": columns,
        "rows": rows,
        "notes": [_rich(note) for note in table.notes],
        "records": compact_places(used),
        "count": len(used),
    }


def _constant(table: Table, column: int) -> bool:
    return len(table.rows) > 2 and len({row[column] for row in table.text_rows()}) == 1


def _cell(cell: Cell, align: str) -> dict[str, Any]:
    text = cell if isinstance(cell, str) else estimate(cell) if isinstance(cell, Estimate) else number(cell)
    return {
        "html": _rich(text),
        "plain": "".join(part for _, part in spans(text)),
        "badge": text if text in _BADGES else None,
        "align": align,
        "sort": _sort_attribute(sort_key(cell)) if align == "r" else "",
    }


def _figure(figure: PageFigure, places: Mapping[str, int], pictures: Mapping[str, bytes]) -> dict[str, Any]:
    used = _places(figure.name, figure.record_ids, places)
    svg = pictures.get(figure.name, b"").decode("utf-8")
    return {
        **vars(figure),
        "source": "data:image/svg+xml," + quote(shrink_svg(svg), safe=" ()*,-./:;=@!"),
        "width": figure.size[0],
        "height": figure.size[1],
        "records": compact_places(used),
        "count": len(used),
    }


def _claim(claim: Claim, at: Mapping[str, Verdict], places: Mapping[str, int]) -> dict[str, Any]:
    ids = [identifier for verdict in at.values() for identifier in verdict.record_ids]
    reasons = why(claim, at)
    return {
        "id": claim.id,
        "claim": claim.claim,
        "paper_value": claim.paper_value,
        "paper_sort": _sort_attribute(sort_key(claim.paper_value)),
        "source": claim.source,
        "commands": claim.commands,
        "reasons": reasons.split("; ") if reasons else [],
        "stand_in": claim.standards["offline"].stand_in if at["offline"].verdict != NOT_RUN else None,
        "records": compact_places(_places(claim.id, ids, places)),
        **{scale: _verdict(at[scale]) for scale in JUDGED_SCALES},
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    measured, _, interval = verdict.measured.partition(" [")
    return {
        "verdict": verdict.verdict,
        "rank": _rank(verdict.verdict),
        "measured": measured,
        "interval": interval and f"{verdict.evidence.interval_is}: [{interval}",
        "more": verdict.more,
        "sort": _sort_attribute(sort_key(measured)),
    }


def _rank(verdict: str) -> int:
    """Better verdicts first, what was not run last."""
    return VERDICTS.index(verdict)


def _tally(scale: str, verdicts: Sequence[Mapping[str, Verdict]]) -> dict[str, Any]:
    parts, start = [], 0
    for verdict, count in tally(verdicts, scale).items():
        parts.append({"verdict": verdict, "count": count, "start": start})
        start += count
    text = ", ".join(f"{part['count']} {part['verdict']}" for part in parts)
    return {"title": _SCALE_TITLES[scale], "total": start, "parts": parts, "text": text}


def _record(record: Mapping[str, Any], link: str) -> dict[str, Any]:
    seed = record["seed"]
    return {
        "id": record["id"],
        "href": quote(link),
        "subject": ", ".join(value for name in _SUBJECTS if isinstance(value := record["config"].get(name), str)),
        "scale": record["scale"],
        "seed": MISSING if seed is None else str(seed),
        "seed_sort": _sort_attribute(seed),
        "utc": record["utc"].replace("T", " ").removesuffix("Z"),
        "commit": commit_text(record["code"], digits=64),
        "short_commit": commit_text(record["code"]),
        "device": device_text(record["device"]),
        "wall": seconds(record["wall_seconds"]),
        "wall_sort": _sort_attribute(record["wall_seconds"]),
        "command": record["command"],
    }


def _places(name: str, record_ids: Iterable[str] | None, places: Mapping[str, int]) -> list[int]:
    wanted = sorted(set(places if record_ids is None else record_ids))
    unknown = [identifier for identifier in wanted if identifier not in places]
    if unknown:
        raise InputError(f"{name!r} rests on the record {unknown[0]!r}, which is not among the records of the page.")
    return [places[identifier] for identifier in wanted]


def _rich(text: str) -> Markup:
    forms = {"code": Markup("<code>%s</code>"), "bold": Markup("<strong>%s</strong>")}
    return Markup("").join(forms[kind] % part if kind in forms else escape(part) for kind, part in spans(text))


def _sort_attribute(value: float | None) -> Markup:
    return Markup("") if value is None else Markup(' data-sort="%s"') % f"{value:.12g}"


def _legend(figure: "Figure") -> list[str]:
    legends = [*figure.legends, *(found for axes in figure.axes if (found := axes.get_legend()) is not None)]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def _rounded(text: str) -> str:
    return re.sub(r"-?\d*\.\d{3,}", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), text)
