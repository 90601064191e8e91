"""Wikipedia's markup: small pages whose text is said by hand, exports written here, and the packaged articles."""

import bz2

import pytest

from entreg.data.mediawiki import plain_text, read_articles
from entreg.errors import AssetError


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("'''Bold''' and ''italic'' words.", "Bold and italic words."),
        ("A [[link]], a [[target|shown]] one, [[plural]]s.", "A link, a shown one, plurals."),
        ("See [http://a.org the site] or [http://b.org].", "See the site or."),
        ("Text<ref>{{cite web|url=x}} note</ref> goes<ref name=a/> on.", "Text goes on."),
        ("[[File:a.jpg|thumb|A [[nested]] caption]]Text.[[Category:Things]]", "Text."),
        ("{{Infobox x|name={{nowrap|y}}}}\nText.", "Text."),
        ("Before.\n{| class=wikitable\n|-\n| cell || {{nowrap|more}}\n|}\nAfter.", "Before.\n\nAfter."),
        ("Wide {{convert|3|to|5|km|mi|abbr=on}} and {{convert|12|ft|m}}.", "Wide 3 to 5 km and 12 ft."),
        ("From {{lang-fr|la table}} and {{lang|de|Tisch}}.", "From la table and Tisch."),
        ("Name ({{IPAc-en|n|eɪ|m}}) is ({{lang-la|nomen}}; {{IPA|x}}) here.", "Name is (nomen) here."),
        ("x < 5 &amp; y&nbsp;> 3 &ndash; so<!-- not -->.", "x < 5 & y > 3 – so."),
        ("One.\n\n* first\n* [[second]]\n\nTwo.", "One.\n\n- first\n- second\n\nTwo."),
        ("Lead.\n\n== History ==\n=== Early ===\nOld.\n\n== Empty ==\n\n== Last ==\nEnd.",
         "Lead.\n\nHistory\n\nEarly\n\nOld.\n\nLast\n\nEnd."),
        ("Lead.\n\n== References ==\n{{reflist}} words\n\n== Legacy ==\nMore.\n\n==External links==\n* [http://a b]",
         "Lead.\n\nLegacy\n\nMore."),
        ("Water is H<sub>2</sub>O, area <math>\\pi r^2</math>.", "Water is H2O, area."),
        ("{|\n| a }} brace\n|}\nThe ''Iliad'''s end.\n{|\n|\n{|\n| inner\n|}\n|}", "The Iliad's end."),
        ("", ""),
    ],
)  # fmt: skip
def test_text_of_a_page_is_what_its_readers_see(markup, text):
    assert plain_text(markup) == text


def export(pages):
    return (
        '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">\n'
        "<siteinfo><namespaces><namespace key='0'/></namespaces></siteinfo>\n" + "".join(pages) + "</mediawiki>"
    )


def page(title, text, *, ns=0, redirect=""):
    return (
        f"<page><title>{title}</title><ns>{ns}</ns><id>7</id>{redirect}"
        f"<revision><id>9</id><text xml:space='preserve'>{text}</text></revision></page>\n"
    )


def test_export_is_read_in_order_without_redirects_and_other_namespaces(tmp_path):
    path = tmp_path / "pages.bz2"
    pages = [
        page("First", "One &amp;amp; two"),
        page("Moved", "#REDIRECT [[First]]", redirect="<redirect title='First'/>"),
        page("Wikipedia:About", "Rules", ns=4),
        page("Mercury", "{{Disambiguation}} * [[Mercury (planet)]]"),
        page("Ada (disambiguation)", "names"),
    ]
    path.write_bytes(bz2.compress(export(pages).encode()))
    articles = list(read_articles(path))
    assert [(article.title, article.is_disambiguation) for article in articles] == [
        ("First", False),
        ("Mercury", True),
        ("Ada (disambiguation)", True),
    ]
    assert articles[0].markup == "One &amp; two"


@pytest.mark.parametrize("damage", [lambda whole: whole[:40], lambda whole: b"no archive", lambda whole: whole + b"x"])
def test_damaged_export_is_one_sentence(tmp_path, damage):
    path = tmp_path / "pages.bz2"
    path.write_bytes(damage(bz2.compress(export([page("First", "text " * 500)]).encode())))
    if damage(b"") == b"x":
        # bzip2 ignores what follows a complete stream; nothing is lost.
        assert len(list(read_articles(path))) == 1
        return
    with pytest.raises(AssetError, match="cannot be read as an XML export of MediaWiki"):
        list(read_articles(path))


def test_file_that_is_no_export_is_one_sentence(tmp_path):
    path = tmp_path / "pages.bz2"
    for content in (b"plain text", b"<page><title>x</title></page>", b"<page><ns>0</ns>"):
        path.write_bytes(bz2.compress(content))
        with pytest.raises(AssetError, match="cannot be read as an XML export of MediaWiki"):
            list(read_articles(path))
