"""ple judge: sources and their join, the question and its verdict, both orders, resume, real kills, reports."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest
import scipy.stats
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import cli
from ple_data.common import llm
from ple_data.common.journal import Journal
from ple_data.inputs.chat import readable
from ple_data.judge import judge as judging
from ple_data.judge.judge import by_answers
from ple_data.judge.prompt import load_template, preference
from ple_data.judge.results import win_rate
from ple_data.judge.sources import Pair, choose, draw, load_pairs, load_responses
from ple_data.storage.store import Store
from schemas import tables
from schemas.errors import DamagedError, LockedError, PleError, UsageError
from schemas.judging import Answer
from schemas.records import read_record
from schemas.reports import JudgeReport
from tests.conftest import ROOT
from tests.judgeserver import JudgeServer, judge
from tests.tables import table

Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def sources(folder: Path, queries: list[tuple[str, str, str]], **more: list[Any]) -> tuple[str, str]:
    """Files A and B from (x, a, b); `more` are further columns of A."""
    left = [
        {"query_id": f"q{n}", "x": x, "y": a, **{name: values[n] for name, values in more.items()}}
        for n, (x, a, _) in enumerate(queries)
    ]
    right = [{"query_id": f"q{n}", "x": x, "y": b} for n, (x, _, b) in enumerate(queries)]
    return write(folder / "a.jsonl", left), write(folder / "b.jsonl", right)


# --- sources ---------------------------------------------------------------------------------------


def commit(root: Path, kind: str, round: int, rows: Rows) -> str:
    Store(root).commit(kind, round, f"u{round}", table(kind, rows, round), {})
    return str(root)


def test_files_are_joined_by_id_and_what_only_one_has_is_counted(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"query_id": q, "x": q, "y": "a", "kind": "k"} for q in ("1", "2", "3")])
    b = write(tmp_path / "b.jsonl", [{"id": q, "prompt": str(q), "response": "b"} for q in (3, 1, 4, 5)])
    found = load_pairs(a, b)
    assert found.rows == [Pair("1", "1", "a", "b", "k"), Pair("3", "3", "a", "b", "k")]
    assert (found.only_a, found.only_b) == (1, 2)
    assert found.count() == "2 queries in both A and B; left out: 1 only in A, 2 only in B"


def test_a_store_gives_answers_before_responses_before_pairs(tmp_path):
    store = commit(tmp_path / "d", "pairs", 0, [{"y": "from pairs", "y_prompt": "guided"}])
    assert [r.y for r in load_responses(store)] == ["from pairs"]
    assert [r.y for r in load_responses(f"{store}#arm=y_prompt")] == ["guided"]
    commit(tmp_path / "d", "responses", 0, [{"y": "from responses"}])
    assert [r.y for r in load_responses(store)] == ["from responses"]
    commit(tmp_path / "d", "answers", 0, [{"y": "from answers"}])
    assert [r.y for r in load_responses(store)] == ["from answers"]


def test_a_store_of_several_rounds_needs_one_and_of_several_samples_gives_the_first(tmp_path, capsys):
    store = commit(tmp_path / "d", "pairs", 0, [{"y": "old"}])
    commit(tmp_path / "d", "pairs", 4, [{"query_id": "q0", "sample": n, "y": f"new {n}"} for n in (1, 0)])
    with pytest.raises(UsageError, match=r"rounds 0, 4: choose one, .*#round=N"):
        load_responses(store)
    assert [r.y for r in load_responses(f"{store}#round=4")] == ["new 0"]
    assert "1 further samples of the same queries left out" in capsys.readouterr().err
    assert [r.y for r in load_responses(f"{store}#round=0,arm=y_prompt")] == ["very good"]
    with pytest.raises(UsageError, match="no pairs of that round; there are rounds 0, 4"):
        load_responses(f"{store}#round=1")


def test_a_policy_of_an_evaluation_is_chosen_by_its_label(tmp_path):
    path = tmp_path / "eval.parquet"
    rows = [("a", "q1", 0, "old"), ("b", "q1", 0, "new"), ("b", "q1", 1, "newer"), ("b", "q2", 0, "other")]
    pl.DataFrame(
        [{"label": label, "query_id": id, "sample": n, "x": id, "y": y} for label, id, n, y in rows]
    ).write_parquet(path)
    assert [r.y for r in load_responses(f"{path}#label=b")] == ["new", "other"]
    assert [(p.a, p.b) for p in load_pairs(f"{path}#label=b", f"{path}#label=a").rows] == [("new", "old")]
    with pytest.raises(UsageError, match="no row with the label c; there are a, b"):
        load_responses(f"{path}#label=c")
    with pytest.raises(UsageError, match=r"two rows for query 'q1'.*FILE#label=NAME"):
        load_responses(str(path))
    with pytest.raises(UsageError, match=r"#label is for the eval\.parquet"):
        load_responses(f"{commit(tmp_path / 'd', 'pairs', 0, [{}])}#label=b")


@pytest.mark.parametrize("spec", ["#round=x", "#arm=z", "#rounds=1", "#round"])
def test_a_choice_that_is_none_is_refused(tmp_path, spec):
    store = commit(tmp_path / "d", "pairs", 0, [{}])
    with pytest.raises(UsageError, match="expected round=N, arm=y or arm=y_prompt"):
        load_responses(store + spec)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"x": "x", "y": "y"}], "no column query_id or id; it has x, y"),
        ([{"id": "1", "x": "x"}], "no column y or response"),
        ([{"id": "1", "x": "x", "y": "y"}, {"id": "1", "x": "x", "y": "z"}], "two rows for query '1'"),
        ([{"id": "1", "x": "x", "y": "y"}, {"id": "2", "x": "x", "y": None}], "line 2: y is None"),
        ([{"id": "1", "x": "x", "y": "\ud800"}], "line 1: column y holds half a character"),
        ([{"id": "1", "x": '[{"role": "user"}]', "y": "y"}], "line 1: x begins like a stored chat but is no list"),
        ([{"id": "1", "x": '[{"role": "user", "content": 3}]', "y": "y"}], "line 1: x begins like a stored chat"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, rows, message):
    with pytest.raises(UsageError, match=message) as caught:
        load_responses(write(tmp_path / "bad.jsonl", rows))
    assert "\n" not in str(caught.value)


def test_sides_that_do_not_belong_together_are_refused(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"id": "1", "x": "x", "y": "y"}])
    with pytest.raises(UsageError, match="no query in common"):
        load_pairs(a, write(tmp_path / "b.jsonl", [{"id": "2", "x": "x", "y": "y"}]))
    with pytest.raises(UsageError, match="different queries x under the same id, in query '1'"):
        load_pairs(a, write(tmp_path / "b.jsonl", [{"id": "1", "x": "other", "y": "y"}]))
    with pytest.raises(UsageError, match=r"#round and #arm are for a data directory"):
        load_pairs(f"{a}#round=0", a)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no committed answers or responses or pairs"):
        load_pairs(a, str(tmp_path / "empty"))


def test_a_chat_and_a_dialogue_of_the_same_turns_are_the_same_query(tmp_path):
    chat = json.dumps([{"role": "user", "content": "Hi"}])
    a = write(tmp_path / "a.jsonl", [{"id": "1", "x": "\n\nHuman: Hi\n\nAssistant:", "y": "a"}])
    b = write(tmp_path / "b.jsonl", [{"id": "1", "x": chat, "y": "b"}])
    [pair] = load_pairs(a, b).rows
    assert readable(pair.x) == readable(chat) == "Hi"
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Bye"},
    ]
    assert readable(json.dumps(turns)) == "User: Hi\n\nAssistant: Yes?\n\nUser: Bye"
    assert readable("The film was") == "The film was"
    assert readable("\n\nHuman: \n\nAssistant:") == "\n\nHuman: \n\nAssistant:"


def test_a_larger_limit_keeps_the_queries_of_a_smaller_one():
    pairs = [Pair(f"q{n}", "x", "a", "b") for n in range(50)]
    few, more = choose(pairs, 10, 3), choose(pairs, 20, 3)
    assert len(few) == 10
    assert set(few) < set(more)
    assert few != choose(pairs, 10, 4)
    assert choose(pairs, None, 3) == pairs
    sides = [draw(0, "side", f"q{n}")[0] & 1 for n in range(2000)]
    assert scipy.stats.binomtest(sum(sides), 2000).pvalue > 0.001


# --- question and verdict --------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.text(), st.text(), st.text())
def test_a_response_cannot_become_part_of_the_template(query, first, second):
    """Placeholder-like text stays what it is; the oracle cuts the template by hand."""
    hostile = first + "{response_2}{query}{x}%s\\1"
    text = load_template().text
    start, rest = text.split("{query}")
    middle, rest = rest.split("{response_1}")
    between, end = rest.split("{response_2}")
    expected = start + query + middle + hostile + between + second + end
    assert load_template().render(query, hostile, second) == expected


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("{query}{response_1} [[1]] [[2]]", ["{response_2} is missing"]),
        ("", ["{query} is missing", "{response_1} is missing", "{response_2} is missing", "verdict [[1]]", "[[2]]"]),
        ("{query}{response_1}{response_2}{answer} [[1]] [[2]]", ["{answer} is unknown"]),
        ("{query}{response_1}{response_2} A or B?", ["does not ask for the verdict [[1]]", "[[2]]"]),
    ],
)
def test_a_template_is_checked_with_every_fault(tmp_path, text, faults):
    path = tmp_path / "t.txt"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_template(path)
    assert all(fault in str(caught.value) for fault in faults)


def test_a_template_may_hold_braces_and_have_no_ties(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text('{"q": "{query}"} {response_1}|{response_2} [[1]] or [[2]], {} { query }')
    assert load_template(path).render("Q", "F", "S") == '{"q": "Q"} F|S [[1]] or [[2]], {} { query }'
    with pytest.raises(UsageError, match="cannot be read"):
        load_template(tmp_path / "none.txt")
    path.write_bytes(b"\xef\xbb\xbf{query} {response_1} {response_2} [[1]] [[2]]")
    assert load_template(path).text.startswith("{query}")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Reasons. [[1]]", "1"),
        ("[[2]].", "2"),
        ("**[[ Tie ]]**", "tie"),
        ("[[1]] as I said: [[1]]", "1"),
        ("[[1]] no, [[2]]", None),
        ("[1]", None),
        ("Response 1 is better", None),
        ("[[3]]", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_or_not_and_never_guessed(answer, expected):
    assert preference(answer) == expected


PAIR = Pair("q", "x", "text of a", "text of b")
SAID = {"1": "[[1]]", "2": "[[2]]", "tie": "[[tie]]", None: "no idea"}


@pytest.mark.parametrize(("a_first", "b_first"), list(itertools.product(SAID, SAID)))
def test_outcomes_of_both_orders(a_first, b_first):
    """The whole table, by hand: a wins only with 1 then 2, loses only with 2 then 1."""
    by_hand = {("1", "2"): "win", ("2", "1"): "lose"}
    expected = "unparsed" if None in (a_first, b_first) else by_hand.get((a_first, b_first), "tie")
    answers = {
        ("q", "a_first"): answer("q", "a_first", SAID[a_first]),
        ("q", "b_first"): answer("q", "b_first", SAID[b_first]),
    }
    found = by_answers(PAIR, answers)
    assert found.outcome == expected
    assert found.details["a_first"] == {"1": "a", "2": "b", "tie": "tie", None: None}[a_first]
    assert found.details["b_first"] == {"1": "b", "2": "a", "tie": "tie", None: None}[b_first]


def answer(query_id: str, order: Any, text: str, request: str = "r") -> Answer:
    return Answer(
        request=request, query_id=query_id, order=order, text=text, finish="stop", prompt_tokens=1, completion_tokens=1
    )


def test_a_query_without_an_answer_is_unparsed():
    assert by_answers(PAIR, {("q", "a_first"): answer("q", "a_first", "[[1]]")}).outcome == "unparsed"


# --- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(20, 10, 20), (45, 3, 2), (1, 1, 1), (3, 2, 1), (0, 0, 7)])
def test_win_rate_and_interval_agree_with_scipy(counts):
    values = np.repeat([1.0, 0.5, 0.0], counts)
    found = win_rate(np.repeat(["win", "tie", "lose"], counts).tolist() + ["unparsed"] * 5, seed=1)
    assert found.mean == pytest.approx(values.mean())
    assert found.count == len(values)
    if len(set(values)) == 1:
        assert (found.low, found.high) == (values[0], values[0])
        return
    if len(values) < 10:
        rates = [np.mean(drawn) for drawn in itertools.product(values, repeat=len(values))]
        exact = np.quantile(rates, [0.025, 0.975], method="inverted_cdf")
        assert [found.low, found.high] == pytest.approx(exact)
        return
    oracle = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert found.low == pytest.approx(oracle.low, abs=0.011)
    assert found.high == pytest.approx(oracle.high, abs=0.011)


def test_no_verdict_no_rate():
    assert win_rate(["unparsed"], 0) is None


# --- endpoints -------------------------------------------------------------------------------------


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., JudgeServer]]:
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(llm, "FIRST_WAIT", 0.01)
    servers = []

    def start(*arguments: Any, **more: Any) -> JudgeServer:
        servers.append(JudgeServer(*arguments, **more))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


MIXED = [
    ("plain one", "a long response", "short"),
    ("plain two", "short", "a long response"),
    ("plain three", "a longer response", "short"),
    ("BIASED", "some", "thing"),
    ("EQUAL", "some", "thing"),
    ("BABBLE", "some", "thing"),
    ("TORN", "some", "thing"),
]


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
def test_judging_from_end_to_end(kind, serve, tmp_path, monkeypatch, capsys):
    server = serve()
    monkeypatch.setenv({"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY"}[kind], "sesame")
    a, b = sources(tmp_path, MIXED, kind=["x", "x", "y", "y", "y", "x", "x"])
    text = judge(a, b, f"{kind}:some-model", tmp_path / "out", endpoint=server.url)
    report = read_record(JudgeReport, tmp_path / "out" / "judge.json")
    assert (report.wins, report.ties, report.losses, report.unparsed) == (2, 2, 1, 2)
    assert report.orders_disagree == 1  # BIASED; EQUAL is called a tie twice
    assert "the two orders disagree on 1 of 5 queries, counted as ties" in text
    assert report.win_rate.mean == 0.6
    assert (report.prompt_tokens, report.completion_tokens) == (1400, 140)
    assert [(p.by, p.name, p.wins, p.ties, p.losses, p.unparsed) for p in report.parts] == [
        ("kind", "x", 1, 0, 1, 2),
        ("kind", "y", 1, 2, 0, 0),
    ]
    assert report.judge == f"{kind}:some-model"
    length = {"openai": "max_completion_tokens", "anthropic": "max_tokens"}[kind]
    assert report.settings == {
        "limit": None,
        "seed": 0,
        "endpoint": server.url,
        "request": {length: 1024, "temperature": 0},
    }
    rows = tables.read_table(tmp_path / "out" / "verdicts.parquet", "verdicts").to_pylist()
    assert [row["verdict"] for row in rows] == ["win", "lose", "win", "tie", "tie", "unparsed", "unparsed"]
    assert (rows[3]["a_first"], rows[3]["b_first"], rows[5]["a_first"]) == ("a", "b", None)
    assert rows[5]["a_first_answer"] == "Hard to say."
    assert len(server.requests) == 14
    assert set(server.paths) == {{"openai": "/v1/chat/completions", "anthropic": "/v1/messages"}[kind]}
    assert {k: v for k, v in server.requests[0].items() if k != "messages"} == {
        "model": "some-model",
        length: 1024,
        "temperature": 0,
    }
    header = server.headers[0]
    assert header["authorization"] == "Bearer sesame" if kind == "openai" else header["x-api-key"] == "sesame"
    assert "0.60 [" in text
    assert "tokens paid for: 1400 read, 140 written" in text
    told = capsys.readouterr().err
    assert "judge: 2 queries are unparsed, an answer holds no verdict: query 'q5', 'q6'; answers are kept" in told
    assert "sesame" not in text + told + "".join(
        path.read_text(errors="replace") for path in (tmp_path / "out").iterdir()
    )


def test_a_second_run_asks_nothing_and_other_texts_are_asked_anew(serve, tmp_path):
    server = serve()
    a, b = sources(tmp_path, MIXED[:3])
    judge(a, b, "openai:m", tmp_path / "out", endpoint=server.url, limit=2)
    judge(a, b, "openai:m", tmp_path / "out", endpoint=server.url)
    assert len(server.requests) == 6
    before = (tmp_path / "out" / "verdicts.parquet").read_bytes()
    judge(a, b, "openai:m", tmp_path / "out", endpoint=server.url)
    assert len(server.requests) == 6
    assert (tmp_path / "out" / "verdicts.parquet").read_bytes() == before
    sources(tmp_path, [("plain one", "changed", "short"), *MIXED[1:3]])
    judge(a, b, "openai:m", tmp_path / "out", endpoint=server.url)
    assert len(server.requests) == 8
    judge(a, b, "openai:m", tmp_path / "out", endpoint=server.url, request_args={"temperature": None, "top_p": 0.5})
    assert len(server.requests) == 14
    assert {k: v for k, v in server.requests[-1].items() if k not in ("messages", "model")} == {
        "max_completion_tokens": 1024,
        "top_p": 0.5,
    }


def test_another_judge_or_template_needs_another_folder(serve, tmp_path):
    server = serve()
    a, b = sources(tmp_path, MIXED[:1])
    judge(a, b, "openai:m", tmp_path / "out", endpoint=server.url)
    with pytest.raises(UsageError, match=r"holds the verdicts of judge openai:m, not openai:n.*another --output"):
        judge(a, b, "openai:n", tmp_path / "out", endpoint=server.url)
    own = tmp_path / "own.txt"
    own.write_text("----- begin of query -----\n{query}\n----- end of {response_1}{response_2} [[1]] [[2]]")
    with pytest.raises(UsageError, match="template"):
        judge(a, b, "openai:m", tmp_path / "out", endpoint=server.url, template=own)
    assert len(server.requests) == 2


def test_requests_are_in_flight_together_and_tried_again(serve, tmp_path):
    server = serve([500, "drop", 429, (503, "1")], seconds=0.03)
    a, b = sources(tmp_path, [(f"plain {n}", "long one", "short") for n in range(8)])
    judge(a, b, "openai:m", tmp_path / "out", endpoint=server.url, concurrency=4)
    assert read_record(JudgeReport, tmp_path / "out" / "judge.json").wins == 8
    assert len(server.requests) == 16 + 4
    assert 1 < server.most_at_once <= 4
    assert server.times[-1] - server.times[0] > 0.5


def test_an_endpoint_that_stays_away_keeps_what_was_answered(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(llm, "TRIES", 2)
    server = serve()
    a, b = sources(tmp_path, [(f"plain {n}", "long one", "short") for n in range(9)])
    judge(a, b, "openai:m", tmp_path / "out", endpoint=server.url, limit=1)
    server.plan = [500] * 99
    with pytest.raises(PleError, match=r"failed 2 times, the last with status 500 .*run the same command again"):
        judge(a, b, "openai:m", tmp_path / "out", endpoint=server.url, concurrency=1)
    server.plan = []
    judge(a, b, "openai:m", tmp_path / "out", endpoint=server.url)
    assert 0 <= len(server.requests) - (2 + 2 * llm.MOST_FAULTS + 16) <= 2, "one more had begun, at most"
    judge(a, b, "openai:m", tmp_path / "out", endpoint="http://127.0.0.1:9/v1")  # nobody there, and nothing to ask


@pytest.mark.parametrize(("fault", "message"), [(429, "status 429"), (None, "ConnectError")])
def test_a_server_that_is_not_there_or_says_later_is_no_matter_of_a_query(fault, message, serve, tmp_path, monkeypatch):
    monkeypatch.setattr(llm, "TRIES", 2)
    server = serve()
    a, b = sources(tmp_path, MIXED[:2])
    judge(a, b, "openai:m", tmp_path / "out", endpoint=server.url, limit=1)
    server.plan = [fault] * 9
    url = server.url if fault else "http://127.0.0.1:9/v1"
    with pytest.raises(PleError, match=f"failed 2 times, the last with .*{message}"):
        judge(a, b, "openai:m", tmp_path / "out", endpoint=url)


@pytest.mark.parametrize("fault", [500, "nothing readable"])
def test_a_query_on_which_the_endpoint_always_fails_is_unparsed_and_asked_again(
    fault, serve, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(llm, "TRIES", 1)
    server = serve([None] * 2 + [fault] * 2)
    a, b = sources(tmp_path, MIXED[:3])
    judge(a, b, "openai:m", tmp_path / "out", endpoint=server.url, concurrency=1)
    report = read_record(JudgeReport, tmp_path / "out" / "judge.json")
    assert (report.wins, report.unparsed) == (2, 1)
    assert "no verdict: query 'q1': judge openai:m" in capsys.readouterr().err
    judge(a, b, "openai:m", tmp_path / "out", endpoint=server.url)
    assert read_record(JudgeReport, tmp_path / "out" / "judge.json").unparsed == 0
    assert len(server.requests) == 8


def test_equal_requests_are_paid_once(serve, tmp_path):
    """a == b is one request in both orders, and so is a query that stands there twice."""
    server = serve()
    a, b = sources(tmp_path, [("plain", "same", "same"), ("plain", "longer", "b"), ("plain", "longer", "b")])
    judge(a, b, "openai:m", tmp_path / "out", endpoint=server.url)
    assert len(server.requests) == 3
    report = read_record(JudgeReport, tmp_path / "out" / "judge.json")
    assert (report.wins, report.ties, report.prompt_tokens, report.completion_tokens) == (2, 1, 300, 30)


def test_a_server_on_another_port_is_the_same_judge(serve, tmp_path):
    a, b = sources(tmp_path, MIXED[:2])
    judge(a, b, "openai:m", tmp_path / "out", endpoint=serve().url)
    moved = serve()
    judge(a, b, "openai:m", tmp_path / "out", endpoint=moved.url)
    assert moved.requests == []
    assert read_record(JudgeReport, tmp_path / "out" / "judge.json").settings["endpoint"] == moved.url


def test_as_many_connections_as_requests_in_flight(serve, tmp_path, monkeypatch):
    given = {}
    client = httpx.Client
    monkeypatch.setattr(httpx, "Client", lambda **options: given.update(options) or client(**options))
    a, b = sources(tmp_path, MIXED[:1])
    judge(a, b, "openai:m", tmp_path / "out", endpoint=serve().url, concurrency=200)
    assert given["limits"].max_connections == 200


def test_a_wrong_key_is_said_at_once_and_the_key_never(serve, tmp_path, monkeypatch):
    """The server repeats the key in its answer, as real ones do."""
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    server = serve([401] * 9)
    a, b = sources(tmp_path, MIXED[:3])
    with pytest.raises(UsageError, match=r"status 401 'no: Bearer \[key\]': check the key") as caught:
        judge(a, b, "openai:m", tmp_path / "out", endpoint=server.url, concurrency=1)
    assert "sesame" not in str(caught.value)
    assert len(server.requests) == 1


def test_a_query_that_the_endpoint_refuses_is_counted(serve, tmp_path, capsys):
    server = serve()
    server.refuse_when = "plain two"
    a, b = sources(tmp_path, MIXED[:3])
    judge(a, b, "openai:m", tmp_path / "out", endpoint=server.url, concurrency=1)
    report = read_record(JudgeReport, tmp_path / "out" / "judge.json")
    assert (report.wins, report.unparsed) == (2, 1)
    assert "no verdict: query 'q1': judge openai:m" in capsys.readouterr().err
    judge(a, b, "openai:m", tmp_path / "out", endpoint=server.url)  # the refused ones alone wait: asked again, no error
    assert read_record(JudgeReport, tmp_path / "out" / "judge.json").unparsed == 1
    assert len(server.requests) == 8


def test_settings_that_are_always_refused_are_an_error(serve, tmp_path):
    server = serve([400] * 99)
    a, b = sources(tmp_path, [(f"plain {n}", "long one", "short") for n in range(30)])
    with pytest.raises(UsageError, match=r"none of 8 requests was answered.*--request-arg temperature=null"):
        judge(a, b, "openai:m", tmp_path / "out", endpoint=server.url, concurrency=2)
    assert len(server.requests) < 15


@pytest.mark.parametrize("found", ["{}", "nothing", '{"choices": []}', '{"choices": [{"message": null}]}'])
def test_an_answer_in_another_format_is_an_error(serve, tmp_path, found):
    a, b = sources(tmp_path, MIXED[:1])
    with pytest.raises(PleError, match="expected the answer of the openai API, got"):
        judge(a, b, "openai:m", tmp_path / "out", endpoint=serve([found] * 2).url)


def test_half_characters_and_missing_usage_are_taken(serve, tmp_path, capsys):
    found = json.dumps({"choices": [{"message": {"content": "\ud800 [[1]]"}, "finish_reason": "\ud800"}]})
    nothing = json.dumps({"choices": [{"message": {"content": None}, "finish_reason": "length"}]})
    a, b = sources(tmp_path, MIXED[:1])
    judge(a, b, "openai:m", tmp_path / "out", endpoint=serve([found, nothing]).url, concurrency=1)
    [row] = tables.read_table(tmp_path / "out" / "verdicts.parquet", "verdicts").to_pylist()
    assert (row["a_first"], row["a_first_answer"], row["b_first"]) == ("a", "? [[1]]", None)
    messages = capsys.readouterr().err
    assert "did not say how many tokens 2 answers took" in messages
    assert "1 answers without a verdict were cut by the token limit" in messages


@pytest.mark.parametrize(
    ("spec", "more", "message"),
    [
        ("gpt-4o", {}, "expected openai:MODEL, anthropic:MODEL or reward:SPEC"),
        ("openai:", {}, "expected openai:MODEL"),
        ("openai:m", {}, "set the environment variable OPENAI_API_KEY"),
        ("anthropic:m", {}, "set the environment variable ANTHROPIC_API_KEY"),
        ("openai:m", {"endpoint": "http://me:sesame@example.org/v1"}, "OPENAI_API_KEY"),
        ("openai:m", {"endpoint": "http://me:sesame@host:port/v1"}, "not of the form http://host:port/path"),
        ("openai:m", {"endpoint": "localhost:8000"}, "needs http"),
        ("https://h/r?token=sesame", {}, "--judge https://h/r: expected openai:MODEL"),
        ("reward:https://h/r?token=sesame", {"endpoint": "http://x"}, "are for a language model"),
    ],
)
def test_a_judge_that_is_none_is_refused(serve, tmp_path, spec, more, message):
    a, b = sources(tmp_path, MIXED[:1])
    with pytest.raises(UsageError, match=message) as caught:
        judge(a, b, spec, tmp_path / "out", **more)
    assert "sesame" not in str(caught.value)


def test_request_arguments():
    assert llm.parse_request_args(["a=1", "b=null", "c=low", 'd={"e": [2]}']) == {
        "a": 1,
        "b": None,
        "c": "low",
        "d": {"e": [2]},
    }
    for wrong in ("a", "=1", "model=x", "messages=[]", "stream=true", "n=3"):
        with pytest.raises(UsageError, match="expected NAME=VALUE"):
            llm.parse_request_args([wrong])


@pytest.mark.parametrize("value", ["NaN", "1e999", "[-Infinity]", '"\\ud800"', '{"\\udfff": 1}'])
def test_a_request_argument_that_no_request_can_hold_is_refused(value: str):
    with pytest.raises(UsageError, match="--request-arg t: no request can hold this value"):
        llm.parse_request_args([f"t={value}"])


# --- what was paid for -----------------------------------------------------------------------------


def test_answers_come_back_and_half_a_line_is_cut_off(tmp_path):
    path = tmp_path / "answers.jsonl"
    with Journal(path, Answer) as file:
        file.add(answer("q", "a_first", "one\u2028\nline", "1"))
        file.add(answer("q", "b_first", "two", "2"))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"version": 1, "requ')
    with Journal(path, Answer) as file:
        assert file.get("1").text == "one\u2028\nline"
        assert file.get("3") is None
        file.add(answer("r", "a_first", "three", "3"))
    assert path.read_bytes().startswith(whole)
    with Journal(path, Answer) as file:
        assert [file.get(n).text for n in "123"] == ["one\u2028\nline", "two", "three"]


@pytest.mark.parametrize("text", [b"my notes", b"1", answer("q", "a_first", "one").model_dump_json().encode()[1:]])
def test_a_file_that_is_not_the_judges_is_neither_cut_nor_followed(tmp_path, text):
    kept, path = tmp_path / "kept.txt", tmp_path / "answers.jsonl"
    kept.write_bytes(text)
    for make in (path.hardlink_to, path.symlink_to):
        make(kept)
        with pytest.raises(PleError, match=r"answers\.jsonl: .*move it away"):
            Journal(path, Answer)
        path.unlink()
    assert kept.read_bytes() == text


@pytest.mark.parametrize("line", [b"{}", b"nothing", b'{"version": 2}'])
def test_a_damaged_answer_is_named_by_its_line(tmp_path, line):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(answer("q", "a_first", "one").model_dump_json().encode() + b"\n" + line + b"\n")
    with pytest.raises(DamagedError, match=r"answers.jsonl line 2: not a readable Answer"):
        Journal(path, Answer)


def test_a_full_disk_leaves_whole_lines_only(tmp_path, run_ple, serve):
    """The file may grow to 4 KiB: one sentence, and what stands there is whole."""
    server = serve()
    a, b = sources(tmp_path, [(f"plain {n}", "long one", "short") for n in range(40)])
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); import signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from cli import ple; ple(sys.argv[1:], prog_name='ple')"
    )
    words = ["judge", a, b, "--judge", "openai:m", "--endpoint", server.url, "--output", str(tmp_path / "out")]
    found = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert found.returncode == 1
    assert "answers.jsonl: cannot write" in found.stderr
    content = (tmp_path / "out" / "answers.jsonl").read_bytes()
    assert content.endswith(b"\n")
    kept = len(content.splitlines())
    assert 0 < kept < 80
    asked = len(server.requests)
    assert run_ple(*words).returncode == 0
    assert len(server.requests) == asked + 80 - kept


def test_two_at_once_are_refused(tmp_path, serve):
    from schemas.files import locked

    a, b = sources(tmp_path, MIXED[:1])
    with locked(tmp_path / "out" / ".lock"), pytest.raises(LockedError, match=rf"locked by pid {os.getpid()} on "):
        judge(a, b, "openai:m", tmp_path / "out", endpoint=serve().url)


def test_killed_again_and_again_nothing_is_paid_for_twice(tmp_path, serve):
    """kill -9 of real processes at random moments: no request whose answer is on disk is sent again, and the end is
    that of a run that nobody killed.
    """
    server = serve(seconds=0.04)
    queries = [(f"plain {n}", "a" * (n % 5 + 1), "b" * (n % 3 + 1)) for n in range(60)]
    a, b = sources(tmp_path, queries)
    words = [sys.executable, "-m", "cli", "judge", a, b, "--judge", "openai:m", "--endpoint", server.url]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    chance = random.Random(0)
    out, kills, concurrency = tmp_path / "killed", 4, 3
    for kill in range(kills):
        paid = kept(out)
        seen = len(server.requests)
        process = subprocess.Popen(
            [*words, "--output", str(out), "--concurrency", str(concurrency)],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = seen + chance.randint(5, 25)
        deadline = time.monotonic() + 60
        while len(server.requests) < until and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert paid <= kept(out), f"kill {kill}: an answer was lost"
    subprocess.run(
        [*words, "--output", str(out)], env=environment, cwd=ROOT, check=True, capture_output=True, timeout=60
    )
    asked = [json.dumps(request, sort_keys=True) for request in server.requests]
    assert len(set(asked)) == 120
    assert len(asked) <= 120 + kills * concurrency, "more than the requests in flight at a kill were asked again"
    judge(a, b, "openai:m", tmp_path / "whole", endpoint=server.url)
    for name in ("verdicts.parquet", "judge.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def kept(folder: Path) -> set[str]:
    path = folder / "answers.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return {json.loads(line)["request"] for line in lines}


# --- reward models ---------------------------------------------------------------------------------


def test_a_reward_model_prefers_the_higher_reward(tmp_path):
    scorer = tmp_path / "scorer.py"
    scorer.write_text("def score(xs, ys):\n    return [float(len(y)) for y in ys]\n")
    a, b = sources(tmp_path, [("x", "long", "b"), ("y", "a", "long"), ("z", "same", "size"), ("z", "same", "same")])
    text = judge(a, b, f"reward:{scorer}:score", tmp_path / "out")
    rows = tables.read_table(tmp_path / "out" / "verdicts.parquet", "verdicts").to_pylist()
    assert [row["verdict"] for row in rows] == ["win", "lose", "tie", "tie"]
    assert (rows[0]["reward_a"], rows[0]["reward_b"]) == (4.0, 1.0)
    assert "0.50 [" in text
    assert read_record(JudgeReport, tmp_path / "out" / "judge.json").judge.startswith("reward:scorer.py:score@")
    assert pl.read_parquet(tmp_path / "out" / "verdicts.parquet")["verdict"].to_list() == ["win", "lose", "tie", "tie"]


def test_a_classifier_is_a_judge(tmp_path, reward):
    """A real reward model: verdicts are those of its scores, computed apart."""
    from ple_data.rewards import load_reward_model

    queries = [(f"The film {n}", "was great." * n, "seems long?") for n in range(1, 5)]
    a, b = sources(tmp_path, queries)
    judge(a, b, f"reward:{reward}", tmp_path / "out", reward_device="cpu")
    alone = load_reward_model(str(reward))
    expected = ["win" if alone.score([(x, a)]) > alone.score([(x, b)]) else "lose" for x, a, b in queries]
    assert tables.read_table(tmp_path / "out" / "verdicts.parquet", "verdicts")["verdict"].to_pylist() == expected


def test_a_classifier_without_a_template_judges_what_was_asked_as_a_chat_as_one(tmp_path, reward):
    from ple_data.rewards import load_reward_model

    for name, y in (("a", "fine"), ("b", "not so fine")):
        rows = table("answers", [{"query_id": "q", "x": "the film", "y": y}], 0)
        Store(tmp_path / name).commit("answers", 0, "u0", rows, {"prompts": "chat"})
    judge(str(tmp_path / "a"), str(tmp_path / "b"), f"reward:{reward}", tmp_path / "out", reward_device="cpu")
    [found] = tables.read_table(tmp_path / "out" / "verdicts.parquet", "verdicts").to_pylist()
    alone = load_reward_model(str(reward))
    turns = '[{"role": "user", "content": "the film"}]'
    assert [found["reward_a"], found["reward_b"]] == pytest.approx(
        alone.score([(turns, "fine"), (turns, "not so fine")])
    )
    assert found["reward_a"] != pytest.approx(alone.score([("the film", "fine")])[0], abs=1e-6)


def test_rewards_are_scored_once_whatever_stops_the_command(tmp_path, monkeypatch):
    """A function that fails in the second part: the first part's rewards are kept, and asked for no more."""
    monkeypatch.setattr(judging, "CHUNK", 4)
    scorer = tmp_path / "scorer.py"
    scorer.write_text(
        "from pathlib import Path\n"
        "def score(xs, ys):\n"
        "    log = Path(__file__).with_name('log')\n"
        "    if 'r5' in ys and not Path(__file__).with_name('go').exists(): raise RuntimeError('away')\n"
        "    log.write_text((log.read_text() if log.exists() else '') + ' '.join(ys) + ' ')\n"
        "    return [float(y[1:]) for y in ys]\n"
    )
    a, b = sources(tmp_path, [(f"x{n}", f"r{2 * n}", f"r{2 * n + 1}") for n in range(4)])
    with pytest.raises(PleError, match="RuntimeError: away"):
        judge(a, b, f"reward:{scorer}:score", tmp_path / "out")
    (tmp_path / "go").touch()
    judge(a, b, f"reward:{scorer}:score", tmp_path / "out")
    assert (tmp_path / "log").read_text().split() == [f"r{n}" for n in range(8)]
    assert read_record(JudgeReport, tmp_path / "out" / "judge.json").losses == 4


def test_a_reward_that_is_no_number_is_refused(tmp_path):
    scorer = tmp_path / "scorer.py"
    scorer.write_text("def score(xs, ys):\n    return [float('nan') for y in ys]\n")
    a, b = sources(tmp_path, MIXED[:1])
    with pytest.raises(PleError, match="gave rewards that are not finite: query 'q0' = nan"):
        judge(a, b, f"reward:{scorer}:score", tmp_path / "out")


def test_each_finished_batch_of_an_http_reward_model_is_kept(tmp_path, monkeypatch):
    """4 batches in flight, the third is refused: the rewards of the others are kept and asked for no more."""
    asked, down = [], [True]

    def post(client, url, body, patience, **_):
        ys = [row["y"] for row in body["inputs"]]
        asked.append(ys)
        if "bad" in ys and down[0]:
            raise PleError("the server is gone")
        return httpx.Response(200, json={"scores": [float(len(y)) for y in ys]})

    monkeypatch.setattr("ple_data.rewards.endpoint.ask_json", post)
    queries = [(f"x{n}", f"a{n}", "bad" if n == 40 else f"b{n}") for n in range(60)]
    a, b = sources(tmp_path, queries)
    with pytest.raises(PleError, match="the server is gone"):
        judge(a, b, "reward:http://localhost/r", tmp_path / "out")
    kept_ys = {y for ys in asked for y in ys if "bad" not in ys}
    asked.clear()
    down[0] = False
    judge(a, b, "reward:http://localhost/r", tmp_path / "out")
    assert not kept_ys & {y for ys in asked for y in ys}
    assert len(kept_ys) >= 64


# --- the command -----------------------------------------------------------------------------------


def test_the_command(tmp_path, serve):
    server = serve()
    a, b = sources(tmp_path, MIXED, kind=["\x1b[31mred"] * 7)
    words = ["judge", a, b, "--judge", "openai:m", "--endpoint", server.url, "--output", str(tmp_path / "out")]
    found = CliRunner().invoke(cli.ple, [*words, "--request-arg", "temperature=0.5"])
    assert found.exit_code == 0, found.stderr
    assert "7 queries in both A and B" in found.stderr
    assert "\x1b" not in found.stdout
    assert "kind \\x1b[31mred" in found.stdout
    assert server.requests[0]["temperature"] == 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "either --judge SPEC or --human"),
        (["--judge", "openai:m", "--human"], "either --judge SPEC or --human"),
        (["--judge", "openai:m", "--read", "x.json"], "--read: not heeded without --human"),
        (["--human", "--concurrency", "2", "--join", "pair"], "--join, --concurrency: not heeded with --human"),
        (["--human", "--read", "x.json", "--seed", "1"], "--seed: not heeded with --read"),
        (["--judge", "reward:r", "--concurrency", "2"], "--concurrency: not heeded by a reward model"),
        (["--judge", "openai:m", "--batch-tokens", "2"], "--batch-tokens: not heeded by a language model"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, words, message):
    found = CliRunner().invoke(cli.ple, ["judge", "a", "b", "--output", str(tmp_path / "out"), *words])
    assert found.exit_code == 2
    assert message in found.stderr
