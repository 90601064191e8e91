"""Articles of Wikipedia as readable text, from MediaWiki's XML export.

The export is read with the standard library and its markup with ``mwparserfromhell``. What a reader of the page sees as
prose stays: paragraphs, headings, list items, quotations, the text of links and of the few templates that stand inside
sentences (units, foreign words, dashes). What is not prose goes: references, tables, images with their captions,
formulas, info boxes, navigation, and the sections of sources and links at the end. Which templates and sections these
are is our choice.
"""

from __future__ import annotations

import bz2
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entreg.errors import AssetError, ConfigError


@dataclass(frozen=True)
class Article:
    """A page as it is in the export.

    Attributes:
        title: of the page.
        markup: wikitext of its latest revision.
    """

    title: str
    markup: str

    @property
    def is_disambiguation(self) -> bool:
        """Whether the page only lists articles of the same name."""
        return "(disambiguation)" in self.title or bool(_DISAMBIGUATION.search(self.markup))


def read_articles(path: str | Path) -> Iterator[Article]:
    """The articles of an export in the order of the file, without redirects and without pages about Wikipedia itself.

    Args:
        path: MediaWiki's XML export, compressed with bzip2. It is trusted as far as its size goes: the packaged one is
            checked byte for byte before it is read.

    Raises:
        AssetError: the file is truncated or no such export.
    """
    try:
        with bz2.open(path) as file:
            for _, element in ElementTree.iterparse(file):
                if _local_name(element) != "page":
                    continue
                fields = {_local_name(part): part for part in element.iter()}
                if "redirect" not in fields and fields["ns"].text == "0":
                    yield Article(fields["title"].text or "", fields["text"].text or "")
                element.clear()
    except (OSError, EOFError, KeyError, ElementTree.ParseError) as error:
        raise AssetError(f"{path} cannot be read as an XML export of MediaWiki ({error}); fetch it again") from error


def plain_text(markup: str) -> str:
    """Wikitext as readable text.

    Args:
        markup: wikitext of one page.

    Returns:
        Paragraphs and headings separated by blank lines, list items on lines of their own that start with ``- ``.

    Raises:
        ConfigError: ``mwparserfromhell`` is not installed.
    """
    try:
        import mwparserfromhell
    except ImportError as error:
        raise ConfigError("reading Wikipedia's markup needs a package: pip install mwparserfromhell") from error
    # References and tables are most of the markup: without them parsing takes a third of the time. The parser would
    # also leave tables alone whose cells hold a brace too many.
    markup = _REFERENCE.sub("", _INVISIBLE.sub("", _without_final_sections(markup)))
    innermost = 1
    while innermost:
        markup, innermost = _TABLE.subn("", markup)
    return _tidy(_render(mwparserfromhell.parse(markup, skip_style_tags=False)))


_DISAMBIGUATION = re.compile(r"\{\{\s*(disambig\w*|hndis|geodis)\b", re.IGNORECASE)
_INVISIBLE = re.compile(r"<!--.*?-->|__[A-Z]+__", re.DOTALL)
_REFERENCE = re.compile(r"<ref\b[^<>]*/>|<ref\b[^<>]*>.*?</ref\s*>", re.DOTALL | re.IGNORECASE)
_TABLE = re.compile(r"^[ :*]*\{\|(?:(?!^[ :*]*\{\|).)*?^[ ]*\|\}(?!\})", re.DOTALL | re.MULTILINE)
_SECTION = re.compile(r"^==([^=\n]+)==[ \t]*$", re.MULTILINE)
_FINAL_SECTIONS = {
    "bibliography",
    "citations",
    "external links",
    "footnotes",
    "further reading",
    "gallery",
    "notes",
    "notes and references",
    "references",
    "references and notes",
    "references and further reading",
    "see also",
    "sources",
}
_NOT_PROSE_TAGS = {"gallery", "imagemap", "math", "ref", "references", "score", "source", "table", "timeline"}
_UNREAD_IMAGE = re.compile(r"\[\[(file|image):.*?\]\]", re.DOTALL | re.IGNORECASE)
_NOT_PROSE_LINKS = re.compile(r"\s*(file|image|category|media)\s*:", re.IGNORECASE)


def _local_name(element: ElementTree.Element) -> str:
    """Name of an element without the namespace, which differs between versions of the export."""
    return element.tag.rpartition("}")[2]


def _without_final_sections(markup: str) -> str:
    parts = _SECTION.split(markup)
    # A heading, its section, the next heading, and so on, after the introduction.
    kept = [
        f"=={heading}=={section}"
        for heading, section in zip(parts[1::2], parts[2::2], strict=True)
        if heading.strip().lower() not in _FINAL_SECTIONS
    ]
    return "\n".join([parts[0], *kept])


def _render(code: Any) -> str:
    """Text of parsed wikitext; None is no text."""
    return "" if code is None else "".join(_node_text(node) for node in code.nodes)


def _node_text(node: Any) -> str:
    kind = type(node).__name__
    if kind == "Text":
        return str(node.value)
    if kind == "HTMLEntity":
        return str(node.normalize())
    if kind == "Heading":
        # The mark tells headings from paragraphs until all text is there.
        return f"\n{_HEADING * node.level}{_render(node.title).strip()}\n"
    if kind == "Wikilink":
        if _NOT_PROSE_LINKS.match(str(node.title)):
            return ""
        return _render(node.title if node.text is None else node.text)
    if kind == "ExternalLink":
        return _render(node.title)
    if kind == "Tag":
        return _tag_text(node)
    if kind == "Template":
        return _template_text(node)
    return ""


def _tag_text(node: Any) -> str:
    name = str(node.tag).strip().lower()
    if name in _NOT_PROSE_TAGS:
        return ""
    if node.wiki_markup and name in ("li", "dd", "dt"):
        return _ITEM if name == "li" else ""
    if name in ("br", "hr", "p", "div", "blockquote", "poem", "center"):
        return f"\n{_render(node.contents)}\n"
    if name == "li":
        return f"\n{_ITEM}{_render(node.contents)}"
    return _render(node.contents)


def _template_text(node: Any) -> str:
    name = " ".join(str(node.name).strip().lower().replace("_", " ").split())
    values = [_render(parameter.value).strip() for parameter in node.params if not parameter.showkey]
    if name.startswith("lang-") or name in _FIRST_VALUE:
        return values[0] if values else ""
    if name in _LAST_VALUE:
        return values[-1] if values else ""
    if name in _FIXED:
        return _FIXED[name]
    if name in _COMPOSED and values:
        return _COMPOSED[name](values)
    return ""


def _measure(values: list[str]) -> str:
    """``{{convert|3|to|5|km|mi}}``: the numbers and words up to the unit, and the unit."""
    for place, value in enumerate(values):
        if place and not re.fullmatch(r"[\d.,/+−-]+|to|and|or|by|x|±|-|–|to\(-\)", value):
            return " ".join(values[: place + 1])
    return " ".join(values)


_FIRST_VALUE = {"abbr", "angbr", "big", "blockquote", "cquote", "linktext", "nihongo", "nobold", "nobr", "nowrap"}
_FIRST_VALUE |= {"quotation", "quote", "sc", "small", "smallcaps", "smaller", "sub", "sup", "tooltip", "val", "vanchor"}
_LAST_VALUE = {"lang", "native name", "resize", "script", "transl", "unicode", "longitem", "nastaliq", "visible anchor"}
_FIXED = {"'": "'", "'s": "'s", "=": "=", "!": "|", "·": " · ", "nbsp": " ", "spaces": " ", "thinsp": " "}
_FIXED |= dict.fromkeys(("snd", "spaced ndash", "spnd", "ndash"), " – ") | dict.fromkeys(("mdash", "mdashb"), "—")
_COMPOSED: dict[str, Callable[[list[str]], str]] = {
    "as of": lambda values: f"As of {' '.join(reversed(values))}",
    "chem": "".join,
    "circa": lambda values: f"c. {values[0]}",
    "convert": _measure,
    "cvt": _measure,
    "e": lambda values: f"×10^{values[0]}",
    "frac": "/".join,
    "fraction": "/".join,
    "hms": lambda values: f"HMS {values[0]}",
    "uss": lambda values: f"USS {values[0]}",
}
# Characters for private use: they mark lines while the text is put together.
_HEADING, _ITEM = "\ue000", "\ue001"


def _tidy(text: str) -> str:
    """Lines without the holes that dropped markup leaves, and without headings of empty sections."""
    # Markup that was never closed, or not where the parser looks for it.
    text = re.sub("'{2,}", "", re.sub(r"'{2,}(?=s\b)", "'", _UNREAD_IMAGE.sub("", text)))
    lines = [line for line in map(_tidy_line, text.split("\n")) if re.search(r"\w", line)]
    kept: list[str] = []
    for place, line in enumerate(lines):
        following = lines[place + 1] if place + 1 < len(lines) else _HEADING
        if _level(line) and 0 < _level(following) <= _level(line):
            continue
        kept.append(line)
    text = ""
    for place, line in enumerate(kept):
        both_items = line.startswith(_ITEM) and kept[place - 1].startswith(_ITEM)
        text += ("" if not place else "\n" if both_items else "\n\n") + re.sub(
            f"^{_ITEM}+ *", "- ", line.lstrip(_HEADING)
        )
    return text


def _level(line: str) -> int:
    """Of a heading, 1 the highest; 0 for any other line."""
    return len(line) - len(line.lstrip(_HEADING))


def _tidy_line(line: str) -> str:
    line = re.sub(r"[\s\u200b]+", " ", line)
    line = re.sub(r"\(([\s,;:.–/]|or)*\)|\[\s*\]", "", line)
    line = re.sub(r"\(\s*([,;:]\s*)+", "(", line)
    line = re.sub(r"([,;:]\s*)+\)", ")", line)
    line = re.sub(r" +([,;:.)])", r"\1", re.sub(r"\( +", "(", line))
    return re.sub(r" {2,}", " ", line).strip()
