"""What keeps people out of a page, looked for by axe-core in both colour schemes, on a phone and on a desk; the report
as a file and as it is served, and the page on which people judge. And the keyboard alone."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ple_data.judge.page import Item, render_page
from ple_data.judge.sources import Pair
from ple_data.report.page import report
from ple_data.report.watch import Server
from schemas.options import Report
from tests.browser import chromium, violations
from tests.run_dir import make_results, make_run, plain_rows

LOOKS = [(400, "dark"), (1280, "light")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("access")
    run, results = make_run(folder / "run", [plain_rows(60), plain_rows(25, 1)]), make_results(folder / "results")
    file = Path(report(run, **results))
    judging = folder / "judging.html"
    pairs = [Pair(query_id=f"q{n}", x=f"query {n}", a="one answer", b="", kind=None) for n in range(3)]
    judging.write_text(render_page([Item(pair, True) for pair in pairs]))
    with Server(Report(run=run, watch=True, port=0, **results)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {"file": file.as_uri(), "live": server.address, "judging": judging.as_uri()}
        server.shutdown()


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_axe_finds_nothing_serious(browser, addresses, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, found = context.new_page(), {}
    for name, address in addresses.items():
        page.goto(address)
        if name == "live":
            page.locator("#count:has-text('85 pairs')").wait_for()
            page.locator("details.asked summary").first.click()
            page.locator("details.asked .missing").first.wait_for()
        if name == "judging":
            found["judging, before"] = violations(page)
            page.fill("#name", "Ann")
            page.keyboard.press("Enter")
        found[name] = violations(page)
        assert page.evaluate("document.documentElement.scrollWidth") == width, name
        if name == "judging":
            for _ in range(3):
                page.keyboard.press("1")
            found["judging, after"] = violations(page)
    assert found == {name: [] for name in found}
    context.close()


@pytest.mark.parametrize("name", ["file", "live"])
def test_the_keyboard_reaches_everything_and_shows_where_it_is(browser, addresses, name):
    """Tab goes through every link, region, field, summary and button that is shown, each with a ring and a name."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.goto(addresses[name])
    page.locator("#count:has-text('match')").wait_for()
    wanted = page.evaluate(
        "[...document.querySelectorAll('a, summary, button, input, select, [tabindex=\"0\"]')]"
        ".filter(it => it.checkVisibility()).length"
    )
    seen = set()
    for _ in range(wanted + 1):
        page.keyboard.press("Tab")
        found = page.evaluate(
            """() => {
              const it = document.activeElement, all = [...document.querySelectorAll('*')];
              const label = it.getAttribute('aria-label') || it.labels?.[0]?.textContent || it.textContent;
              return it === document.body ? null
                : [all.indexOf(it), label.trim(), parseFloat(getComputedStyle(it).outlineWidth)];
            }"""
        )
        if found:
            assert found[1], found
            assert found[2] > 0, found
            seen.add(found[0])
    assert len(seen) == wanted
    context.close()


def test_tables_and_charts_have_names(browser, addresses):
    context = browser.new_context()
    page = context.new_page()
    page.goto(addresses["file"])
    assert page.get_by_role("img").count() == page.locator("svg.chart").count() > 8
    assert page.get_by_role("region", name="Rewards by round").count() == 1
    assert page.get_by_role("spinbutton", name="Margin to").count() == 1
    described = page.locator("#rewards-desc").text_content()
    assert "From round 0 to 1" in described
    context.close()


def test_axe_finds_what_is_wrong(browser, addresses):
    context = browser.new_context()
    page = context.new_page()
    page.goto(addresses["judging"])
    page.evaluate("document.querySelector('#start').append(document.createElement('button'))")
    page.evaluate("document.querySelector('#name-help').style.color = document.body.style.color = '#888'")
    assert {text.split(":")[0] for text in violations(page)} == {"critical button-name", "serious color-contrast"}
    context.close()
