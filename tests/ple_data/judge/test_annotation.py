"""The annotation page in a real browser, exports read back, agreement between annotators, Label Studio tasks."""

import json
import os
import re
import shutil
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import cli
from ple_data.judge.page import arrange, page_digest, render_page
from ple_data.judge.people import fleiss_kappa, majority, read_exports, write_page
from ple_data.judge.results import refuse_other
from ple_data.judge.sources import Pair, choose, load_pairs
from schemas import tables
from schemas.errors import DamagedError, UsageError
from schemas.records import read_record
from schemas.reports import JudgeReport

HOSTILE = [
    "</script><script>window.broken = 1; alert(1)</script>",
    '<img src="http://127.0.0.1:9/pixel.png" onerror="window.broken = 2"><svg onload="window.broken = 3">',
    '<a href="javascript:window.broken = 4">click</a> javascript:alert(5)',
    "line\u2028separator\u2029paragraph\u0000null",
    "\u202eright to left\u202c \u2066isolate <!-- <script> \u200f",
    '<iframe src="http://127.0.0.1:9/"></iframe><link rel="stylesheet" href="http://127.0.0.1:9/x.css">',
    '"}]}</style><style>@import "http://127.0.0.1:9/y.css";</style>&lt;b&gt; &amp;',
    "%SCRIPT% %DATA% {query} ${window.broken = 6}",
]
KINDS = ["harmful", "benign"]


def rows(count: int) -> list[tuple[str, str, str]]:
    """(x, a, b), hostile texts on every side first."""
    texts = [(f"x{n} {text}", f"a{n} {text}", f"b{n} {text}") for n, text in enumerate(HOSTILE)]
    texts += [(f"Query {n}?", f"a{n} is the response.", f"b{n} says this.") for n in range(len(HOSTILE), count)]
    return texts[:count]


def sources(folder: Path, texts: list[tuple[str, str, str]]) -> tuple[str, str]:
    sides = []
    for side, column in (("a", 1), ("b", 2)):
        path = folder / f"{side}.jsonl"
        lines = [
            json.dumps({"query_id": f"q{n}", "x": row[0], "y": row[column], "kind": KINDS[n % 2]})
            for n, row in enumerate(texts)
        ]
        path.write_text("\n".join(lines))
        sides.append(str(path))
    return sides[0], sides[1]


@pytest.fixture
def page(tmp_path: Path) -> tuple[str, str, Path]:
    """A and B, and the folder of their page."""
    a, b = sources(tmp_path, rows(12))
    write_page(a, b, tmp_path / "page", seed=1)
    return a, b, tmp_path / "page"


# --- the page's text -------------------------------------------------------------------------------


def embedded(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found
    return json.loads(found.group(1))


def test_the_page_holds_the_texts_exactly_and_no_word_of_who_is_a(page):
    html = (page[2] / "annotate.html").read_text(encoding="utf-8")
    data = embedded(html)
    assert len(data["items"]) == 12
    assert data["items"] != sorted(data["items"], key=lambda item: int(item["id"][1:]))
    sides = set()
    for item in data["items"]:
        x, a, b = rows(12)[int(item["id"][1:])]
        assert item["x"] == x
        assert {item["first"], item["second"]} == {a, b}
        sides.add(item["first"] == a)
        assert set(item) == {"id", "x", "first", "second"}
    assert sides == {True, False}
    assert html.count("</script") == 2
    assert "\u2028" not in html
    assert "a.jsonl" not in html


def test_the_order_and_the_sides_follow_from_the_seed():
    pairs = [Pair(f"q{n}", f"x{n}", f"a{n}", f"b{n}") for n in range(40)]
    assert arrange(pairs, 5) == arrange(list(reversed(pairs)), 5)
    assert arrange(pairs, 5) != arrange(pairs, 6)
    assert render_page(arrange(pairs, 5)) == render_page(arrange(pairs, 5))
    swapped = [Pair(pair.query_id, pair.x, pair.b, pair.a) for pair in pairs]
    assert page_digest(arrange(swapped, 5)) != page_digest(arrange(pairs, 5))


def test_a_page_and_another_judges_verdicts_do_not_share_a_folder(page, tmp_path):
    """Each in the other's folder is refused before it writes; another spelling of A and B is the same comparison."""
    a, b, folder = page
    with pytest.raises(UsageError, match="holds an annotation page"):
        refuse_other(folder, a, b, "openai:m", None)
    counts = dict.fromkeys(("wins", "ties", "losses", "unparsed", "prompt_tokens", "completion_tokens"), 0)
    judged = JudgeReport(a=f"{Path(a).parent}/./{Path(a).name}", b=b, judge="openai:m", win_rate=None, **counts)
    (tmp_path / "judged").mkdir()
    (tmp_path / "judged" / "judge.json").write_text(judged.to_json())
    with pytest.raises(UsageError, match=r"the verdicts of judge openai:m, not people: give another --output, or move"):
        write_page(a, b, tmp_path / "judged")
    assert not (tmp_path / "judged" / "page.json").exists()


def test_without_a_seed_order_and_sides_are_drawn_once_a_page(tmp_path):
    """The queries are those of seed 0, so that a language model with the same --limit judges the same ones."""
    a, b = sources(tmp_path, rows(12))

    def items(output: str) -> list[dict[str, str]]:
        words = ["judge", a, b, "--human", "--limit", "8", "--output", str(tmp_path / output)]
        found = CliRunner().invoke(cli.ple, words)
        assert found.exit_code == 0, found.stderr
        return embedded((tmp_path / output / "annotate.html").read_text(encoding="utf-8"))["items"]

    one, other = items("one"), items("other")
    assert one != other
    assert items("one") == one
    assert {item["id"] for item in one} == {item["id"] for item in other}
    assert {item["id"] for item in one} == {pair.query_id for pair in choose(load_pairs(a, b).rows, 8, 0)}
    path = export(tmp_path / "one", "Ann", {}, verdicts=[{"query_id": one[0]["id"], "choice": "first"}])
    read_exports(a, b, [path], tmp_path / "one")
    report = read_record(JudgeReport, tmp_path / "one" / "judge.json")
    assert (report.wins, report.losses) == ((1, 0) if one[0]["first"].startswith("a") else (0, 1))


def test_a_page_of_version_1_is_still_read_and_written_again(page):
    a, b, folder = page
    record = json.loads((folder / "page.json").read_text())
    assert record.pop("secret") is None
    (folder / "page.json").write_text(json.dumps(record | {"version": 1}))
    read_exports(a, b, [export(folder, "Ann", {"q0": "a"})], folder)
    write_page(a, b, folder, seed=1)


def test_a_page_is_not_replaced_by_another(page):
    a, b, folder = page
    write_page(a, b, folder, seed=1)
    with pytest.raises(UsageError, match="holds another page"):
        write_page(a, b, folder, seed=2)
    with pytest.raises(UsageError, match="holds another page"):
        write_page(a, b, folder, seed=1, limit=3)


# --- agreement -------------------------------------------------------------------------------------

FLEISS = [
    [0, 0, 0, 0, 14],
    [0, 2, 6, 4, 2],
    [0, 0, 3, 5, 6],
    [0, 3, 9, 2, 0],
    [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0],
    [3, 2, 6, 3, 0],
    [2, 5, 3, 2, 2],
    [6, 5, 2, 1, 0],
    [0, 2, 2, 3, 7],
]
"""The worked example of https://en.wikipedia.org/wiki/Fleiss%27_kappa: 14 raters, 10 subjects, 5 categories."""


def test_fleiss_kappa_of_the_published_example():
    assert fleiss_kappa(FLEISS) == pytest.approx(0.210, abs=0.0005)


def test_fleiss_kappa_by_hand():
    """Two raters, 4 subjects: agree on win, lose, lose and differ once (win, lose). P = 3/4; shares 3/8 and 5/8, so
    P_e = 34/64 and kappa = (48 - 34) / (64 - 34) = 14/30.
    """
    assert fleiss_kappa([[2, 0, 0], [0, 0, 2], [0, 0, 2], [1, 0, 1]]) == pytest.approx(14 / 30)
    assert fleiss_kappa([[3, 0], [0, 3]]) == 1.0
    assert fleiss_kappa([[1, 1]] * 4) == pytest.approx(-1.0)


@pytest.mark.parametrize("counts", [[], [[1, 0]], [[3, 0, 0], [3, 0, 0]]])
def test_fleiss_kappa_that_is_not_defined(counts):
    assert fleiss_kappa(counts) is None


def test_fleiss_kappa_needs_equal_numbers_of_raters():
    with pytest.raises(ValueError, match="same number"):
        fleiss_kappa([[1, 1], [2, 1]])


def test_majority():
    assert majority(["win"]) == "win"
    assert majority(["win", "lose", "win"]) == "win"
    assert majority(["win", "lose"]) == "tie"
    assert majority(["win", "win", "lose", "lose", "tie"]) == "tie"
    assert majority(["tie", "tie", "lose"]) == "tie"


# --- exports ---------------------------------------------------------------------------------------


OTHER = {"first": "second", "second": "first", "tie": "tie"}


def export(folder: Path, name: str, prefer: dict[str, str], **changes: Any) -> Path:
    """An export of version 1 in which each query of `prefer` goes to "a", "b" or "tie"."""
    data = embedded((folder / "annotate.html").read_text(encoding="utf-8"))
    texts = rows(12)
    verdicts = []
    for item in data["items"]:
        wanted = prefer.get(item["id"])
        if wanted is not None:
            first = "a" if item["first"] == texts[int(item["id"][1:])][1] else "b"
            choice = "tie" if wanted == "tie" else "first" if wanted == first else "second"
            verdicts.append({"query_id": item["id"], "choice": choice})
    record = {"version": 1, "kind": "annotations", "page": data["page"], "annotator": name, "verdicts": verdicts}
    path = folder.parent / f"{name}.json"
    path.write_text(json.dumps({**record, **changes}))
    return path


ALL = [f"q{n}" for n in range(12)]


def test_exports_of_several_annotators(page, capsys):
    """By hand: Ann prefers a on q0 to q9; Bo on q0 to q5 and b on the others to q9; Cy says tie on q0 to q3 only. On q0
    to q3 two of three say win; on q4, q5 two of two; on q6 to q9 they differ: tie. All three judged q0 to q3, where the
    ratings are win, win, tie: P = 1/3, shares 2/3 and 1/3, P_e = 5/9, kappa = (1/3 - 5/9) / (4/9) = -1/2.
    """
    a, b, folder = page
    ann = export(folder, "Ann", dict.fromkeys(ALL[:10], "a"))
    bo = export(folder, "Bo", {**dict.fromkeys(ALL[:6], "a"), **dict.fromkeys(ALL[6:10], "b")})
    cy = export(folder, "Cy", dict.fromkeys(ALL[:4], "tie"))
    text = read_exports(a, b, [ann, bo, cy], folder)
    report = read_record(JudgeReport, folder / "judge.json")
    assert (report.wins, report.ties, report.losses, report.unparsed) == (6, 4, 0, 0)
    assert report.win_rate.mean == 0.8
    assert (report.judge, report.annotators, report.kappa_queries) == ("people", 3, 4)
    assert report.kappa == pytest.approx(-0.5)
    assert report.sides == 20
    parts = {(part.by, part.name): (part.wins, part.ties, part.losses) for part in report.parts}
    assert parts == {
        ("kind", "benign"): (3, 2, 0),
        ("kind", "harmful"): (3, 2, 0),
        ("annotator", "Ann"): (10, 0, 0),
        ("annotator", "Bo"): (6, 0, 4),
        ("annotator", "Cy"): (0, 4, 0),
    }
    found = tables.read_table(folder / "verdicts.parquet", "verdicts").to_pylist()
    assert [row["annotator"] for row in found].count(None) == 10
    assert {row["query_id"]: row["verdict"] for row in found if row["annotator"] == "Bo"}["q7"] == "lose"
    assert "Fleiss' kappa: -0.50 (3 annotators, 4 queries that all judged)" in text
    assert "2 of 12 queries were judged by nobody" in capsys.readouterr().err


def test_an_export_may_begin_with_a_byte_order_mark_and_is_no_pipe(page, tmp_path):
    a, b, folder = page
    path = export(folder, "Ann", dict.fromkeys(ALL, "a"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    read_exports(a, b, [path], folder)
    assert read_record(JudgeReport, folder / "judge.json").annotators == 1
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="it is no file"):
        read_exports(a, b, [tmp_path / "pipe"], folder)


def test_a_folder_of_exports_and_the_command(page, tmp_path):
    a, b, folder = page
    exports = tmp_path / "exports"
    exports.mkdir()
    for name in ("Ann", "Bo"):
        export(folder, name, dict.fromkeys(ALL, "a")).rename(exports / f"{name}.json")
    words = ["judge", a, b, "--human", "--output", str(folder), "--read", str(exports)]
    found = CliRunner().invoke(cli.ple, words)
    assert found.exit_code == 0, found.stderr
    assert "Fleiss' kappa: not defined" in found.stdout
    assert re.search(r"annotator Bo +12 +0 +0", found.stdout)


def test_bad_and_foreign_exports_are_one_sentence(page, tmp_path):
    a, b, folder = page
    good = export(folder, "Ann", {"q0": "a"})

    def message(*files: Path, sides: tuple[str, str] = (a, b)) -> str:
        with pytest.raises(UsageError) as caught:
            read_exports(*sides, files, folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    twin = shutil.copy(good, tmp_path / "twin.json")
    assert "annotator 'Ann' stands in" in message(good, Path(twin))
    assert "verdicts are of page 0123, not of" in message(export(folder, "x1", {"q0": "a"}, page="0123"))
    doubled = [{"query_id": "q0", "choice": "first"}] * 2
    assert "it has a query twice" in message(export(folder, "x2", {}, verdicts=doubled))
    assert "not in the page" in message(export(folder, "x3", {}, verdicts=[{"query_id": "zz", "choice": "tie"}]))
    assert "choice: Input should be" in message(export(folder, "x4", {}, verdicts=[{"query_id": "q0", "choice": "a"}]))
    assert "annotator: String should have" in message(export(folder, "x5", {"q0": "a"}, annotator=""))
    assert "has version 3; this ple reads 2: update it" in message(export(folder, "x6", {"q0": "a"}, version=3))
    (tmp_path / "x7.json").write_text("[]")
    assert "give a file that an annotation page exported" in message(tmp_path / "x7.json")
    assert "are not what the page in" in message(good, sides=(b, a))
    (tmp_path / "empty").mkdir()
    assert "no .json files in" in message(tmp_path / "empty")
    with pytest.raises(UsageError, match="holds no annotation page"):
        read_exports(a, b, [good], tmp_path / "elsewhere")
    assert not (folder / "judge.json").exists()
    (folder / "page.json").write_text("{}")
    with pytest.raises(DamagedError, match="write the page anew"):
        read_exports(a, b, [good], folder)


# --- Label Studio ----------------------------------------------------------------------------------


def test_label_studio_tasks_fit_their_configuration(tmp_path):
    a, b = sources(tmp_path, rows(12))
    write_page(a, b, tmp_path / "page", seed=1, label_studio=tmp_path / "tasks.json")
    tasks = json.loads((tmp_path / "tasks.json").read_text(encoding="utf-8"))
    items = embedded((tmp_path / "page" / "annotate.html").read_text(encoding="utf-8"))["items"]
    names = {"id": "query_id", "x": "prompt", "first": "answer1", "second": "answer2"}
    assert [{name: task["data"][field] for name, field in names.items()} for task in tasks] == items
    root = xml.etree.ElementTree.parse(tmp_path / "tasks.xml").getroot()
    texts = {node.get("name"): node.get("value") for node in root.iter("Text")}
    assert {value.removeprefix("$") for value in texts.values() if value} <= tasks[0]["data"].keys()
    [pairwise] = root.iter("Pairwise")
    assert (pairwise.get("toName") or "").split(",") == ["answer1", "answer2"]
    with pytest.raises(UsageError, match=r"give a \.json file"):
        write_page(a, b, tmp_path / "page", seed=1, label_studio=tmp_path / "tasks.xml")


# --- in a browser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A real headless Chromium."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs the package playwright (pip install -e '.[dev]')"
    )
    if program is None:
        pytest.skip("needs a chromium on the PATH")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


class Watched:
    """A tab on the page, with everything that it asked for or that popped up."""

    def __init__(self, context: Any, folder: Path) -> None:
        self.tab = context.new_page()
        self.events: list[str] = []
        self.requests: list[str] = []
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("dialog", lambda dialog: (self.events.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.tab.on("console", lambda message: self.events.append(f"console {message.text}"))
        self.tab.on("pageerror", lambda error: self.events.append(f"error {error}"))
        self.tab.on("popup", lambda popup: self.events.append(f"popup {popup.url}"))
        self.address = (folder / "annotate.html").as_uri()
        self.tab.goto(self.address)

    def text(self, id: str) -> str:
        return self.tab.evaluate("id => document.getElementById(id).textContent", id)

    def begin(self, name: str) -> None:
        self.tab.fill("#name", name)
        self.tab.keyboard.press("Enter")

    def press(self, *keys: str) -> None:
        for key in keys:
            self.tab.keyboard.press(key)

    def export(self, folder: Path) -> Path:
        with self.tab.expect_download() as download:
            self.tab.click("#export")
        path = folder / download.value.suggested_filename
        download.value.save_as(path)
        return path

    def check(self) -> None:
        """Nothing but the page itself was loaded, nothing ran, nothing was refused."""
        outside = [url for url in self.requests if url != self.address and not url.startswith("blob:")]
        assert outside == []
        assert self.events == []
        assert self.tab.evaluate("window.broken") is None


@pytest.fixture
def opened(chromium: Any, page: tuple[str, str, Path]) -> Iterator[Watched]:
    context = chromium.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    context.set_default_timeout(10_000)
    watched = Watched(context, page[2])
    yield watched
    watched.check()
    context.close()


def test_keyboard_undo_reload_export_and_reading_back(opened, page, tmp_path):
    a, b, folder = page
    opened.begin("Ann O'Neill")
    assert opened.text("count") == "Query 1 of 12"
    opened.press("1", "ArrowRight", "3", "2", "u", "Backspace", "ArrowLeft", "t")
    assert opened.text("count") == "Query 5 of 12"
    opened.tab.reload()
    assert opened.text("count") == "Query 5 of 12"
    assert opened.text("person") == "Annotator: Ann O'Neill"
    opened.press("Control+1", "x", "Enter")
    assert opened.text("count") == "Query 5 of 12"
    opened.press(*"12312312", "1", "3")
    assert opened.tab.is_visible("#done")
    assert opened.text("count") == "12 of 12 judged"
    path = opened.export(tmp_path)
    assert path.name.startswith("annotations-")
    record = json.loads(path.read_text())
    pressed = ["first", "second", "first", "tie", *["first", "second", "tie"] * 2, "first", "second"]
    items = embedded((folder / "annotate.html").read_text(encoding="utf-8"))["items"]
    swapped = [verdict["swapped"] for verdict in record["verdicts"]]
    expected = [OTHER[key] if swap else key for key, swap in zip(pressed, swapped, strict=True)]
    assert record["verdicts"] == [
        {"query_id": item["id"], "choice": choice, "swapped": swap}
        for item, choice, swap in zip(items, expected, swapped, strict=True)
    ]
    read_exports(a, b, [path], folder)
    shown = {
        row["query_id"]: row["verdict"]
        for row in tables.read_table(folder / "verdicts.parquet", "verdicts").to_pylist()
    }
    for item, choice in zip(items, expected, strict=True):
        first = "win" if item["first"].startswith("a") else "lose"
        second = "lose" if first == "win" else "win"
        assert shown[item["id"]] == {"first": first, "second": second, "tie": "tie"}[choice]


def test_sides_differ_between_annotators(opened, page, tmp_path):
    """Two who always take the response shown first: each export says what was on the screen, and they do not agree."""
    a, b, folder = page
    items = embedded((folder / "annotate.html").read_text(encoding="utf-8"))["items"]
    paths, swaps = [], []
    for name in ("Ann", "Bo"):
        opened.begin(name)
        shown = []
        for _ in items:
            shown.append((opened.text("first"), opened.text("second")))
            opened.press("1")
        paths.append(opened.export(tmp_path))
        opened.tab.click("#change")
        verdicts = json.loads(paths[-1].read_text())["verdicts"]
        for item, verdict, (left, right) in zip(items, verdicts, shown, strict=True):
            texts = [item["first"].strip(), item["second"].strip()]
            assert [left, right] == (texts[::-1] if verdict["swapped"] else texts)
            assert item[verdict["choice"]].strip() == left
        swaps.append([verdict["swapped"] for verdict in verdicts])
    assert {True, False} == set(swaps[0]) == set(swaps[1])
    assert 3 <= sum(ann != bo for ann, bo in zip(*swaps, strict=True)) <= 9
    text = read_exports(a, b, paths, folder)
    report = read_record(JudgeReport, folder / "judge.json")
    assert (report.first_side, report.sides) == (24, 24)
    assert report.kappa < 0.5
    assert "the response shown first was chosen in 24 of 24 verdicts (100 %)" in text


def test_hostile_texts_are_shown_letter_by_letter_and_do_nothing(opened, page):
    """A character NUL is the one that HTML cannot hold; JSON does, so that it is shown like any other."""
    opened.begin("Ann")
    seen = set()
    for item in embedded((page[2] / "annotate.html").read_text(encoding="utf-8"))["items"]:
        assert opened.text("query") == item["x"].strip()
        assert {opened.text("first"), opened.text("second")} == {item["first"].strip(), item["second"].strip()}
        assert opened.tab.evaluate("document.querySelectorAll('.text *, .text a, img, iframe, link, svg').length") == 0
        seen.add(item["id"])
        opened.press("3")
    assert len(seen) == 12
    policy = opened.tab.get_attribute("meta[http-equiv='Content-Security-Policy']", "content")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy


def test_the_policy_forbids_what_a_mistake_would_let_in(chromium, page):
    """Put into the page by hand, a script and a picture are refused by the browser."""
    context = chromium.new_context()
    watched = Watched(context, page[2])
    watched.tab.evaluate(
        "document.body.insertAdjacentHTML('beforeend', "
        '\'<img src="http://127.0.0.1:9/p.png" onerror="window.broken = 1"><iframe src="http://127.0.0.1:9/"></iframe>\');'
        "const s = document.createElement('script'); s.textContent = 'window.broken = 2'; document.body.append(s);"
    )
    watched.tab.wait_for_timeout(300)
    assert watched.tab.evaluate("window.broken") is None
    assert sum("Content Security Policy" in event for event in watched.events) >= 3
    context.close()


def test_annotators_share_a_browser_and_the_mouse_works(opened):
    opened.begin("Ann")
    opened.tab.click("[data-choice=first]")
    opened.tab.click("[data-choice=tie]")
    opened.tab.click("#undo")
    assert opened.text("count") == "Query 2 of 12"
    opened.tab.click("#change")
    opened.begin("   ")
    assert opened.tab.is_visible("#start")
    opened.begin("Bo")
    assert opened.text("count") == "Query 1 of 12"
    assert opened.tab.is_disabled("#undo")
    opened.press("u")
    opened.tab.click("#change")
    opened.begin("Ann")
    assert opened.text("count") == "Query 2 of 12"


def test_spoilt_progress_is_dropped_and_a_forbidden_storage_is_said(chromium, page):
    context = chromium.new_context()
    watched = Watched(context, page[2])
    watched.begin("Ann")
    key = watched.tab.evaluate("Object.keys(localStorage)[0]")
    for spoilt in ("[", "{}", "7", '{"people": [["Ann", ["up"]]], "annotator": "Ann"}'):
        watched.tab.evaluate("([key, value]) => localStorage.setItem(key, value)", [key, spoilt])
        watched.tab.reload()
        assert watched.tab.is_visible("#start")
        assert watched.tab.is_hidden("#warning")
    watched.check()
    context.close()
    context = chromium.new_context()
    context.add_init_script("Object.defineProperty(window, 'localStorage', { get() { throw new Error('denied'); } });")
    watched = Watched(context, page[2])
    assert watched.tab.is_visible("#warning")
    watched.begin("Ann")
    watched.press("1")
    assert watched.text("count") == "Query 2 of 12"
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_cut_off_and_contrast_is_enough(chromium, page, width, scheme):
    """No sideways scrolling with long words; contrast of 4.5:1 (WCAG 2.2, 1.4.3) and targets of 24 px (2.5.8)."""
    context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    watched = Watched(context, page[2])
    watched.begin("A" * 80)
    watched.tab.evaluate("document.getElementById('first').textContent = 'x'.repeat(3000)")
    assert watched.tab.evaluate("document.documentElement.scrollWidth") == width
    for selector in ("#first", "h2", "#count", "#choices button", "#export", "kbd"):
        assert watched.tab.evaluate(CONTRAST, selector) >= 4.5, selector
    boxes = [button.bounding_box() for button in watched.tab.query_selector_all("button:visible")]
    assert len(boxes) == 6
    assert all(box["height"] >= 24 and box["width"] >= 24 and box["x"] + box["width"] <= width for box in boxes)
    names = watched.tab.evaluate("[...document.querySelectorAll('button')].every(b => b.innerText.trim() || b.hidden)")
    assert names
    context.close()


CONTRAST = """selector => {
  const luminance = color => {
    const [r, g, b] = color.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const element = document.querySelector(selector);
  let ground = element;
  while (getComputedStyle(ground).backgroundColor === 'rgba(0, 0, 0, 0)') ground = ground.parentElement;
  const [low, high] = [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor]
    .map(luminance).sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}"""
