"""Thoughts: which marks there are, what is the answer, and a model that was taught to think, from gen to eval."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from ple_data.common.models import load_tokenizer
from ple_data.exchange.export import export
from ple_data.inspection import inspect
from ple_data.judge.sources import load_responses
from ple_data.rewards import load_reward_model
from ple_data.sampling.generate import generate
from ple_data.sampling.thoughts import Thoughts, Told
from ple_data.scoring.score import score
from ple_data.storage.store import Store
from ple_train.baselines.responses import baseline
from ple_train.measure.evaluate import evaluate
from ple_train.sft import sft
from schemas.errors import UsageError
from schemas.options import ContextDistillation, Evaluate, Gen, Sft
from schemas.tables import read_table
from tests import tiny

SPECIAL = ("<|turn|>", "<|over|>", "[THINK]", "[/THINK]")
OPENS = tiny.TURNS + "{% if add_generation_prompt %}<think>\n{% endif %}{# </think> #}"


def apart(tokenizer: Any, asked: str, prompt: str, response: str) -> Told:
    ids = tokenizer(response, add_special_tokens=False).input_ids
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return Thoughts(tokenizer, asked).of(tokenizer(prompt).input_ids, ids, text)


BOTH = pytest.mark.parametrize(
    ("asked", "open", "close"), [("think", "<think>", "</think>"), ("auto", "[THINK]", "[/THINK]")]
)
"""Marks that are text, and marks that are special tokens, which no text holds."""


@BOTH
@pytest.mark.parametrize("make", [tiny.tiny_tokenizer, tiny.spm_tokenizer])
def test_a_response_in_two(make: Any, asked: str, open: str, close: str) -> None:
    tokenizer = make(special=SPECIAL)

    def told(prompt: str, response: str) -> Told:
        return apart(tokenizer, asked, prompt, response)

    assert told("the film", f"{open}so so{close}\n\nthe answer") == Told("the answer", "so so", True)
    assert told("the film", f"\n{open}\nso so\n{close}the answer") == Told("the answer", "so so", True)
    assert told(f"the film{open}\n", f"so so{close}the answer") == Told("the answer", "so so", True)
    assert told(f"the film{open}", f"{open}so so{close} the answer") == Told("the answer", "so so", True)
    assert told("the film", f"{open}so so") == Told("", "so so", False)
    assert told(f"the film{open}\n", "so so") == Told("", "so so", False)
    assert told(f"the film{open}\n", "") == Told("", "", False)
    assert told("the film", f"{open}{close}") == Told("", "", True)
    assert told(f"the film{open}{close}\n", "the answer") == Told("the answer", None, True)
    assert told("the film", "the answer") == Told("the answer", None, True)
    kept = told("the film", f"the answer {open}so{close}")
    assert (kept.thought, kept.answered, kept.answer.startswith("the answer")) == (None, True, True)


@BOTH
def test_marks_that_are_missing_or_stand_twice(asked: str, open: str, close: str) -> None:
    tokenizer = tiny.tiny_tokenizer(special=SPECIAL)

    def told(prompt: str, response: str) -> Told:
        return apart(tokenizer, asked, prompt, response)

    assert told("the film", f"so so{close}the answer") == Told("the answer", "so so", True)
    assert told("the film", f"{close}the answer") == Told("the answer", "", True)
    assert told("the film", f"so{close}the answer{open}") == Told(
        told("the film", f"{open}so{close}the answer{open}").answer, "so", True
    )
    nested = told("the film", f"{open}so{open}so{close}the answer{close}")
    assert (nested.thought or "").startswith("so")
    assert nested.answer.startswith("the answer")  # the first closing mark ends the thought


@pytest.mark.parametrize("begun", [True, False])
def test_special_marks_that_were_sampled_in_pieces(begun: bool) -> None:
    tokenizer = tiny.tiny_tokenizer(special=SPECIAL)
    prompt, first = ("the film[THINK]\n", "") if begun else ("the film", "[THINK]")
    ids = [id for piece in (*first, *"so so", *"[/THINK]", "the answer") for id in tokenizer(piece).input_ids]
    assert not {tokenizer.convert_tokens_to_ids(mark) for mark in SPECIAL} & set(ids)
    found = Thoughts(tokenizer, "auto").of(tokenizer(prompt).input_ids, ids, tokenizer.decode(ids))
    assert found == Told("the answer", "so so", True)


def test_marks_of_several_tokens_of_which_some_are_special() -> None:
    tokenizer = tiny.tiny_tokenizer(special=("<|channel|>", "<|message|>"))
    marks = "<|channel|>analysis<|message|> <|channel|>final<|message|>"
    response = "<|channel|>analysis<|message|>so so<|channel|>final<|message|>the answer"
    assert apart(tokenizer, marks, "the film", response) == Told("the answer", "so so", True)


@pytest.mark.parametrize(
    ("template", "special", "asked", "marks"),
    [
        (OPENS, (), "auto", ("<think>", "</think>")),
        ("{{ m.split('</seed:think>')[-1] }}", (), "auto", ("<seed:think>", "</seed:think>")),
        (tiny.TURNS, ("<thought>", "</thought>"), "auto", ("<thought>", "</thought>")),
        (False, (), "plan", ("<plan>", "</plan>")),
        (False, (), "(( ))", ("((", "))")),
    ],
)
def test_which_marks(template: Any, special: tuple[str, ...], asked: str, marks: tuple[str, str]) -> None:
    assert Thoughts(tiny.tiny_tokenizer(chat=template, special=special), asked).marks == marks


@pytest.mark.parametrize(
    ("template", "asked", "message"),
    [
        (tiny.TURNS, "auto", "--strip-thoughts auto: .* have no mark of thoughts; name them"),
        (OPENS + "</reasoning>", "auto", r"several marks of thoughts \(</think>, </reasoning>\); name them"),
        (False, "auto", "no mark of thoughts"),
        (False, "a b c", "give auto, a name such as think, or both marks"),
        (False, "", "give auto, a name such as think, or both marks"),
    ],
)
def test_marks_that_there_are_not(template: Any, asked: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Thoughts(tiny.tiny_tokenizer(chat=template), asked)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that was taught to end its thought on some queries and to go on thinking on others."""
    place = tmp_path_factory.mktemp("thinker")
    base = tiny.policy_of(place / "base", tiny.tiny_tokenizer(chat=OPENS, special=SPECIAL[:2]))
    rows = [
        {"messages": [{"role": "user", "content": f"film {n}"}], "y": "so so</think>\n\ngood" if n % 2 else "so so so"}
        for n in range(8)
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = {"full": True, "epochs": 60, "batch_size": 8, "learning_rate": 5e-3}
    sft(Sft(model=str(base), data=place / "rows.jsonl", output=place / "taught", **how))
    return place / "taught"


def judge(xs: list[str], ys: list[str]) -> list[float]:
    assert set(ys) <= {"good", ""}
    return [float(len(y)) for y in ys]


@pytest.fixture(scope="module")
def data(thinker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("data")
    (place / "q.jsonl").write_text("".join(json.dumps({"id": f"q{n}", "x": f"film {n}"}) + "\n" for n in range(8)))
    ask(thinker, place)
    score(Store(place / "data"), load_reward_model(f"{Path(__file__)}:judge"))
    return place


def ask(thinker: Path, place: Path, data: str = "data", **more: Any) -> Any:
    how = {"principles": "none", "round": 0, "max_new_tokens": 40, "engine": "hf", "temperature": 0.0, "unit_size": 4}
    how |= {"strip_thoughts": "auto"} | more
    return generate(Gen(model=str(thinker), queries=str(place / "q.jsonl"), data=place / data, **how))


def pairs(place: Path, data: str = "data") -> list[dict[str, Any]]:
    return Store(place / data).scan("pairs").collect().sort("query_id").to_dicts()


def test_the_reward_sees_the_answer_and_the_ids_are_whole(data: Path, thinker: Path) -> None:
    tokenizer = load_tokenizer(thinker)
    for n, row in enumerate(pairs(data)):
        assert (row["y"], row["y_answered"], row["s"]) == (("good", True, 4.0) if n % 2 else ("", False, 0.0))
        assert row["y_thought"].startswith("so so")
        assert row["y_empty"] == (n % 2 == 0)
        assert tokenizer.decode(row["y_ids"]).startswith("so so")
        assert ("</think>" in tokenizer.decode(row["y_ids"])) == (n % 2 == 1)
        assert len(row["y_logps"]) == len(row["y_ids"])


def test_training_takes_all_ids(data: Path, thinker: Path, tmp_path: Path) -> None:
    how = {"model": str(thinker), "data": [data / "data"], "round": 0, "output": tmp_path / "out"}
    baseline("context-distillation", ContextDistillation(**how))
    trained = pl.read_parquet(tmp_path / "out" / "metrics.parquet")["trained_tokens"].sum()
    assert trained == sum(len(row["y_prompt_ids"]) for row in pairs(data)) > 8 * len("so so")


def test_answers_that_never_came_are_counted(data: Path, thinker: Path, capsys: Any) -> None:
    assert ask(thinker, data, "counted").unanswered == 8
    said = capsys.readouterr().err
    assert "8 thoughts without an end (no answer came)" in said
    assert "Thoughts without an end, so no answer: round 0: 4 y and 4 y_prompt of 8" in inspect(data / "data")
    found = json.loads(inspect(data / "data", as_json=True))
    assert found["unanswered"] == [{"round": 0, "rows": 8, "y": 4, "y_prompt": 4}]


def test_export_and_judge_have_the_answer(data: Path, tmp_path: Path, capsys: Any) -> None:
    export(data / "data", format="sft", output=str(tmp_path / "out.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["completion"] for row in rows} == {"good"}
    assert len(rows) == 4
    assert "; 8 responses whose thought never ended left out" in capsys.readouterr().err
    for format in ("argilla", "distilabel"):
        export(data / "data", format=format, output=str(tmp_path / f"{format}.jsonl"))
        assert len((tmp_path / f"{format}.jsonl").read_text().splitlines()) == 4
        assert "from 8 pairs of 1 round; 4 pairs in which a thought never ended left out" in capsys.readouterr().err
    with pytest.raises(UsageError, match="all pairs have equal rewards or a thought that never ended"):
        export(data / "data", format="trl-preference", output=str(tmp_path / "pairs.jsonl"))
    assert {response.y for response in load_responses(str(data / "data"))} == {"good", ""}


def test_the_marks_are_a_setting_of_the_round(data: Path, thinker: Path) -> None:
    assert ask(thinker, data, strip_thoughts="think").rows_done_before == 8  # auto found the same
    with pytest.raises(UsageError, match=r"strip_thoughts: None, there \['<think>', '</think>'\]"):
        ask(thinker, data, strip_thoughts=None)
    whole = ask(thinker, data, "whole", strip_thoughts=None)
    assert (whole.unanswered, whole.rows_sampled) == (0, 8)
    rows = Store(data / "whole").scan("responses").collect()
    files = pl.read_parquet(data / "whole" / "responses" / "**" / "*.parquet", hive_partitioning=False)
    assert not {"y_thought", "y_answered"} & set(files.columns)  # files are as they were
    assert rows["y"].str.starts_with("so so").all()
    assert rows.select("y_thought", "y_answered").null_count().row(0) == (8, 8)
    assert ask(thinker, data, "again", reuse=[data / "data"]).rows_reused == 8
    assert ask(thinker, data, "others", reuse=[data / "whole"]).rows_reused == 0


def test_an_evaluation_measures_answers(data: Path, thinker: Path, tmp_path: Path) -> None:
    how = {"max_new_tokens": 40, "engine": "hf", "temperature": 0.0, "strip_thoughts": "think"}
    spec = f"{Path(__file__)}:judge"
    asked = {"policy": [f"it={thinker}"], "queries": str(data / "q.jsonl"), "output": tmp_path, "reward_model": [spec]}
    report = evaluate(Evaluate(**asked, **how))
    rows = read_table(tmp_path / "eval.parquet", "evaluation").to_pylist()
    assert {row["y"] for row in rows} == {"good", ""}
    assert min(row["tokens"] for row in rows) > 1
    assert report.settings["strip_thoughts"] == "think"
