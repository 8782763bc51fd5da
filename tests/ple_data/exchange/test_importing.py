"""`ple import`: what each form of rows becomes, that the round trip keeps every pair, faults by row, kills."""

import json
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner

import cli
from ple_data.exchange.export import export
from ple_data.exchange.importing import import_pairs
from ple_data.exchange.preferences import to_pairs
from ple_data.sampling.generate import generate
from ple_data.storage.store import Store
from ple_data.storage.verify import verify
from schemas.errors import UsageError
from schemas.options import Gen, Import
from tests.tables import table

USER = {"role": "user", "content": "Which film?"}
ANSWER = {"role": "assistant", "content": "This one."}
OTHER = {"role": "assistant", "content": "None."}
ROWS = [
    {"prompt": "The film", "chosen": " was great.", "rejected": " was bad.", "score_chosen": 2.0, "score_rejected": -1},
    {"prompt": "The film", "chosen": " was odd.", "rejected": " was it.", "score_chosen": 0.5, "score_rejected": 0.25},
    {"prompt": "A story", "chosen": " is sad.", "rejected": "", "score_chosen": 0.0, "score_rejected": 1.0},
]


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pl.DataFrame(rows).write_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def taken(data: Path, *files: Path, model: Path, **more) -> pl.DataFrame:
    import_pairs(Import(files=list(map(str, files)), data=data, model=str(model), **more))
    kind = "pairs" if Store(data).shards("pairs") else "responses"
    return Store(data).scan(kind).collect()


def problems(data: Path) -> list[str]:
    return [str(problem) for problem in verify(Store(data)) if problem.severity == "error"]


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        (ROWS[0], ("The film", " was bad.", " was great.", -1.0, 2.0)),
        ({"prompt": "Q", "chosen": "a", "rejected": "b"}, ("Q", "b", "a", None, None)),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}, ([USER], "None.", "This one.", None, None)),
        ({"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, ([USER], "None.", "This one.", None, None)),
        (  # as UltraFeedback binarized has it: the prompt as text, and the whole dialogue on both sides
            {
                "prompt": "Which film?",
                "chosen": [USER, ANSWER],
                "rejected": [USER, OTHER],
                "score_chosen": 8,
                "score_rejected": 4.5,
            },
            ([USER], "None.", "This one.", 4.5, 8.0),
        ),
        (  # distilabel's
            {"prompt": "Q", "chosen": [ANSWER], "rejected": [OTHER], "chosen_rating": 5, "rejected_rating": 1},
            ("Q", "None.", "This one.", 1.0, 5.0),
        ),
        (  # HH
            {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
            ("\n\nHuman: Hi\n\nAssistant:", " No", " Hello", None, None),
        ),
        (  # Online-RLHF: the best of all and the worst
            {"prompt": [USER], "responses": ["a", "b", "c"], "rewards": [0.5, 2, -3]},
            ([USER], "c", "b", -3.0, 2.0),
        ),
        ({"prompt": "Q", "responses": ["a", "b"], "rewards": [1, 1]}, ("Q", "b", "a", 1.0, 1.0)),
        ({"instruction": "Q", "generations": ["a", "b"], "ratings": [1.0, 4.0]}, ("Q", "a", "b", 1.0, 4.0)),
    ],
)
def test_each_form_of_a_row(row, pair):
    assert to_pairs(row) == [pair]


def test_responses_without_rewards_pair_up_as_neighbours():
    found = to_pairs({"prompt": "Q", "responses": ["a", "b", "c", "d"]})
    assert [(y, y_prompt) for _, y, y_prompt, *_ in found] == [("a", "b"), ("c", "d")]
    chat = to_pairs(
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Yo", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}, chat=True
    )
    assert chat == [([{"role": "user", "content": "Hi"}], "No", "Yo", None, None)]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"text": "a"}, "it has neither chosen and rejected nor prompt and responses, but text"),
        ({"prompt": "Q", "chosen": "a"}, "chosen and rejected must be two texts, or two lists of messages"),
        ({"prompt": "Q", "chosen": "a", "rejected": [OTHER]}, "must be two texts, or two lists"),
        (
            {"prompt": " ", "chosen": "a", "rejected": "b"},
            "the prompt must be a text, or messages that end with a user",
        ),
        ({"prompt": [ANSWER], "chosen": "a", "rejected": "b"}, "the prompt must be a text, or messages that end"),
        ({"chosen": "a", "rejected": "b"}, "without a prompt, chosen must be messages or a dialogue"),
        ({"chosen": [USER, ANSWER], "rejected": [ANSWER, OTHER]}, "do not answer the same turns"),
        ({"chosen": [USER], "rejected": [USER]}, "must end with an assistant turn"),
        (
            {"prompt": [ANSWER, USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
            "other turns than prompt has",
        ),
        (ROWS[0] | {"score_chosen": None}, "score_chosen is missing"),
        (ROWS[0] | {"score_rejected": "2"}, "score_rejected is '2'; it must be a finite number"),
        (ROWS[0] | {"score_chosen": float("inf")}, "score_chosen is inf"),
        (ROWS[0] | {"score_chosen": 1e39}, r"score_chosen is 1e\+39"),
        (ROWS[0] | {"score_chosen": True}, "score_chosen is True"),
        (ROWS[0] | {"score_chosen": 10**400}, "score_chosen is 1000"),
        (ROWS[0] | {"images": ["a.png"]}, "it has images, and pairs are text alone, without tools or images"),
        (
            {"prompt": "Q", "chosen": [ANSWER | {"content": "", "tool_calls": [{"id": "1"}]}], "rejected": "b"},
            "tool_calls",
        ),
        (
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER | {"tool_calls": [{"id": "1"}]}]},
            "it has tool_calls",
        ),
        ({"prompt": [USER | {"images": ["a"]}], "chosen": "a", "rejected": "b"}, "it has images"),
        ({"prompt": "Q", "responses": ["a"]}, "responses must be a list of two texts or more"),
        ({"prompt": "Q", "responses": ["a", "b", "c"]}, "become pairs, two and two: give an even number of them"),
        ({"prompt": "Q", "responses": ["a", "b"], "rewards": [1]}, "rewards must be a list with one number for each"),
    ],
)
def test_a_row_that_does_not_fit_is_named_and_nothing_is_written(row, why, policy, tmp_path):
    source = write(tmp_path / "rows.jsonl", [ROWS[0], row])
    with pytest.raises(
        UsageError, match=rf"rows\.jsonl line 2: .*{why}.*: correct or remove them; nothing was imported"
    ):
        taken(tmp_path / "data", source, model=policy)
    assert not (tmp_path / "data").exists()


HH = "\n\nHuman: Hi\n\nAssistant:"
GOING_ON = [
    {"chosen": f"{HH} yes\n\nHuman: more", "rejected": f"{HH} no"},
    {"chosen": f"{HH} yes", "rejected": f"{HH} no\n\nHuman: more\n\nAssistant: so"},
]


def test_dialogues_that_go_on_after_the_answer_are_left_out_and_counted(policy, tmp_path, capsys):
    said_nothing = {"chosen": f"{HH} yes\n\nHuman: ", "rejected": f"{HH} no"}
    source = write(tmp_path / "rows.jsonl", [*GOING_ON, said_nothing])
    found = taken(tmp_path / "data", source, model=policy)
    assert found.select("y", "y_prompt").rows() == [(" no", " yes")]
    assert "2 rows left out, whose dialogue goes on after the answer" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"alone\.jsonl: all 2 dialogues go on after the answer"):
        taken(tmp_path / "none", write(tmp_path / "alone.jsonl", GOING_ON), model=policy)


def test_rows_without_scores_among_others_and_many_faults_are_named(policy, tmp_path):
    bare = {name: ROWS[0][name] for name in ("prompt", "chosen", "rejected")}
    mixed = write(tmp_path / "mixed.jsonl", [ROWS[0], bare])
    with pytest.raises(UsageError, match=r"mixed\.jsonl line 2: it has no scores, and other rows have"):
        taken(tmp_path / "data", mixed, model=policy)
    many = write(tmp_path / "many.jsonl", [{"prompt": "x"}] * 12)
    with pytest.raises(UsageError, match=r"line 10: .*; and 2 more rows: correct"):
        taken(tmp_path / "data", many, model=policy)
    chats = write(tmp_path / "chats.jsonl", [{"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}])
    with pytest.raises(
        UsageError, match=r"chats\.jsonl line 1: its prompt is messages, and prompts are plain texts here"
    ):
        taken(tmp_path / "data", chats, model=policy)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_scored_rows_are_pairs_and_responses(suffix, policy, tmp_path, capsys):
    from transformers import AutoTokenizer

    data = tmp_path / "data"
    rows = [row | {"score_rejected": float(row["score_rejected"])} for row in ROWS]
    pairs = taken(data, write(tmp_path / f"rows.{suffix}", rows), model=policy, round=2)
    assert "of 1 the chosen response has the lower score" in capsys.readouterr().err
    columns = ["x", "y", "y_prompt", "s", "s_prompt", "sample", "round", "y_empty", "principle", "y_logps"]
    assert pairs.select(columns).rows() == [
        ("The film", " was bad.", " was great.", -1.0, 2.0, 0, 2, False, "", None),
        ("The film", " was it.", " was odd.", 0.25, 0.5, 1, 2, False, "", None),
        ("A story", "", " is sad.", 1.0, 0.0, 0, 2, True, "", None),
    ]
    tokenizer = AutoTokenizer.from_pretrained(policy)
    for row in pairs.iter_rows(named=True):
        assert row["x_ids"] == tokenizer(row["x"])["input_ids"]
        for arm in ("y", "y_prompt"):
            *ids, end = row[f"{arm}_ids"]
            assert (tokenizer.decode(ids), end) == (row[arm], tokenizer.eos_token_id)
    assert pairs["policy"].unique().to_list() == pairs["reward_model"].unique().to_list()
    assert pairs["policy"][0].startswith("imported@")
    assert Store(data).scan("responses").collect().height == 3
    assert problems(data) == []


def test_a_chat_model_gets_messages_and_texts_as_turns(chat_policy, tmp_path):
    rows = [{"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, {"prompt": "Why?", "chosen": "a", "rejected": "b"}]
    found = taken(tmp_path / "data", write(tmp_path / "rows.jsonl", rows), model=chat_policy)
    from ple_data.common.models import load_tokenizer
    from ple_data.inputs.principles import render

    assert found["x"].to_list() == [json.dumps([USER]), "Why?"]
    tokenizer = load_tokenizer(chat_policy)
    assert found["x_ids"].to_list() == [render(tokenizer, [USER]), render(tokenizer, "Why?")]
    assert Store(tmp_path / "data").shards("pairs") == []


def test_what_a_template_is_told_is_told_as_in_sampling(chat_policy, tmp_path):
    how = {"model": str(chat_policy), "system": "Be brave.", "chat_template_arg": ["bos_token=!"]}
    why = {"role": "user", "content": "Why?"}
    rows = [
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
        {"prompt": "Why?", "chosen": "a", "rejected": "b"},
    ]
    source, data = write(tmp_path / "rows.jsonl", rows), tmp_path / "data"
    found = taken(data, source, **how)
    queries = write(tmp_path / "queries.jsonl", [{"messages": [USER]}, {"messages": [why]}])
    sampling = {"queries": str(queries), "principles": "none", "round": 0, "max_new_tokens": 1, "engine": "hf"}
    generate(Gen(data=tmp_path / "sampled", **sampling, **how))
    assert found["x_ids"].to_list() == Store(tmp_path / "sampled").scan("responses").collect()["x_ids"].to_list()
    provenance = Store(data).provenance(Store(data).shards("responses")[0])
    assert (provenance["system"], provenance["chat_template_arg"]) == ("Be brave.", ['bos_token="!"'])
    with pytest.raises(UsageError, match=r"round 0 of .* was begun otherwise.*system: None, there 'Be brave.'"):
        taken(data, source, model=chat_policy)


def test_a_store_exported_and_imported_holds_the_same_pairs(policy, chat_policy, tmp_path):
    """By way of both forms that keep scores; ties, which prefer nothing, are left out by one of them."""
    plain = [
        {"query_id": "a", "x": "The film", "y": " was bad.", "y_prompt": " was great.", "s": -1.0, "s_prompt": 2.5},
        {"query_id": "b", "x": "A story", "y": "", "y_prompt": " is\n sad. é", "s": 0.5, "s_prompt": 0.75},
    ]
    chats = [row | {"x": json.dumps([{"role": "user", "content": row["x"]}])} for row in plain]
    for model, rows in ((policy, plain), (chat_policy, chats)):
        for format in ("trl-preference", "distilabel"):
            place = tmp_path / f"{model.name}-{format}"
            Store(place / "one").commit("pairs", 0, "00000-0", table("pairs", rows), {})
            for suffix in ("jsonl", "parquet"):
                file = place / f"rows.{suffix}"
                export(place / "one", format=format, output=str(file))
                found = taken(place / suffix, file, model=model)
                columns = ["x", "y", "y_prompt", "s", "s_prompt"]
                assert found.select(columns).to_dicts() == [{c: row[c] for c in columns} for row in rows]


def test_the_same_command_again_changes_nothing_and_another_is_refused(policy, tmp_path):
    source = write(tmp_path / "rows.jsonl", ROWS)
    taken(tmp_path / "data", source, model=policy)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*") if path.is_file()}
    source.rename(tmp_path / "moved.jsonl")
    taken(tmp_path / "data", tmp_path / "moved.jsonl", model=policy)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*") if path.is_file()} == before
    other = write(tmp_path / "other.jsonl", ROWS[:1])
    with pytest.raises(UsageError, match="two reward models are never mixed in one store"):
        taken(tmp_path / "data", other, model=policy, round=1)
    bare = write(tmp_path / "bare.jsonl", [{"prompt": "Q", "chosen": "a", "rejected": "b"}])
    with pytest.raises(UsageError, match=r"round 0 of .* was begun otherwise, by ple-gen, with other files"):
        taken(tmp_path / "data", bare, model=policy)


def test_killed_before_any_change_of_the_disk_the_same_command_goes_on(policy, tmp_path, forks):
    rows = [ROWS[0] | {"prompt": f"The film {n % 50}", "chosen": f" was {n}."} for n in range(140)]
    source = write(tmp_path / "rows.jsonl", rows)

    def started(data: Path, **more) -> int:
        words = ["import", str(source), str(data), "--model", str(policy)]
        code, _ = forks.run(words, log=tmp_path / "log", watch=str(data), **more)
        return code

    assert started(tmp_path / "whole") == 0
    changes = int((tmp_path / "log").read_text().split("changes ")[1])
    whole = Store(tmp_path / "whole").scan("pairs").collect()
    assert (whole.height, len(Store(tmp_path / "whole").shards("pairs"))) == (140, 3)
    data, kills = tmp_path / "data", 0
    for at in range(2, changes, max(1, changes // 9)):
        kills += started(data, kill_at=at) == -9
    assert kills >= 4
    assert started(data) == 0
    assert Store(data).scan("pairs").collect().equals(whole)
    assert Store(data).scan("responses").collect().height == 140
    assert problems(data) == []


def test_scores_of_one_name_share_a_store(policy, tmp_path):
    files = [write(tmp_path / f"{n}.jsonl", [row]) for n, row in enumerate(ROWS)]
    for round, file in enumerate(files):
        found = taken(tmp_path / "data", file, model=policy, round=round, scored_by="judge")
    assert found.select("round", "reward_model").rows() == [(0, "judge"), (1, "judge"), (2, "judge")]
    assert problems(tmp_path / "data") == []


def test_unscored_rows_are_scored_and_trained_on(policy, reward, tmp_path):
    rows = [{"prompt": f"The film {n}", "chosen": " was great.", "rejected": f" was bad {n}."} for n in range(5)]
    source, data = write(tmp_path / "rows.jsonl", rows), tmp_path / "data"
    for words in (
        ["import", source, data, "--model", policy],
        ["score", "--data", data, "--reward-model", reward],
        ["train", "--model", policy, "--data", data, "--round", 0, "--output", tmp_path / "adapter"],
        ["inspect", data],
        ["verify", data],
        ["report", data, "--output", tmp_path / "page.html"],
    ):
        found = CliRunner().invoke(cli.ple, list(map(str, words)))
        assert found.exit_code == 0, found.output
    assert Store(data).scan("pairs").collect()["y"].to_list() == [row["rejected"] for row in rows]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
