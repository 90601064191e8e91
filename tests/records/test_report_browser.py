"""The report in headless Chromium, wide and narrow; skipped where there is no Chromium or no playwright."""

import functools
import http.server
import shutil
import threading

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
    pytest.mark.xdist_group("report"),
]

SCREENS = {"wide": {"width": 1400, "height": 1000}, "narrow": {"width": 390, "height": 844}}


@pytest.fixture(scope="module")
def address(reference_report):
    """The page over HTTP, where a browser would also ask for icons and the like."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, text, *arguments):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=reference_report))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/report.html", asked
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        # Without a sandbox of its own the browser also starts as root in a container.
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(params=SCREENS)
def page(request, browser, address):
    narrow = request.param == "narrow"
    context = browser.new_context(viewport=SCREENS[request.param], is_mobile=narrow, has_touch=narrow)
    opened = context.new_page()
    said, requested = [], []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda one: requested.append(one.url))
    address[1].clear()
    opened.goto(address[0])
    yield opened
    assert said == [], "nothing on the console"
    assert [url for url in requested if not url.startswith("data:")] == [address[0]], "one request, for the page"
    assert address[1] == ["/report.html"]
    context.close()


def texts(locator):
    return [" ".join(text.split()) for text in locator.all_inner_texts()]


def rows(page, table):
    return page.locator(f"#table-{table} tbody tr:visible")


def column(page, table, number):
    """Texts of the visible cells of a column, counted from 1."""
    script = """([table, number]) => [...document.querySelectorAll(`#table-${table} tbody tr`)]
        .filter((row) => row.checkVisibility())
        .map((row) => row.cells[number - 1].innerText.replace(/\\s+/g, " ").trim())"""
    return page.evaluate(script, [table, number])


def leading(text):
    return float(text.split()[0].replace(",", ""))


def test_fits_the_screen_and_shows_its_picture(page):
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    picture = page.locator("figure.plot img").first
    picture.scroll_into_view_if_needed()
    page.wait_for_function("() => document.images[0].complete && document.images[0].naturalWidth > 100")
    # A wide table scrolls within its own box.
    box = page.locator("#llm-quality .scroll")
    assert box.evaluate("one => one.scrollWidth > one.clientWidth && one.clientWidth < innerWidth")
    box.evaluate("one => { one.scrollTop = 60; one.scrollLeft = 200; }")
    corner = page.locator("#table-llm-quality thead th").first.bounding_box()
    frame = box.bounding_box()
    assert abs(corner["x"] - frame["x"]) < 3
    assert abs(corner["y"] - frame["y"]) < 3


def test_sorting_a_column_of_numbers_both_ways_and_back(page):
    heading = page.locator("#table-vision-setting-a thead th").nth(2)
    before = column(page, "vision-setting-a", 1)
    for order in ("ascending", "descending"):
        heading.locator("button").click()
        assert heading.get_attribute("aria-sort") == order
        values = [leading(text) for text in column(page, "vision-setting-a", 3)]
        assert values == sorted(values, reverse=order == "descending")
        assert len(set(values)) > 5
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") is None
    assert column(page, "vision-setting-a", 1) == before


def test_sorting_words_and_keeping_what_has_no_number_last(page):
    first = page.locator("#table-vision-setting-a thead th").first.locator("button")
    # By the keyboard, where the other tests take the mouse.
    first.press("Enter")
    names = column(page, "vision-setting-a", 1)
    assert names == sorted(names, key=str.lower)
    versus = page.locator("#table-vision-setting-a thead th").nth(5).locator("button")
    for _ in range(2):
        versus.press("Enter")
        assert column(page, "vision-setting-a", 6)[-1] == "–"


def test_times_sort_by_duration_and_not_by_digits(page):
    page.locator("#table-records thead th").nth(7).locator("button").click()
    units = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
    shown = [text.split() for text in column(page, "records", 8)]
    values = [float(number) * units[unit] for number, unit in shown]
    assert values == sorted(values)
    assert len({unit for _, unit in shown}) > 1


def test_filtering_one_table(page):
    total = rows(page, "vision-setting-a").count()
    box = page.locator("input[data-filter='table-vision-setting-a']")
    box.fill("BALL entropy")
    names = column(page, "vision-setting-a", 1)
    assert names
    assert all("ball" in name for name in names)
    assert page.locator("[data-count='table-vision-setting-a']").inner_text() == f"{len(names)} of {total} rows"
    box.fill("")
    assert rows(page, "vision-setting-a").count() == total


def test_filtering_all_tables_hides_those_without_a_row(page):
    assert page.locator("#cifar-mce").is_visible()
    page.locator("#filter-all").fill("streamingllm")
    page.locator("#cifar-mce").wait_for(state="hidden")
    assert "StreamingLLM" in rows(page, "llm-quality").first.inner_text()
    page.locator("#filter-all").fill("")
    page.locator("#cifar-mce").wait_for(state="visible")


def test_choosing_a_verdict(page):
    chosen = page.locator(".chips button[data-verdict='not reproduced']")
    chosen.click()
    assert chosen.get_attribute("aria-pressed") == "true"
    shown = rows(page, "claims")
    assert shown.count() == page.locator("#table-claims tbody tr[data-verdict='not reproduced']").count() > 0
    page.locator(".chips button").first.click()
    assert rows(page, "claims").count() == page.locator("#table-claims tbody tr").count()


def test_a_cell_tells_its_records_command_commit_device_and_date(page, reference_records):
    row = page.locator("#table-vision-setting-a tbody tr").first
    row.scroll_into_view_if_needed()
    row.locator("td").nth(1).click()
    panel = page.locator("#panel")
    panel.wait_for(state="visible")
    value = " ".join(row.locator("td").nth(1).inner_text().split())
    assert panel.locator("#panel-value").inner_text() == f"plain — sparse: {value}"
    links = texts(panel.locator("li a"))
    by_id = {record["id"]: record for record in reference_records if record["experiment"] == "vit/digit_scenes"}
    assert set(links) <= set(by_id)
    methods = {by_id[link]["config"]["method"] for link in links}
    assert {"plain", "ours_a"} <= methods
    said = panel.inner_text()
    for link in links:
        record = by_id[link]
        assert record["command"] in said
        assert record["code"]["commit"] in said
        assert record["device"]["cpu"] in said
    assert min(by_id[link]["utc"] for link in links)[:10] in said
    page.keyboard.press("Escape")
    panel.wait_for(state="hidden")


def test_the_panel_by_keyboard_and_for_a_whole_table_and_a_claim(page):
    panel = page.locator("#panel")
    page.locator("#cifar-mce button.records").click()
    panel.wait_for(state="visible")
    assert panel.locator("li").count() == int(page.locator("#cifar-mce button.records").inner_text().split()[0])
    panel.locator("#panel-close").click()
    panel.wait_for(state="hidden")
    source = page.locator("#claim-vit-iou button.source")
    source.focus()
    page.keyboard.press("Enter")
    panel.wait_for(state="visible")
    assert panel.locator("li a").count() > 0
    assert "vit-iou" in panel.locator("#panel-value").inner_text()


def test_reasons_open_and_the_button_changes_the_colours(page):
    details = page.locator("#claim-geo-hull-speed details")
    assert not details.locator("li").first.is_visible()
    details.locator("summary").click()
    assert details.locator("li").first.is_visible()
    assert not page.locator("#panel").is_visible()
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


def test_print_shows_everything_and_no_controls(page):
    page.emulate_media(media="print")
    assert not page.locator("nav.bar").is_visible()
    assert not page.locator(".tools").first.is_visible()
    box = page.locator("#geometry-net-hull-all .scroll")
    assert box.evaluate("one => one.scrollHeight <= one.clientHeight + 1")


def test_without_scripts_everything_is_readable(browser, address):
    context = browser.new_context(viewport=SCREENS["narrow"], java_script_enabled=False)
    page = context.new_page()
    page.goto(address[0])
    assert page.locator("#claim-geo-hull-speed").is_visible()
    assert not page.locator(".tools").first.is_visible()
    assert not page.locator("button.source").first.is_visible()
    context.close()
