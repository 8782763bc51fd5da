"""ple judge against a real OpenAI-compatible server: vLLM on CPU with a tiny random chat model.

Its answers are noise, so most hold no verdict: what is tested is the wire format, the count of what cannot be parsed,
token counts against the model's own tokenizer, resume, and refusals as vLLM words them.
"""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from ple_data.common import llm
from ple_data.common.models import load_tokenizer
from ple_data.judge.prompt import load_template
from schemas import tables
from schemas.errors import UsageError
from schemas.records import read_record
from schemas.reports import JudgeReport
from tests.judgeserver import judge
from tests.vllmserver import VllmServer

pytestmark = [pytest.mark.vllm, pytest.mark.long]
SHORT = {"max_completion_tokens": 24, "temperature": 1.0}
QUERIES = 6


@pytest.fixture(scope="module")
def endpoint(vllm_python: str, chat_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that is up; it and its workers end with the module."""
    log = tmp_path_factory.mktemp("vllm") / "log"
    server = VllmServer(vllm_python, log, "--model", str(chat_policy), "--served-model-name", "tiny")
    try:
        server.start()
        server.wait()
        yield f"{server.address}/v1"
    finally:
        server.kill(signal.SIGTERM)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "OPENAI_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(llm, "FIRST_WAIT", 0.1)
    for side in ("a", "b"):
        rows = [{"id": f"q{n}", "x": f"The film {n}", "y": f"was {side} {n}."} for n in range(QUERIES)]
        (tmp_path / f"{side}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")


def test_random_answers_are_counted_and_paid_for_once(endpoint, sources, tmp_path, chat_policy):
    out = tmp_path / "out"
    judge(*sources, "openai:tiny", out, endpoint=endpoint, request_args=SHORT)
    report = read_record(JudgeReport, out / "judge.json")
    assert report.wins + report.ties + report.losses + report.unparsed == QUERIES
    assert report.unparsed >= QUERIES - 1, "a random model that writes [[1]] twice"
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 2 * QUERIES
    assert {answer["finish"] for answer in answers} <= {"length", "stop"}
    tokenizer = load_tokenizer(chat_policy, note=lambda _: None)
    prompts = 0
    for row in tables.read_table(out / "verdicts.parquet", "verdicts").to_pylist():
        for first, second in ((row["a"], row["b"]), (row["b"], row["a"])):
            turns = [{"role": "user", "content": load_template().render(row["x"], first, second)}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            prompts += len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert report.prompt_tokens == prompts
    assert report.completion_tokens == sum(answer["completion_tokens"] for answer in answers)
    assert 2 * QUERIES <= report.completion_tokens <= 24 * 2 * QUERIES
    before = (out / "answers.jsonl").read_bytes()
    judge(*sources, "openai:tiny", out, endpoint=endpoint, request_args=SHORT)
    assert (out / "answers.jsonl").read_bytes() == before


def test_a_forced_choice_gives_verdicts(endpoint, sources, tmp_path):
    """vLLM's structured output makes the tiny model choose one of three answers: real verdicts from a real server."""
    choose = {"structured_outputs": {"choice": ["[[1]]", "[[2]]", "[[tie]]"]}}
    judge(*sources, "openai:tiny", tmp_path / "out", endpoint=endpoint, request_args={**SHORT, **choose})
    report = read_record(JudgeReport, tmp_path / "out" / "judge.json")
    assert report.unparsed == 0
    assert report.wins + report.ties + report.losses == QUERIES
    assert report.win_rate is not None
    for row in tables.read_table(tmp_path / "out" / "verdicts.parquet", "verdicts").to_pylist():
        sides = {"a_first": {"[[1]]": "a", "[[2]]": "b"}, "b_first": {"[[1]]": "b", "[[2]]": "a"}}
        assert all(row[order] == sides[order].get(row[f"{order}_answer"], "tie") for order in sides)


def test_an_unknown_model_and_a_refused_field_are_said(endpoint, sources, tmp_path):
    with pytest.raises(UsageError, match=r"status 404 .*other.*check the key, the model's name and the address"):
        judge(*sources, "openai:other", tmp_path / "one", endpoint=endpoint, request_args=SHORT)
    with pytest.raises(UsageError, match=r"status 400 .*none of \d+ requests was answered"):
        judge(*sources, "openai:tiny", tmp_path / "two", endpoint=endpoint, request_args={**SHORT, "temperature": -1})


def test_a_query_too_long_for_the_judge_is_counted(endpoint, sources, tmp_path, capsys):
    """2,048 positions: the first query's response fills them. Both orders are refused for one reason, told once."""
    rows = [json.loads(line) for line in Path(sources[0]).read_text().splitlines()]
    rows[0]["y"] = "was long " * 2000
    Path(sources[0]).write_text("\n".join(map(json.dumps, rows)))
    judge(*sources, "openai:tiny", tmp_path / "out", endpoint=endpoint, request_args=SHORT)
    assert capsys.readouterr().err.count("no verdict: query 'q0': judge openai:tiny") == 1
    [first, *_] = tables.read_table(tmp_path / "out" / "verdicts.parquet", "verdicts").to_pylist()
    assert (first["verdict"], first["a_first_answer"], first["b_first_answer"]) == ("unparsed", None, None)
