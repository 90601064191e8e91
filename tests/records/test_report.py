"""The report read back as a browser reads it (html5lib), and compared with the records and tables it was built from."""

import html
import itertools
import os
import re
import subprocess
import sys
import urllib.parse
from importlib import resources

import html5lib
import pytest

from entreg.errors import InputError
from entreg.records import REFERENCE_ROOT, RecordStore, environment, registry
from entreg.records.claims import judge_all, load_claims
from entreg.records.report import build_page, compact_places, same_page, shrink_svg, sort_key
from entreg.records.statistics import Estimate
from entreg.records.tables import Table, TracedRow, register_table, table_registry
from tests.records.samples import dated_record

pytestmark = pytest.mark.xdist_group("report")
HOSTILE = "<script>alert('1')</script>\"' onmouseover=alert(2) <img src=x onerror=alert(3)> &amp; </script><!--"


@pytest.fixture(scope="module")
def tables(reference_records):
    registry.discover()
    entries = [(entry, entry.select(reference_records)) for entry in table_registry.entries()]
    built = {entry.name: (entry.function(chosen), chosen) for entry, chosen in entries if chosen}
    return {name: pair for name, pair in built.items() if pair[0] is not None}


@pytest.fixture(scope="module")
def page(reference_report):
    return parsed((reference_report / "report.html").read_text())


def parsed(text):
    parser = html5lib.HTMLParser(strict=False, namespaceHTMLElements=False)
    tree = parser.parse(text)
    assert parser.errors == []
    return tree


def words(element):
    return " ".join("".join(element.itertext()).split())


def with_class(element, name):
    return [one for one in element.iter() if name in (one.get("class") or "").split()]


def by_id(page, identifier):
    (found,) = [one for one in page.iter() if one.get("id") == identifier]
    return found


def decoded(text):
    """The other side of the page's short form of record places, written anew."""
    places = []
    for part in text.split():
        first, _, last = part.partition("-")
        places += range(int(first), int(last or first) + 1)
    return places


def record_ids(page):
    return [words(row.find("th/a")) for row in by_id(page, "table-records").findall("tbody/tr")]


def test_every_claim_stands_at_the_top_with_its_verdicts(page, reference_records):
    claims = load_claims()
    verdicts = judge_all(claims, reference_records)
    sections = [one.get("id") for one in page.iter("section") if one.get("id")]
    assert sections[0] == "claims"
    rows = by_id(page, "table-claims").findall("tbody/tr")
    assert [row.get("id") for row in rows] == [f"claim-{claim.id}" for claim in claims]
    ids = record_ids(page)
    for row, claim, at in zip(rows, claims, verdicts, strict=True):
        heading, paper, here, verdict, at_scale, why = row
        assert words(heading) == f"{claim.claim} {claim.id}"
        assert words(paper) == f"{claim.paper_value} {claim.source}"
        evidence, stand_in = at["offline"].evidence, claim.standards["offline"].stand_in
        shown = words(here).replace(f"{evidence.interval_is}: ", "").replace(" †", "")
        assert shown == at["offline"].measured
        assert ("†" in words(here)) == (stand_in is not None)
        assert stand_in is None or stand_in in words(why)
        assert words(verdict).replace(" more ", ": more ") == at["offline"].words
        assert row.get("data-verdict") == at["offline"].verdict
        assert words(at_scale).endswith(at["paper"].verdict)
        for command in claim.commands.values():
            assert command in words(why)
        wanted = {*at["offline"].record_ids, *at["paper"].record_ids}
        assert {ids[place] for place in decoded(row.get("data-records"))} == wanted
        assert wanted or at["offline"].verdict == "not run"


def test_the_tally_counts_the_verdicts(page, reference_records):
    offline = [at["offline"].verdict for at in judge_all(load_claims(), reference_records)]
    first = next(one for one in page.iter("figure") if one.get("class") == "tally")
    shown = {words(item).partition(" ")[2]: int(words(item).partition(" ")[0]) for item in first.iter("li")}
    assert shown == {verdict: offline.count(verdict) for verdict in set(offline)}
    widths = [float(one.get("width")) for one in first.iter() if one.tag.endswith("rect")]
    assert sum(widths) == len(offline)


def test_every_record_is_listed_with_its_command_commit_device_date_and_file(page, reference_report, reference_records):
    rows = by_id(page, "table-records").findall("tbody/tr")
    assert record_ids(page) == sorted(record["id"] for record in reference_records)
    by_identifier = {record["id"]: record for record in reference_records}
    for place, row in enumerate(rows):
        record = by_identifier[words(row.find("th/a"))]
        text = words(row)
        assert row.get("id") == f"record-{place}"
        assert " ".join(record["command"].split()) in text
        assert record["code"]["commit"][:10] in text
        assert record["code"]["commit"] in row.get("data-commit")
        assert record["device"]["cpu"] in text
        assert record["utc"][:10] in text
        link = urllib.parse.unquote(row.find("th/a").get("href"))
        assert not os.path.isabs(link)
        target = (reference_report / link).resolve()
        assert target.parent == REFERENCE_ROOT.resolve()
        assert f'"id": "{record["id"]}"' in target.read_text()[:2000]


def test_every_table_is_there_cell_by_cell_and_every_row_leads_to_records(page, tables):
    ids = record_ids(page)
    shown = {one.get("id"): one for one in page.iter("article")}
    assert set(shown) == set(tables)
    for name, (table, chosen) in tables.items():
        article = shown[name]
        assert words(article.find("h3")) == table.title
        body = by_id(article, f"table-{name}").findall("tbody/tr")
        columns = [words(one) for one in by_id(article, f"table-{name}").findall("thead/tr/th")]
        lifted = len(table.columns) - len(columns)
        assert columns == [" ".join(column.split()) for column in table.columns[lifted:]]
        common = words(with_class(article, "common")[0]) if lifted else ""
        own = set(table.record_ids or [record["id"] for record in chosen])
        for row, cells in zip(body, table.text_rows(), strict=True):
            plain = [" ".join(re.sub(r"\*\*|`", "", cell).split()) for cell in cells]
            assert [words(cell) for cell in row] == plain[lifted:]
            assert all(word in common for word in plain[:lifted])
            sources = {ids[place] for place in decoded(row.get("data-records"))}
            assert sources <= own
            assert sources or "not run" in plain, (name, plain)
        assert {ids[place] for place in decoded(article.get("data-records"))} == own


def test_a_record_left_out_changes_no_row_that_does_not_name_it(tables):
    """The rows' sources against an experiment: what a row does not name cannot have gone into it."""
    columns_that_name_a_row = {
        "vision-setting-a": 1,
        "vision-curves": 1,
        "vision-masks": 1,
        "vision-sensitivity": 1,
        "vision-token-merging": 3,
        "cifar-mce": 1,
        "benchmark-aims": 3,
        "benchmark-hull": 1,
        "benchmark-delaunay-sizes": 1,
        "geometry-net-hull-all": 3,
        "geometry-sensitivity": 1,
        "llm-aims": 2,
    }
    compared = 0
    for name, width in columns_that_name_a_row.items():
        table, chosen = tables[name]
        # Holm's correction makes every p-value depend on the whole column, as the table's note says.
        kept = [place for place, column in enumerate(table.columns) if not re.match(r"p\b", column)]
        before = {tuple(row[:width]): row for row in table.rows}
        assert len(before) == len(table.rows)
        # A handful of each table's records, spread over them.
        for record in chosen[:: max(1, len(chosen) // 6)]:
            after = table_registry.get(name).function([one for one in chosen if one is not record])
            if after is None or after.columns != table.columns:
                continue
            now = {tuple(row[:width]): row for row in after.rows}
            for key, row in before.items():
                assert isinstance(row, TracedRow)
                if record["id"] not in row.record_ids:
                    assert [now[key][place] for place in kept] == [row[place] for place in kept], (name, record["id"])
                    compared += 1
    assert compared > 500


def test_nothing_is_loaded_and_no_foreign_script_may_run(page, reference_report):
    text = (reference_report / "report.html").read_text()
    loading = {"src", "srcset", "poster", "data", "background", "action", "formaction", "ping", "manifest"}
    for element in page.iter():
        for name, value in element.attrib.items():
            assert not str(name).lower().startswith("on"), "no inline handlers"
            if name in loading:
                assert value.startswith("data:image/svg+xml,"), value[:60]
        if element.tag == "link":
            assert (element.get("rel"), element.get("href")) == ("icon", "data:,")
        if element.tag == "a":
            assert not urllib.parse.urlsplit(element.get("href")).scheme
    assert not list(page.iter("iframe")) + list(page.iter("object")) + list(page.iter("embed"))
    assert "@import" not in text
    assert not re.search(r"url\(\s*['\"]?(?!data:|#|%23)", words(next(page.iter("style"))))
    policy = next(one.get("content") for one in page.iter("meta") if one.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy.partition("script-src")[2]


def test_pictures_have_words_and_sizes_and_their_files_fingerprint(page, reference_report):
    figures = with_class(page, "plot")
    assert len(figures) == 2
    for figure in figures:
        picture = next(figure.iter("img"))
        name = figure.get("id").removeprefix("figure-")
        assert len(picture.get("alt")) > 60
        assert int(picture.get("width")) > 100 < int(picture.get("height"))
        svg = urllib.parse.unquote(picture.get("src").removeprefix("data:image/svg+xml,"))
        assert html5lib.parse(svg, namespaceHTMLElements=False).find("body/*").tag.endswith("svg")
        assert picture.get("data-content") in (reference_report / "figures" / f"{name}.svg").read_text()


def test_accessibility_basics(page):
    assert page.get("lang") == "en"
    assert any(one.get("name") == "viewport" for one in page.iter("meta"))
    for table in page.iter("table"):
        assert words(table.find("caption"))
        assert all(cell.get("scope") == "col" for cell in table.findall("thead/tr/th"))
        assert all(row[0].tag == "th" and row[0].get("scope") == "row" for row in table.findall("tbody/tr"))
    identifiers = [one.get("id") for one in page.iter() if one.get("id")]
    assert len(identifiers) == len(set(identifiers))
    for element in page.iter("a"):
        if element.get("href").startswith("#"):
            assert element.get("href")[1:] in identifiers
    labelled = {child for label in page.iter("label") for child in label.iter("input")}
    assert set(page.iter("input")) == labelled
    assert all(words(button) or button.get("aria-label") for button in page.iter("button"))
    levels = [int(one.tag[1]) for one in page.iter() if one.tag in {"h1", "h2", "h3"}]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(second - first <= 1 for first, second in itertools.pairwise(levels))


def relative_luminance(colour):
    """WCAG 2.2."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first, second):
    lighter, darker = sorted((relative_luminance(first), relative_luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast_of_text_in_light_and_dark():
    style = resources.files("entreg.records").joinpath("page", "report.css").read_text()
    schemes = [dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", block)) for block in re.findall(r"\{([^{}]*)\}", style)]
    schemes = [scheme for scheme in schemes if len(scheme) > 10]
    assert len(schemes) == 3
    assert schemes[1] == schemes[2], "dark by the system and dark by the button look alike"
    for scheme in schemes:
        for text in ("ink", "muted", "accent"):
            for back in ("page", "card", "head", "hover"):
                assert contrast(scheme[text], scheme[back]) >= 4.5, (text, back)
        for verdict in ("exceeded", "reproduced", "partly", "missed", "unknown"):
            assert contrast(scheme[verdict], scheme[f"{verdict}-back"]) >= 4.5, verdict
            assert contrast(scheme[verdict], scheme["card"]) >= 3.0, verdict


def test_size(reference_report):
    whole = (reference_report / "report.html").stat().st_size
    assert whole < 5_000_000
    # The committed page, with all its figures.
    committed = REFERENCE_ROOT.parent / "report.html"
    if committed.exists():
        assert committed.stat().st_size < 5_000_000


def simple_page(**changes):
    record = {**dated_record(), **changes.pop("record", {})}
    table = Table("example", "Example", ["points", "seconds"], [["a", 1.0]], record_ids=[record["id"]])
    arguments = {
        "claims": [],
        "verdicts": [],
        "tables": [table],
        "figures": [],
        "records": [record],
        "links": {record["id"]: "runs/a.json"},
        "pictures": {},
        **changes,
    }
    return build_page(**arguments)


def test_hostile_text_stays_text(monkeypatch):
    record = dated_record()
    record["command"] = HOSTILE
    record["device"]["cpu"] = HOSTILE
    record["config"] = {"method": HOSTILE}
    table = Table(
        "hostile", HOSTILE, [HOSTILE, "b"], [[f"**{HOSTILE}**", f"`{HOSTILE}`"]], [HOSTILE], record_ids=[record["id"]]
    )
    links = {record["id"]: 'runs/a b"><script>.json'}
    text = simple_page(record=record, tables=[table], links=links)
    tree = parsed(text)
    plain = " ".join(HOSTILE.split())
    assert len(list(tree.iter("script"))) == text.count("<script>") == 1
    assert not list(tree.iter("img"))
    assert not [one for one in tree.iter() if any(str(name).startswith("on") for name in one.attrib)]
    article = by_id(tree, "hostile")
    assert words(article.find("h3")) == plain
    assert [words(cell) for cell in next(article.iter("tbody")).iter() if cell.tag in {"th", "td"}] == [plain, plain]
    row = by_id(tree, "record-0")
    assert words(row).count(plain) == 3
    assert urllib.parse.unquote(row.find("th/a").get("href")) == links[record["id"]]


def test_a_source_that_is_not_on_the_page_is_an_error():
    table = Table("example", "Example", ["a"], [TracedRow(["x"], ["geometry/hull-000000000000"])])
    with pytest.raises(InputError, match="geometry/hull-000000000000"):
        simple_page(tables=[table])


def test_a_row_without_sources_of_its_own_has_the_tables(reference_records):
    text = simple_page()
    assert next(parsed(text).iter("article")).find(".//tbody/tr").get("data-records") == "0"


def test_pages_compare_without_their_pictures():
    text = simple_page()
    assert same_page(text.encode(), text)
    picture = '<img src="data:image/svg+xml,one" alt="{}">'
    assert same_page(picture.format("a").encode(), picture.format("a").replace("one", "two"))
    assert not same_page(picture.format("a").encode(), picture.format("b"))
    assert not same_page(None, text)
    assert not same_page(text.replace("seconds", "minutes").encode(), text)


def test_another_process_builds_the_same_page(reference_records, tmp_path):
    few = [record for record in reference_records if record["experiment"].startswith("benchmark/regularizer_cost")]
    store = RecordStore(tmp_path / "runs")
    for record in few:
        store.save(record)
    code = (
        "import sys\n"
        "from entreg.records import RecordStore\n"
        "from entreg.records.build import build_all\n"
        "build_all(RecordStore(sys.argv[1]).load_all(), sys.argv[2], records_root=sys.argv[1])\n"
    )
    pages = []
    for seed, name in (("1", "one"), ("2", "two")):
        subprocess.run(
            [sys.executable, "-c", code, str(store.root), str(tmp_path / name)],
            cwd=environment.REPOSITORY,
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
        )
        pages.append((tmp_path / name / "report.html").read_bytes())
    assert pages[0] == pages[1]


def test_a_table_of_a_stranger_finds_a_place(monkeypatch):
    monkeypatch.setattr(table_registry, "_entries", {})

    @register_table("strange-name")
    def strange(reference_records):
        return Table("strange-name", "Strange", ["a"], [["b"]])

    record = dated_record()
    table = strange([record])
    tree = parsed(simple_page(record=record, tables=[table]))
    assert [words(one.find("h2")) for one in tree.iter("section") if one.find("article") is not None] == [
        "Further tables"
    ]


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (3, 3.0),
        (2.5, 2.5),
        (Estimate(1.5, 1.0, 2.0, 3), 1.5),
        ("1.47x [1.21, 1.78]", 1.47),
        ("98.3 ms", 0.0983),
        ("1.05 s", 1.05),
        ("2 min", 120.0),
        ("1.5 h", 5400.0),
        ("250 µs", 250e-6),
        ("12 ns", 12e-9),
        ("1,234,567", 1234567.0),
        ("−0.629 %", -0.629),
        ("-0.42 [-1.0, 0.1]", -0.42),
        ("+2.33 %", 2.33),
        (">= 30.0x", 30.0),
        ("**0.939x OpenCV**", 0.939),
        ("5.85x (parabola)", 5.85),
        ("0 to 77.3 %", 0.0),
        ("1.03e-08 % / 7.20e-08 %", 1.03e-8),
        ("24 MiB", 24 * 2**20),
        ("16 sorted runs", 16.0),
        ("–", None),
        ("not run", None),
        ("", None),
        (None, None),
        ("failed on circle", None),
    ],
)
def test_cells_sort_by_what_they_say(cell, expected):
    assert sort_key(cell) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("places", [[], [3], [0, 1, 2], [0, 1, 2, 3, 4, 9], [5, 3, 4, 3, 11, 13]])
def test_places_survive_their_short_form(places):
    assert decoded(compact_places(places)) == sorted(set(places))


def test_a_picture_shrinks_without_moving():
    from entreg.records.figures import new_figure, render

    figure, axes = new_figure()
    axes.plot([0, 1, 2], [0.123456, 7.654321, 3.1])
    axes.set_title("x < y & z")
    svg = render(figure, "small")["svg"].decode()
    small = shrink_svg(svg)
    assert len(small) < 0.85 * len(svg)
    assert "<metadata" not in small
    number = r"-?\d+(?:\.\d+)?"

    def coordinates(text):
        paths = re.findall(r' d="([^"]*)"', text)
        return [float(one) for path in paths for one in re.findall(number, path)]

    before, after = coordinates(svg), coordinates(small)
    assert len(before) == len(after)
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) <= 0.005
    assert re.findall(r"scale\([^)]*\)", small) == re.findall(r"scale\([^)]*\)", svg)
    assert html.unescape("x &lt; y &amp; z") in html.unescape(small)
