"""The report in a real headless Chromium: hostile text neither runs nor loads, filters and search work, and it fits a
phone in both themes.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ple_data.report.page import report
from tests.run_dir import make_results, make_run, plain_rows

HOSTILE = [
    "<script>window.hit = 1</script>",
    "</script><script>window.hit = 1</script>",
    "</title></style></svg><img src=x onerror='window.hit = 1'>",
    '"><iframe srcdoc="<script>top.hit = 1</script>">',
    "<a href='javascript:window.hit = 1'>click</a> <svg onload=window.hit=1>",
    "{{ 7 * 7 }} {% include 'report.css' %} ${window.hit = 1} $\\frac{1}{0}$",
    "<link rel=stylesheet href=http://127.0.0.1:9/a.css><style>@import 'http://127.0.0.1:9/b.css'</style>",
    "line\u2028end\u2029 \u202egnirts\u202c \u2066bidi\u2069 \x00\x1b[31m <!-- <script>",
    "<base href=http://127.0.0.1:9/><form action=/x><meta http-equiv=refresh content='0;http://127.0.0.1:9'>",
    "&lt;script&gt; &#x3C;script&#x3E; \ud7ff\ufeff",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine: the page cannot be tried out in a browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


class Visit:
    """A page with everything that it asked for, said or complained of."""

    def __init__(self, browser, path: str, **context) -> None:
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.events: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.events.append(message.text))
        self.page.on("pageerror", lambda error: self.events.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.events.append(dialog.message), dialog.dismiss()))
        self.page.goto(Path(path).as_uri(), wait_until="load")

    def shown(self) -> list[str]:
        return self.page.locator(".pair:not([hidden]) h3").all_inner_texts()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report whose every text, id and label is hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = [
        {"query_id": text, "x": text, "y": text, "y_prompt": f"good {text}", "s": 0.0, "s_prompt": index / 5 - 1}
        for index, text in enumerate(HOSTILE)
    ]
    everything = " ".join(HOSTILE).replace("\x00", "").replace("\x1b", "")
    run = make_run(folder / "<img src=x onerror=alert(1)>", [rows], label=everything)
    short = make_results(folder / "results", label="</text></svg><img src=x onerror=alert(1)> $\\frac$")
    return report(run, **short)


def test_nothing_runs_and_nothing_loads(browser, hostile):
    visit = Visit(browser, hostile)
    visit.page.wait_for_timeout(300)
    assert visit.requests == [Path(hostile).as_uri()]
    assert visit.events == []
    page = visit.page
    assert page.evaluate("window.hit") is None
    assert page.evaluate("document.scripts.length") == 1
    for tag in (
        "img",
        "iframe",
        "base",
        "form",
        "link",
        "object",
        "embed",
        "meta[http-equiv=refresh]",
        "[onerror]",
        "[onload]",
    ):
        assert page.locator(tag).count() == 0, tag
    assert page.locator("style").count() == 1
    assert page.evaluate("[...document.querySelectorAll('a')].every(a => a.getAttribute('href').startsWith('#'))")
    visit.context.close()


def test_hostile_text_stands_there_as_it_is(browser, hostile):
    visit = Visit(browser, hostile)
    found = visit.page.locator(".pair .query").all_text_contents()
    assert set(HOSTILE[:7]) <= set(found)
    assert (
        "line⟨U+2028⟩end⟨U+2029⟩ ⟨U+202E⟩gnirts⟨U+202C⟩ ⟨U+2066⟩bidi⟨U+2069⟩ ⟨U+0000⟩⟨U+001B⟩[31m <!-- <script>"
        in found
    )
    visit.page.fill("#search", "srcdoc")
    assert visit.shown() == [HOSTILE[3]]
    visit.context.close()


def test_even_a_script_that_got_in_would_not_run(browser, hostile):
    """The policy of the page, tried with an element that the test puts there."""
    visit = Visit(browser, hostile)
    visit.page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.hit = 1'; document.body.append(s);"
        " const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i); }"
    )
    visit.page.wait_for_timeout(300)
    assert visit.page.evaluate("window.hit") is None
    assert visit.page.evaluate("document.querySelector('img').naturalWidth") == 0
    assert all("Content Security Policy" in event for event in visit.events)
    assert len(visit.events) == 2
    visit.context.close()


@pytest.fixture(scope="module")
def friendly(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("friendly")
    run = make_run(folder / "run", [plain_rows(25), plain_rows(25, 1)])
    return report(run, **make_results(folder / "results"))


def test_filters_search_and_order(browser, friendly):
    """Margins of a round are -1, -11/12, ..., 1; tau is 0.4 in round 0 and 0.2 in round 1."""
    visit = Visit(browser, friendly)
    page = visit.page
    count = page.locator("#count")
    assert count.inner_text() == "50 of these 50 pairs match; 20 are shown."
    page.click("#more")
    page.click("#more")
    assert len(visit.shown()) == 50
    assert page.locator("#more").is_hidden()
    page.select_option("#by-round", "1")
    assert count.inner_text().startswith("25 of these")
    page.select_option("#by-set", "rank")
    assert visit.shown() == [f"q1-{index}" for index in range(24, 14, -1)]
    page.select_option("#by-round", "0")
    assert visit.shown() == [f"q0-{index}" for index in range(24, 16, -1)]
    page.select_option("#order", "low")
    assert visit.shown() == [f"q0-{index}" for index in range(17, 25)]
    page.fill("#from", "0.5")
    page.fill("#to", "0.6")
    assert visit.shown() == ["q0-18", "q0-19"]
    for field in ("#from", "#to"):
        page.fill(field, "")
    page.select_option("#by-round", "")
    page.select_option("#by-set", "")
    page.fill("#search", "GUIDED 7")
    assert visit.shown() == ["q0-7", "q1-7", "q0-17", "q1-17"]
    page.fill("#search", "no such words")
    assert count.inner_text() == "0 of these 50 pairs match; 0 are shown."
    assert visit.events == []
    visit.context.close()


def test_differing_words_are_marked(browser, friendly):
    visit = Visit(browser, friendly)
    first = visit.page.locator(".pair").first
    assert first.locator(".y mark").all_inner_texts() == ["plain"]
    assert first.locator(".y_prompt mark").all_inner_texts() == ["guided"]
    visit.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_it_fits_and_follows_the_theme(browser, friendly, width, scheme):
    visit = Visit(browser, friendly, viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = visit.page
    assert page.evaluate("document.documentElement.scrollWidth") == width
    expected = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 29)"}[scheme]
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == expected
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert page.evaluate("getComputedStyle(document.querySelector('.chart text')).fill") == ink
    sizes = page.evaluate(
        """[...document.querySelectorAll('.chart')].map(chart => {
          const scale = chart.getBoundingClientRect().width / chart.viewBox.baseVal.width;
          return scale * parseFloat(getComputedStyle(chart.querySelector('text')).fontSize);
        })"""
    )
    assert min(sizes) >= 8  # pixels on the screen
    visit.context.close()


def test_a_wide_table_scrolls_under_its_first_column(browser, friendly):
    visit = Visit(browser, friendly, viewport={"width": 400, "height": 900})
    table = visit.page.locator("#evaluation .scroll").first
    first, second = table.locator("tbody th").first, table.locator("tbody td").first
    before = first.bounding_box()["x"], second.bounding_box()["x"]
    table.evaluate("element => { element.scrollLeft = 10; }")
    assert (first.bounding_box()["x"], second.bounding_box()["x"]) == (before[0], before[1] - 10)
    assert table.locator("th").first.evaluate("cell => getComputedStyle(cell).backgroundColor") == "rgb(255, 255, 255)"
    visit.context.close()


def test_a_printout_says_how_many_pairs_it_lacks(browser, friendly):
    visit = Visit(browser, friendly)
    page, line = visit.page, visit.page.locator("#printed")
    assert not line.is_visible()
    page.emulate_media(media="print")
    assert line.inner_text() == "20 of 50 pairs; open the file for the others."
    assert len(visit.shown()) == 20
    page.emulate_media(media="screen")
    page.click("#more")
    page.click("#more")
    page.emulate_media(media="print")
    assert not line.is_visible()
    visit.context.close()


def test_without_scripts_all_pairs_are_there(browser, friendly):
    visit = Visit(browser, friendly, java_script_enabled=False)
    assert visit.page.locator(".pair").count() == 50
    assert visit.page.locator("#controls").is_hidden()
    assert visit.page.locator(".pair").last.is_visible()
    visit.context.close()


def test_charts_have_names_for_those_who_do_not_see_them(browser, friendly):
    visit = Visit(browser, friendly)
    image = visit.page.get_by_role("img", name="Mean reward by round")
    assert image.count() == 1
    assert visit.page.locator("svg.chart > title").count() == visit.page.locator("svg.chart").count() == 12
    visit.context.close()
