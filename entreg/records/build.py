"""Builds, or checks, everything under ``results/`` that is generated from records."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from entreg.atomic import write_bytes_atomic, write_text_atomic
from entreg.errors import InputError, OutputError
from entreg.records import figures, registry, report, tables
from entreg.records.claims import (
    claims_page,
    claims_table,
    judge_all,
    load_claims,
    paper_table,
    readme_table,
    tally_sentence,
)
from entreg.records.record import told_records
from entreg.records.store import RecordStore

README_BLOCKS = ("tally", "claims")
"""Between lines ``<!-- tally:begin -->`` and ``<!-- tally:end -->`` of the README stands what a build writes there."""


@dataclass(frozen=True)
class BuildReport:
    """What a build did or a check found; paths of files.

    Attributes:
        written: files whose content changed (in a check: that would change, or are missing).
        unchanged: files that already were as they should be.
        removed: generated files that no record supports any more (in a check: that should go).
    """

    written: tuple[Path, ...]
    unchanged: tuple[Path, ...]
    removed: tuple[Path, ...]

    @property
    def up_to_date(self) -> bool:
        return not self.written and not self.removed


def build_all(
    records: Sequence[Mapping[str, Any]],
    out_dir: str | os.PathLike[str],
    *,
    records_root: str | os.PathLike[str] | None = None,
    readme: str | os.PathLike[str] | None = None,
    check: bool = False,
) -> BuildReport:
    """Writes ``report.html``, ``tables/*.md``, ``.csv`` and ``.tex``, ``figures/*.png`` and ``.svg`` under ``out_dir``.

    Of the records :func:`~entreg.records.record.told_records` count. Files that are as they should be are not touched.
    Tables count as equal when their text is; figures when they show the same data
    (:func:`entreg.records.figures.fingerprint`), because pixels depend on the version of matplotlib.

    Args:
        records: from :meth:`RecordStore.load_all`.
        out_dir: the folder, made when missing.
        records_root: the folder of the records' files, to which the page links; by default ``runs`` in ``out_dir``.
        readme: a Markdown file whose tally and claims table between the markers are replaced, or None.
        check: compare only and write nothing.

    Raises:
        InputError: a builder's mistake (wrong row length, unknown record).
        OutputError: a file cannot be written, or the README lacks the markers.
    """
    registry.discover()
    usable = told_records(records)
    claims = load_claims()
    verdicts = judge_all(claims, usable)
    built = _built_tables(usable)
    out = Path(out_dir)

    texts = {}
    pairs = [*((table, table) for table in built), (claims_table(claims, verdicts), paper_table(claims, verdicts))]
    for whole, for_papers in pairs:
        footer = tables.provenance(usable, whole.record_ids)
        texts[out / "tables" / f"{whole.name}.md"] = whole.with_notes(footer).to_markdown()
        texts[out / "tables" / f"{whole.name}.csv"] = whole.to_csv()
        texts[out / "tables" / f"{whole.name}.tex"] = for_papers.with_notes(footer).to_latex()
    texts[out / "tables" / "claims.md"] = claims_page(claims, verdicts, usable)
    if readme is not None:
        blocks = (tally_sentence(verdicts) + "\n", readme_table(claims, verdicts).body_markdown())
        texts[Path(readme)] = _readme_text(Path(readme), dict(zip(README_BLOCKS, blocks, strict=True)))

    written, unchanged = [], []
    for path, text in texts.items():
        if _read(path) == text.encode("utf-8"):
            unchanged.append(path)
            continue
        written.append(path)
        if not check:
            write_text_atomic(path, text)
    kept = set(texts)
    shown, pictures = [], {}
    for entry, figure, chosen in _built_figures(usable):
        name = entry.name
        paths = {kind: out / "figures" / f"{name}.{kind}" for kind in ("png", "svg")}
        kept.update(paths.values())
        shown.append(report.page_figure(name, figure, entry.function.__doc__, (record["id"] for record in chosen)))
        digest = shown[-1].fingerprint
        stale = [kind for kind, path in paths.items() if figures.embedded_fingerprint(_read(path) or b"") != digest]
        files = figures.render(figure, name) if stale and not check else {}
        for kind, path in paths.items():
            if kind not in stale:
                unchanged.append(path)
                continue
            written.append(path)
            if not check:
                write_bytes_atomic(path, files[kind])
        pictures[name] = paths["svg"]

    page, links = out / "report.html", _links(usable, out, out / "runs" if records_root is None else Path(records_root))
    contents = (claims, verdicts, built, shown, usable, links)
    if report.same_page(_read(page), report.build_page(*contents, pictures={})):
        unchanged.append(page)
    else:
        written.append(page)
        if not check:
            svgs = {name: _read(path) or b"" for name, path in pictures.items()}
            write_text_atomic(page, report.build_page(*contents, pictures=svgs))
    removed = _leftovers(out, kept)
    if not check:
        for path in removed:
            path.unlink()
    return BuildReport(tuple(written), tuple(unchanged), tuple(removed))


def _built_tables(records: list[dict[str, Any]]) -> list[tables.Table]:
    built = []
    for entry in tables.table_registry.entries():
        chosen = entry.select(records)
        table = entry.function(chosen) if chosen else None
        if table is None:
            continue
        if table.name != entry.name:
            raise InputError(f"The table registered as {entry.name!r} calls itself {table.name!r}; use one name.")
        if table.record_ids is None:
            table = replace(table, record_ids=tuple(record["id"] for record in chosen))
        built.append(table)
    if any(table.name == "claims" for table in built):
        raise InputError("A table may not call itself 'claims'; that is the name of the claims table.")
    return built


def _built_figures(records: list[dict[str, Any]]) -> list[tuple[registry.Entry, Any, list[dict[str, Any]]]]:
    built = []
    for entry in figures.figure_registry.entries():
        chosen = entry.select(records)
        figure = entry.function(chosen) if chosen else None
        if figure is not None:
            built.append((entry, figure, chosen))
    return built


def _links(records: Sequence[Mapping[str, Any]], out: Path, root: Path) -> dict[str, str]:
    """Relative path from the page to each record's file."""
    store = RecordStore(os.path.relpath(root, out))
    return {r["id"]: store.path_for(r["experiment"], r["config"]).as_posix() for r in records}


def _readme_text(path: Path, blocks: Mapping[str, str]) -> str:
    current = _read(path)
    if current is None:
        raise OutputError(f"The README {path} cannot be read; give the path of an existing file.")
    text = current.decode("utf-8")
    for name, block in blocks.items():
        begin, end = (f"<!-- {name}:{edge} -->" for edge in ("begin", "end"))
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise OutputError(
                f"The README {path} must hold one line {begin} and after it one line {end}; the {name} of the paper's "
                "claims go between them."
            )
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{block}\n{end}{rest.split(end)[1]}"
    return text


def _leftovers(out: Path, kept: set[Path]) -> list[Path]:
    """Files that an earlier build made and this one does not; files of other origin are left alone."""
    candidates = [*sorted((out / "tables").glob("*")), *sorted((out / "figures").glob("*"))]
    return [path for path in candidates if path not in kept and path.is_file() and _is_generated(path)]


def _is_generated(path: Path) -> bool:
    if path.suffix == ".csv":
        # A comment would be a row to most readers, so the Markdown beside it says for both where they are from.
        path = path.with_suffix(".md")
    data = _read(path) or b""
    if path.suffix in {".md", ".tex"}:
        return tables.GENERATED.encode("ascii") in data[:200]
    return path.suffix in {".png", ".svg"} and figures.embedded_fingerprint(data) is not None


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
