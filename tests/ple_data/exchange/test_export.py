"""`ple export`: what each format holds, that TRL takes it, ties and counts, whole files or none."""

import json
from pathlib import Path

import polars as pl
import pytest

from ple_data.exchange.export import export
from ple_data.storage.store import Store
from schemas.errors import DamagedError, UsageError
from tests.tables import table

CHAT = json.dumps([{"role": "user", "content": "Which film?"}])
ROWS = [
    {"query_id": "a", "x": "The film", "y": " was bad.", "y_prompt": " was great.", "s": -1.0, "s_prompt": 2.0},
    {"query_id": "b", "x": "A story", "y": " is long.", "y_prompt": " is sad.", "s": 0.5, "s_prompt": 0.25},
    {"query_id": "c", "x": "My friend", "y": " ran.", "y_prompt": " sat.", "s": 1.0, "s_prompt": 1.0},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for unit, rows in enumerate([ROWS[:2], ROWS[2:]]):
        Store(tmp_path / "data").commit("pairs", 0, f"{unit:05d}-0", table("pairs", rows), {})
    later = table("pairs", [ROWS[0] | {"y": " was odd.", "s": 3.0, "policy": "later@1"}], 1)
    Store(tmp_path / "data").commit("pairs", 1, "00000-1", later, {})
    return tmp_path / "data"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_preferences_by_reward_without_ties(data, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    export(data, format="trl-preference", output=str(output))
    columns = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")
    expected = [
        ("The film", " was great.", " was bad.", 2.0, -1.0),
        ("A story", " is long.", " is sad.", 0.5, 0.25),
        ("The film", " was odd.", " was great.", 3.0, 2.0),
    ]
    assert lines(output) == [dict(zip(columns, row, strict=True)) for row in expected]
    said = capsys.readouterr()
    assert said.err == f"export: 3 rows to {output}, from 4 pairs of 2 rounds; 1 pairs with equal rewards left out\n"
    assert said.out == ""


def test_kto_has_both_responses_of_each_preference(data, tmp_path, capsys):
    export(data, format="trl-kto", output=str(tmp_path / "kto.jsonl"), round=0)
    assert [(row["prompt"], row["completion"], row["label"]) for row in lines(tmp_path / "kto.jsonl")] == [
        ("The film", " was great.", True),
        ("The film", " was bad.", False),
        ("A story", " is long.", True),
        ("A story", " is sad.", False),
    ]
    assert "4 rows to" in (said := capsys.readouterr().err)
    assert "from 3 pairs of 1 round; 1 pairs with equal rewards left out" in said


def test_distilabel_and_argilla_have_a_row_a_pair(data, tmp_path):
    export(data, format="distilabel", output=str(tmp_path / "d.jsonl"), round=0)
    assert lines(tmp_path / "d.jsonl")[0] == {
        "instruction": "The film",
        "messages": None,
        "generations": [" was bad.", " was great."],
        "ratings": [-1.0, 2.0],
        "generation_models": ["tiny@0123456789ab"] * 2,
    }
    export(data, format="argilla", output=str(tmp_path / "a.jsonl"), round=0)
    found = lines(tmp_path / "a.jsonl")
    assert [row["preference"] for row in found] == ["response_2", "response_1", None]
    assert found[0] == {
        "id": "0/a/0",
        "instruction": "The film",
        "response_1": " was bad.",
        "response_2": " was great.",
        "preference": "response_2",
        "reward_1": -1.0,
        "reward_2": 2.0,
        "round": 0,
        "policy": "tiny@0123456789ab",
    }


def test_sft_and_messages_are_the_best_response_of_each_query_and_round(data, tmp_path):
    best = [("The film", " was great."), ("A story", " is long."), ("My friend", " ran.")]
    export(data, format="sft", output=str(tmp_path / "sft.jsonl"), round=0)
    assert lines(tmp_path / "sft.jsonl") == [{"prompt": x, "completion": y} for x, y in best]
    export(data, format="messages", output=str(tmp_path / "messages.jsonl"), round=0)
    expected = [
        {"messages": [{"role": "user", "content": x}, {"role": "assistant", "content": y.strip()}]} for x, y in best
    ]
    assert lines(tmp_path / "messages.jsonl") == expected


@pytest.mark.parametrize("format", ["sft", "messages"])
def test_the_best_of_a_query_is_that_of_all_shards(tmp_path, format):
    samples = [ROWS[0] | {"sample": 0}, ROWS[0] | {"sample": 1, "y": " was best.", "s": 9.0}, ROWS[0] | {"sample": 2}]
    for unit, row in enumerate(samples):
        Store(tmp_path / "data").commit("pairs", 0, f"{unit:05d}-0", table("pairs", [row]), {})
    export(tmp_path / "data", format=format, output=str(tmp_path / "out.jsonl"))
    (row,) = lines(tmp_path / "out.jsonl")
    assert "was best." in json.dumps(row)


@pytest.mark.parametrize(
    ("format", "rows"),
    [
        ("argilla", [ROWS[2], ROWS[0]]),
        ("distilabel", [ROWS[0], ROWS[0] | {"query_id": "chat", "x": CHAT}]),
        ("distilabel", [ROWS[0] | {"query_id": "chat", "x": CHAT}, ROWS[0]]),
    ],
    ids=["ties first", "text first", "chat first"],
)
def test_what_is_null_in_all_of_the_first_rows_may_come_later(tmp_path, format, rows):
    for unit, row in enumerate(rows):
        Store(tmp_path / "data").commit("pairs", 0, f"{unit:05d}-0", table("pairs", [row]), {})
    for name in ("out.jsonl", "out.parquet"):
        export(tmp_path / "data", format=format, output=str(tmp_path / name))
    assert pl.read_parquet(tmp_path / "out.parquet").to_dicts() == lines(tmp_path / "out.jsonl")


@pytest.mark.parametrize("format", ["trl-preference", "trl-kto", "distilabel", "argilla", "sft", "messages"])
def test_parquet_holds_the_same_rows(data, tmp_path, format):
    export(data, format=format, output=str(tmp_path / "out.jsonl"))
    export(data, format=format, output=str(tmp_path / "out.parquet"))
    assert pl.read_parquet(tmp_path / "out.parquet").to_dicts() == lines(tmp_path / "out.jsonl")


def test_stored_chats_become_messages(tmp_path):
    rows = [{"query_id": "a", "x": CHAT, "y": "This one.", "y_prompt": "That one."}]
    Store(tmp_path / "chats").commit("pairs", 0, "00000-0", table("pairs", rows), {})
    export(tmp_path / "chats", format="trl-preference", output=str(tmp_path / "out.jsonl"))
    (row,) = lines(tmp_path / "out.jsonl")
    assert row["prompt"] == json.loads(CHAT)
    assert row["chosen"] == [{"role": "assistant", "content": "That one."}]
    export(tmp_path / "chats", format="sft", output=str(tmp_path / "sft.jsonl"))
    assert lines(tmp_path / "sft.jsonl")[0]["completion"] == [{"role": "assistant", "content": "That one."}]
    export(tmp_path / "chats", format="alpacaeval", output=str(tmp_path / "out.json"))
    assert json.loads((tmp_path / "out.json").read_text())[0]["instruction"] == "Which film?"


def test_text_and_chats_do_not_fit_one_parquet_column(data, tmp_path):
    chat = table("pairs", [{"query_id": "chat", "x": CHAT}], 2)
    Store(data).commit("pairs", 2, "00000-2", chat, {})
    with pytest.raises(UsageError, match=r"write to a \.jsonl file"):
        export(data, format="sft", output=str(tmp_path / "out.parquet"))
    assert not list(tmp_path.glob("*out.parquet*"))


def test_alpacaeval_takes_plain_responses_of_the_newest_round_answers_first(data, tmp_path):
    export(data, format="alpacaeval", output=str(tmp_path / "out.json"))
    expected = [{"instruction": "The film", "output": " was odd.", "generator": "later@1"}]
    assert json.loads((tmp_path / "out.json").read_text()) == expected
    answers = [{"sample": n, "y": f"answer {n}", "x": "Why?"} for n in (0, 1)]
    Store(data).commit("answers", 0, "00000-a", table("answers", answers), {})
    export(data, format="alpacaeval", output=str(tmp_path / "out.json"))
    expected = [{"instruction": "Why?", "output": "answer 0", "generator": "tiny@0123456789ab"}]
    assert json.loads((tmp_path / "out.json").read_text()) == expected


def test_alpacaeval_takes_the_newest_round_scored_or_not(data, tmp_path):
    """Round 2 is scored in its first unit only; the rows of the second one are responses still."""
    rows = [{"x": f"Why {n}?", "y": f"reason {n}"} for n in (0, 1)]
    for unit, row in enumerate(rows):
        Store(data).commit("responses", 2, f"{unit:05d}-2", table("responses", [row], 2), {})
    Store(data).commit("pairs", 2, "00000-2", table("pairs", rows[:1], 2), {})
    export(data, format="alpacaeval", output=str(tmp_path / "out.json"))
    found = json.loads((tmp_path / "out.json").read_text())
    assert [(row["instruction"], row["output"]) for row in found] == [("Why 0?", "reason 0"), ("Why 1?", "reason 1")]


@pytest.mark.parametrize(
    ("format", "rows", "why"),
    [
        ("trl-preference", ROWS[2:], "all pairs have equal rewards"),
        ("alpacaeval", [ROWS[0] | {"sample": 1}], "there is no first sample of a query"),
        ("trl-preference", [], "its shards hold none"),
        ("sft", [], "its shards hold none"),
    ],
)
def test_nothing_to_write_says_why(tmp_path, format, rows, why):
    Store(tmp_path / "data").commit("pairs", 0, "00000-0", table("pairs", rows), {})
    output = tmp_path / ("out.json" if format == "alpacaeval" else "out.jsonl")
    with pytest.raises(UsageError, match=f"no row to write, as {why}"):
        export(tmp_path / "data", format=format, output=str(output))
    assert not output.exists()


def test_stdout_carries_the_rows_and_nothing_else(data, run_ple):
    found = run_ple("export", data, "--format", "sft", "--round", "1", "--output", "-")
    assert found.returncode == 0, found.stderr
    assert [json.loads(line) for line in found.stdout.splitlines()] == [
        {"prompt": "The film", "completion": " was odd."}
    ]
    assert "1 rows to stdout, from 1 pairs of 1 round" in found.stderr


def test_odd_text_comes_back_as_it_was(tmp_path):
    odd = 'quote " newline \n tab \t <script>\u2028 é 漢 \ud83d\ude00'.encode("utf-16", "surrogatepass").decode(
        "utf-16"
    )
    Store(tmp_path / "odd").commit("pairs", 0, "00000-0", table("pairs", [{"x": odd, "y_prompt": odd}]), {})
    export(tmp_path / "odd", format="sft", output=str(tmp_path / "out.jsonl"))
    text = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    assert text.count("\n") == 1
    assert json.loads(text) == {"prompt": odd, "completion": odd}


def test_what_cannot_be_written_is_refused(data, tmp_path):
    for format, name, message in (
        ("sft", "out.csv", r"ends with .jsonl or .parquet, or to -"),
        ("alpacaeval", "out.jsonl", r"ends with .json, or to -"),
    ):
        with pytest.raises(UsageError, match=message):
            export(data, format=format, output=str(tmp_path / name))
    with pytest.raises(UsageError, match="has no pairs of round 9"):
        export(data, format="sft", output=str(tmp_path / "out.jsonl"), round=9)
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="has no answers or pairs or responses"):
        export(tmp_path / "none", format="alpacaeval", output="-")


def test_a_damaged_shard_leaves_the_older_file_as_it_was(data, tmp_path):
    output = tmp_path / "out.jsonl"
    export(data, format="sft", output=str(output))
    before = output.read_bytes()
    (last,) = Store(data).shards("pairs", round=1)
    last.path.write_bytes(b"x" * last.bytes)
    with pytest.raises(DamagedError):
        export(data, format="sft", output=str(output))
    assert output.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out.jsonl"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_trl_trains_on_the_preferences_as_they_stand(data, policy, tmp_path, suffix):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    path = tmp_path / f"out.{suffix}"
    export(data, format="trl-preference", output=str(path))
    read = Dataset.from_json if suffix == "jsonl" else Dataset.from_parquet
    rows = read(str(path), cache_dir=str(tmp_path / "cache"))
    quiet = {"report_to": "none", "save_strategy": "no", "bf16": False, "gradient_checkpointing": False}
    quiet |= {"disable_tqdm": True, "dataloader_pin_memory": False}
    config = DPOConfig(output_dir=str(tmp_path / "trl"), max_steps=1, **quiet)
    model = AutoModelForCausalLM.from_pretrained(policy)
    trainer = DPOTrainer(model, args=config, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(policy))
    assert trainer.train().training_loss == pytest.approx(0.6931, abs=1e-3)


def test_trl_trains_kto_on_the_rows_as_they_stand(data, policy, tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import KTOConfig, KTOTrainer

    export(data, format="trl-kto", output=str(tmp_path / "out.parquet"))
    rows = Dataset.from_parquet(str(tmp_path / "out.parquet"), cache_dir=str(tmp_path / "cache"))
    quiet = {"report_to": "none", "save_strategy": "no", "bf16": False, "gradient_checkpointing": False}
    quiet |= {"disable_tqdm": True, "dataloader_pin_memory": False, "per_device_train_batch_size": 2}
    config = KTOConfig(output_dir=str(tmp_path / "trl"), max_steps=1, **quiet)
    model = AutoModelForCausalLM.from_pretrained(policy)
    trainer = KTOTrainer(model, args=config, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(policy))
    assert trainer.train().training_loss == pytest.approx(0.5, abs=1e-3)
