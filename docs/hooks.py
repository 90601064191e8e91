"""Hooks of mkdocs: generated tables and figures join the site, links that leave it become words, formulas MathML."""

import html
import posixpath
import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
RESULTS = {"results/tables/": ("tables/", "*.md"), "results/figures/": ("figures/", "*.png")}
"""Folders of the repository whose files the site holds: where they lie there, and which they are."""

_LINK = re.compile(r"(?P<image>!?)\[(?P<words>(?:[^][]|\[[^]]*\])*)\]\((?P<target>[^)\s]+)\)")
_CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?:\(|\[)(?P<source>.*?)\\(?:\)|\])</(?P=tag)>', re.DOTALL
)


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated tables, figures and the report to the files of the site."""
    for folder, (place, pattern) in RESULTS.items():
        for path in sorted((ROOT / folder).glob(pattern)):
            files.append(File.generated(config, place + path.name, abs_src_path=str(path)))
    files.append(File.generated(config, "report.html", abs_src_path=str(ROOT / "results" / "report.html")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Makes links into ``results/`` those of the site, and links to other files of the repository plain words.

    Raises:
        FileNotFoundError: a link to a file of the repository that is not there.
    """
    source = _in_repository(page.file.src_uri)

    def relink(found: re.Match[str]) -> str:
        path, mark, anchor = found["target"].partition("#")
        if not path or ":" in path:
            return found[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / target).exists():
            raise FileNotFoundError(f"{source} links to {target}, which is not there.")
        place = _on_site(target)
        if place is None or files.get_file_from_path(place) is None:
            return found["words"]
        here = posixpath.dirname(page.file.src_uri) or "."
        return f"{found['image']}[{found['words']}]({posixpath.relpath(place, here)}{mark}{anchor})"

    parts = _CODE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(relink, part) for part in parts)


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Writes formulas as MathML, which browsers show without a script."""

    def formula(found: re.Match[str]) -> str:
        display = "block" if found["tag"] == "div" else "inline"
        return latex2mathml.converter.convert(html.unescape(found["source"]).strip(), display=display)

    return _FORMULA.sub(formula, content)


def _in_repository(place: str) -> str:
    """Path in the repository of a page of the site."""
    for folder, (start, _) in RESULTS.items():
        if place.startswith(start):
            return folder + place.removeprefix(start)
    return f"docs/{place}"


def _on_site(path: str) -> str | None:
    """Place on the site of a file of the repository, or None."""
    for folder, (start, _) in RESULTS.items():
        if path.startswith(folder):
            return start + path.removeprefix(folder)
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return "report.html" if path == "results/report.html" else None
