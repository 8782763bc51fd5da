"""`ple report --watch`: all pairs in pages against plain Python, who may read them, and a page that follows its run."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import cli
from ple_data.report import watch
from ple_data.report.browse import PAGE, Browser, Wanted
from ple_data.report.sources import Sources
from ple_data.report.watch import Server
from ple_data.sampling.generate import generate
from ple_data.storage.store import Store
from schemas.errors import UsageError
from schemas.options import Gen, Report
from tests.browser import chromium
from tests.forks import ENVIRONMENT, ROOT
from tests.run_dir import ALPHA, TAU0, make_results, make_run, plain_rows
from tests.tables import table

HOSTILE = "</p><script>window.hit = 1</script><img src=x onerror='window.hit = 1'> \u202eevil \x1b[31m"


@contextlib.contextmanager
def served(run: Path, **options: Any) -> Iterator[Server]:
    with Server(Report(run=run, watch=True, port=0, **options)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


# --- all pairs ---


def rows_of(count: int, t: int, generator: np.random.Generator) -> list[dict[str, Any]]:
    words = ["Ärger", "film", "GOOD", "bad", "50 %", "a.b"]

    def text() -> str:
        return " ".join(generator.choice(words, 3))

    return [
        {
            "query_id": f"q{t}-{i}",
            "sample": i % 2,
            "x": text(),
            "y": text() if i % 7 else "",
            "y_prompt": text(),
            "y_empty": not i % 7,
            "y_ids": [1] * int(generator.integers(0, 9)),
            "y_prompt_ids": [1] * int(generator.integers(0, 9)),
            "y_finish": ["stop", "length"][i % 3 == 0],
            "y_prompt_finish": ["stop", "length"][i % 5 == 0],
            "s": float(np.float32(generator.integers(-3, 4) / 2)),
            "s_prompt": float(np.float32(generator.integers(-3, 4) / 2)),
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Browser, list[dict[str, Any]]]:
    """260 pairs of two rounds in five shards, with the rows in their order."""
    root, generator, all_rows = tmp_path_factory.mktemp("many"), np.random.default_rng(5), []
    for t, sizes in enumerate(([90, 70, 1], [60, 39])):
        for unit, size in enumerate(sizes):
            rows = [row | {"query_id": f"{row['query_id']}-{unit}"} for row in rows_of(size, t, generator)]
            found = Store(root).commit("pairs", t, f"{unit:05d}-{t:012x}", table("pairs", rows, round=t), {})
            assert found.rows == size
            all_rows += [{**row, "round": t} for row in rows]
    return Browser(Sources(root, tau0=TAU0, alpha=ALPHA)), all_rows


QUESTIONS = st.fixed_dictionaries(
    {},
    optional={
        "round": st.integers(0, 2),
        "set": st.sampled_from(["rank", "wsft"]),
        "low": st.sampled_from([-1.5, 0.0, 0.5]),
        "high": st.sampled_from([-0.5, 1.0]),
        "shortest": st.integers(0, 8),
        "longest": st.integers(0, 8),
        "finish": st.sampled_from(["stop", "length", "y", "y_prompt", "empty"]),
        "words": st.sampled_from(["film", "ÄRGER", "good bad", "50 %", "A.B", "axb", "q1-3"]),
        "order": st.sampled_from(["round", "high", "low"]),
    },
)


def expected(rows: list[dict[str, Any]], asked: dict[str, Any]) -> list[dict[str, Any]]:
    def margin(row: dict[str, Any]) -> float:
        return row["s_prompt"] - row["s"]

    def matches(row: dict[str, Any]) -> bool:
        lengths = [len(row["y_ids"]), len(row["y_prompt_ids"])]
        cut = {arm: row[f"{arm}_finish"] == "length" for arm in ("y", "y_prompt")}
        ended = {"stop": not any(cut.values()), "length": any(cut.values()), "empty": row["y_empty"], **cut}
        text = "\n".join([row["query_id"], row["x"], row["y"], row["y_prompt"]]).lower()
        return (
            asked.get("round") in (None, row["round"])
            and asked.get("set") in (None, "rank" if margin(row) > TAU0 * ALPHA ** row["round"] else "wsft")
            and asked.get("low", -9) <= margin(row) <= asked.get("high", 9)
            and any(asked.get("shortest", 0) <= length <= asked.get("longest", 99) for length in lengths)
            and ended.get(asked.get("finish"), True)
            and all(word in text for word in asked.get("words", "").lower().split())
        )

    found = [row for row in rows if matches(row)]
    sign = {"high": -1, "low": 1}.get(asked.get("order"), 0)
    return sorted(found, key=lambda row: sign * margin(row))  # stable


@settings(max_examples=60, deadline=None)
@given(QUESTIONS)
def test_pages_hold_every_pair_that_matches_once_and_in_order(many, asked):
    browser, rows = many
    wanted = expected(rows, asked)
    found, more = [], True
    while more:
        page, more = browser.page(Wanted(**asked, page=len(found) // PAGE))
        assert len(page) == PAGE or not more
        found += page
    assert [(row["query_id"], row["round"]) for row in found] == [(row["query_id"], row["round"]) for row in wanted]
    assert browser.count(Wanted(**asked)) == len(wanted)
    for row, own in zip(found, wanted, strict=True):
        assert row["margin"] == own["s_prompt"] - own["s"]
        assert "".join(text for _, text in row["y_prompt"]) == own["y_prompt"]
        assert row["length_y"] == len(own["y_ids"])


def test_a_page_behind_the_last_is_empty(many):
    assert many[0].page(Wanted(page=99)) == ([], False)


@pytest.mark.parametrize("asked", [{"low": "nan"}, {"page": -1}, {"set": "x"}, {"words": "w" * 1001}, {"other": "1"}])
def test_what_is_no_question_is_refused(asked):
    with pytest.raises(ValueError, match="validation error"):
        Wanted.model_validate(asked)


def test_prompts_are_those_that_the_model_saw(tmp_path, chat_policy, monkeypatch):
    """Against the token ids that were sampled from: of y as they are stored, of y_prompt as the plan made them."""
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"id": f"{i}", "x": f"the film {i}"}) + "\n" for i in "abc"))
    seen = {}
    from ple_data.engines.hf import HfEngine

    sample = HfEngine.sample

    def spy(self: HfEngine, units: Iterator, sampling: Any) -> Iterator:
        for request, completion in sample(self, units, sampling):
            if request.key:
                seen[request.key] = (list(request.prompt_ids), self._spec.tokenizer)
            yield request, completion

    monkeypatch.setattr(HfEngine, "sample", spy)
    data = tmp_path / "data"
    generate(
        Gen(model=str(chat_policy), queries=str(tmp_path / "q.jsonl"), principles="hh", data=data, round=0, engine="hf",
            max_new_tokens=3, engine_arg=("device=cpu",))
    )  # fmt: skip
    (shard,) = Store(data).shards("responses")
    rows = Store(data).read(shard).append_column("s", [[0.0] * 3]).append_column("s_prompt", [[1.0] * 3])
    pairs = rows.append_column("reward_model", [["r"] * 3])
    Store(data).commit("pairs", 0, shard.unit, pairs, Store(data).provenance(shard))
    browser = Browser(Sources(data))
    for at in range(3):
        asked = browser.asked(0, shard.unit, at)
        assert asked["note"] == ""
        for arm in ("y", "y_prompt"):
            ids, tokenizer = seen[shard.unit, at, arm]
            assert asked["prompts"][arm] == tokenizer.decode(ids)
    with pytest.raises(UsageError, match="no pair 3 in unit"):
        browser.asked(0, shard.unit, 3)
    chat_policy_gone = Store(data).load_manifest(0).model_copy(update={"notes": {"model": str(tmp_path / "gone")}})
    monkeypatch.setattr(Store, "load_manifest", lambda self, t: chat_policy_gone)
    asked = Browser(Sources(data)).asked(0, shard.unit, 0)
    assert asked["prompts"] == {}
    assert asked["note"].startswith("The prompts cannot be written again: ")


# --- who may read ---


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    hostile = [
        {"query_id": HOSTILE, "x": HOSTILE, "y": HOSTILE, "y_prompt": f"so {HOSTILE}", "s": 0.0, "s_prompt": 9.0}
    ]
    run = make_run(folder / "run", [[*plain_rows(120), *hostile], plain_rows(25, 1)])
    with served(run, **make_results(folder / "results")) as running:
        yield running


def get(server: Server, place: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest("GET", place, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read(), dict(answer.getheaders())


def test_only_this_machine_by_its_name_and_with_the_whole_address(server):
    page = f"/{server.secret}/"
    assert server.server_address[0] == "127.0.0.1"
    for host in (f"127.0.0.1:{server.server_port}", "localhost:9", "[::1]:80", "localhost"):
        assert get(server, page, Host=host)[0] == 200, host
    for host in (
        "evil.example",
        f"evil.example:{server.server_port}",
        "localhost.evil.example:80",
        "",
        "127.0.0.1.x:1",
    ):
        status, body, _ = get(server, page, Host=host)
        assert (status, json.loads(body)) == (403, {"error": "this is not the name of this machine"}), host
    for place in ("/", "/state", "/wrong/", "/%2e%2e/", f"/{server.secret}x/"):
        assert get(server, place)[0] == 403, place
    for site in ("cross-site",):
        assert get(server, f"{page}pairs", Sec_Fetch_Site=site)[0] == 403
    assert get(server, f"{page}state", Sec_Fetch_Site="same-origin", Origin="http://evil.example")[0] == 200


def test_no_other_site_may_read_frame_or_keep_it(server):
    for place in ("", "state", "pairs", "count"):
        status, _, headers = get(server, f"/{server.secret}/{place}", Origin="http://evil.example")
        assert status == 200
        assert not [name for name in headers if name.lower().startswith("access-control")]
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["Cache-Control"] == "no-store"
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"


def test_what_it_cannot_answer_is_a_sentence(server):
    for place, status, words in (
        ("pairs?set=x", 400, "not a question about pairs"),
        ("prompts?round=0", 400, "not a question about pairs"),
        ("prompts?round=0&unit=../../x&row=0", 400, "there is no pair 0 in unit ../../x of round 0"),
        ("../../etc/passwd", 400, "there is no"),
    ):
        found, body, _ = get(server, f"/{server.secret}/{place}")
        assert found == status
        assert words in json.loads(body)["error"]
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request("POST", f"/{server.secret}/", b"x")
    assert connection.getresponse().status == 501


def test_pairs_come_as_html_in_which_text_is_text(server):
    query = urlencode({"words": "window.hit", "order": "high"})
    found = json.loads(get(server, f"/{server.secret}/pairs?{query}")[1])
    assert found["more"] is False
    assert "<script" not in found["html"]
    assert "&lt;script&gt;window.hit = 1&lt;/script&gt;" in found["html"]
    assert "⟨U+202E⟩evil ⟨U+001B⟩" in found["html"]
    assert json.loads(get(server, f"/{server.secret}/count")[1]) == {"count": 146}


def test_a_page_that_could_not_be_made_is_made_at_the_next_look(tmp_path, monkeypatch):
    run, made, failed = make_run(tmp_path / "run", [plain_rows(5)]), watch._made, []

    def once(chosen: Report) -> Any:
        if not failed:
            failed.append(chosen)
            raise OSError(5, "Input/output error")
        return made(chosen)

    with served(run) as server:
        before = server.shown
        monkeypatch.setattr(watch, "_made", once)
        Store(run / "data").commit("pairs", 1, "00000-000000000001", table("pairs", plain_rows(9, 1), round=1), {})
        server.look()
        assert (server.shown.page, server.shown.fault) == (before.page, "[Errno 5] Input/output error")
        server.look()
        assert (server.shown.page == before.page, server.shown.fault) == (False, before.fault)


# --- the command ---


def test_a_port_in_use_an_output_and_a_port_alone_are_one_sentence(server, tmp_path):
    run, port = str(server._chosen.run), server.server_port
    for words, sentence in (
        (["--watch", "--port", str(port)], f"port {port} cannot be served on (Address already in use): give another"),
        (["--watch", "--output", "x.html"], "--watch serves the page and writes none: leave --output out"),
        (["--port", "80"], "--port: it is for --watch; give both, or leave it out"),
    ):
        result = CliRunner().invoke(cli.ple, ["report", run, *words])
        assert result.exit_code == 2
        assert sentence in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_it_with_a_sentence_and_nothing_was_written(tmp_path, number):
    run = make_run(tmp_path / "run", [plain_rows(5)])
    before = sorted((str(path), path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", "report", str(run), "--watch", "--port", "0"], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT,
    )  # fmt: skip
    address = process.stdout.readline()
    assert address.startswith("http://127.0.0.1:")
    process.send_signal(number)
    out, messages = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "the report is no longer served; nothing was written\n")
    assert messages == f"report: follows {run} at this address, until Ctrl-C\n"
    assert sorted((str(path), path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


# --- in a browser ---


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@contextlib.contextmanager
def visit(browser: Any, address: str, **context: Any) -> Iterator[tuple[Any, list[str]]]:
    opened = browser.new_context(**context)
    page, events = opened.new_page(), []
    page.on("console", lambda message: events.append(message.text))
    page.on("pageerror", lambda error: events.append(str(error)))
    page.goto(address)
    page.locator("#count:has-text('match')").wait_for()
    yield page, events
    opened.close()


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_all_pairs_are_there_page_by_page(browser, server):
    with visit(browser, server.address) as (page, events):
        count = page.locator("#count")
        assert count.inner_text() == "146 pairs match; these are 1 to 50."
        page.click("#next")
        page.locator("#count:has-text('51 to 100')").wait_for()
        assert page.evaluate("document.activeElement.id") == "count"
        page.click("#next")
        page.locator("#count:has-text('101 to 146')").wait_for()
        assert page.locator("#next").is_hidden()
        page.select_option("[name=round]", "1")
        page.locator("#count:has-text('25 pairs match; these are 1 to 25.')").wait_for()
        page.fill("[name=words]", "GUIDED 7")
        page.keyboard.press("Enter")
        page.locator("#count:has-text('2 pairs match')").wait_for()
        assert page.locator(".pair h3").all_inner_texts() == ["q1-7", "q1-17"]
        assert page.locator(".pair").first.locator(".y_prompt mark").all_inner_texts() == ["guided"]
        page.locator("details.asked summary").first.click()
        page.locator("details.asked:has-text('does not say which model was asked')").wait_for()
        assert events == []


def test_hostile_pairs_do_nothing(browser, server):
    with visit(browser, server.address) as (page, events):
        page.select_option("[name=order]", "high")
        page.locator(".pair:has-text('window.hit')").first.wait_for()
        assert page.evaluate("window.hit") is None
        assert page.locator("img, iframe, #list script").count() == 0
        assert events == []
        page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hit = 1\">')")
        page.wait_for_timeout(200)
        assert page.evaluate("window.hit") is None


def test_the_page_follows_the_run_and_leaves_the_reader_alone(browser, tmp_path):
    """A round comes: sections change in place, while what is open, scrolled and focused stays as it was."""
    run = make_run(tmp_path / "run", [plain_rows(5)])
    with (
        served(run) as server,
        visit(browser, server.address, viewport={"width": 400, "height": 700}) as (page, events),
    ):
        page.evaluate("document.querySelector('#stages details').open = true")
        page.evaluate("window.kept = document.querySelector('#purity')")
        page.evaluate("document.querySelector('#rewards .scroll').scrollLeft = 20")
        page.evaluate("document.querySelector('#rewards .scroll').focus({preventScroll: true})")
        page.evaluate("document.querySelector('#stages').scrollIntoView({behavior: 'instant'})")
        top = page.evaluate("document.querySelector('#stages').getBoundingClientRect().top")
        Store(run / "data").commit("pairs", 1, "00000-000000000001", table("pairs", plain_rows(9, 1), round=1), {})
        server.look()
        page.locator("#head:has-text('14 in 2 rounds')").wait_for()
        page.locator("#fresh").wait_for()
        assert page.evaluate("document.querySelector('#stages details').open")
        assert page.evaluate("window.kept === document.querySelector('#purity')")
        assert page.evaluate("document.querySelector('#rewards .scroll').scrollLeft") == 20
        assert page.evaluate("document.activeElement === document.querySelector('#rewards .scroll')")
        assert abs(page.evaluate("document.querySelector('#stages').getBoundingClientRect().top") - top) <= 1
        assert page.locator(".pair").count() == 5
        page.click("#fresh")
        page.locator("#count:has-text('14 pairs match')").wait_for()
        assert page.locator("[name=round] option").all_inner_texts() == ["all", "0", "1"]
        (run / "stages.json").write_text("{")
        server.look()
        page.locator("#live:has-text('stages.json')").wait_for()
        assert page.locator(".pair").count() == 14
        assert events == []
        server.shutdown()
        server.server_close()
        page.locator("#live:has-text('The server has ended')").wait_for(timeout=40_000)
