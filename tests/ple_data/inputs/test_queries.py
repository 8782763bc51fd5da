"""Queries: every source and reader, the filter with its counts, and errors that name the rows."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ple_data.inputs.chat import to_messages, to_text
from ple_data.inputs.principles import Form
from ple_data.inputs.queries import Query, load_queries
from ple_data.sampling.plan import Taken, default_unit_size
from schemas.errors import UsageError
from schemas.files import sha256_file
from schemas.options import Queries, Reading
from schemas.records import RoundManifest
from tests import tiny

HH = "\n\nHuman: What is rust?\n\nAssistant: A metal oxide.\n\nHuman: And how do I stop it?\n\nAssistant:"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as the format that the suffix names."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        pl.DataFrame(rows).write_csv(path)
    else:
        pl.DataFrame(rows).write_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_queries(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"id": "a", "x": 'One, two\n"three"?', "reference": "yes"},
        {"id": "b", "x": "été ☃ \u2028 end", "reference": "no"},
    ]
    found = load_queries(write(tmp_path / f"q{suffix}", rows))
    assert found.queries == [Query("a", rows[0]["x"], "yes"), Query("b", rows[1]["x"], "no")]
    assert len(found.digest) == 64


def test_json_lines_in_a_json_file_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    path.write_text('{"x": "one"}\n\n{"x": "two"}\n')
    assert [query.x for query in load_queries(path).queries] == ["one", "two"]


def test_column_is_x_then_prompt_then_what_is_asked_for(tmp_path: Path) -> None:
    rows = [{"id": "a", "x": "from x", "prompt": "from prompt", "post": "from post"}]
    path = write(tmp_path / "q.jsonl", rows)
    assert load_queries(path).queries[0].x == "from x"
    assert load_queries(path, Reading(query_column="post")).queries[0].x == "from post"
    path = write(tmp_path / "p.jsonl", [{"prompt": "from prompt", "post": "from post"}])
    assert load_queries(path).queries[0].x == "from prompt"


def test_a_hub_dataset_is_read_by_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, configuration: str | None, split: str) -> Any:
        asked.append((name, configuration, split))
        return datasets.Dataset.from_list([{"prompt": "hello"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = load_queries("owner/name:small", Reading(split="test"))
    assert asked == [("owner/name", "small", "test")]
    assert [query.x for query in found.queries] == ["hello"]
    load_queries("owner/name")
    assert asked[1] == ("owner/name", None, "train")


def test_messages_end_with_the_last_user_turn_and_the_answer_is_the_reference(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you"},
    ]
    path = write(tmp_path / "q.jsonl", [{"messages": turns}, {"messages": turns[:2], "reference": "Hey"}])
    first, second = load_queries(path).queries
    assert (first.x, first.reference) == (turns[:4], "See you")
    assert (second.x, second.reference) == (turns[:2], "Hey")
    assert to_messages(to_text(first.x)) == turns[:4]
    assert to_messages("plain") == [{"role": "user", "content": "plain"}]
    for half in ('[{"role": "user"}]', '[{"role": 1, "content": "x"}]', '[{"role": "user", "content": "x"}, 3]'):
        assert to_messages(half) == [{"role": "user", "content": half}]
    assert to_messages('[{"role": broken') == [{"role": "user", "content": '[{"role": broken'}]


def test_hh_from_prompt_and_from_chosen(tmp_path: Path) -> None:
    """x is the history up to and including the last 'Assistant:'; the answer after it is the reference."""
    by_prompt = write(tmp_path / "p.jsonl", [{"id": "1", "prompt": HH, "chosen": "Oil it.", "rejected": "Eh."}])
    by_chosen = write(tmp_path / "c.jsonl", [{"id": "1", "chosen": f"{HH} Oil it.", "rejected": f"{HH} Eh."}])
    expected = [Query("1", HH, "Oil it.")]
    assert load_queries(by_prompt, Reading(reader="hh")).queries == expected
    assert load_queries(by_chosen, Reading(reader="hh")).queries == [Query("1", HH, " Oil it.")], (
        "x and it make the file's text"
    )
    [chat] = load_queries(by_chosen, Reading(reader="hh"), chat=True).queries
    assert chat.reference == "Oil it."
    assert chat.x == [
        {"role": "user", "content": "What is rust?"},
        {"role": "assistant", "content": "A metal oxide."},
        {"role": "user", "content": "And how do I stop it?"},
    ]


@pytest.mark.parametrize(
    ("row", "x", "reference"),
    [
        ({"prompt": HH, "chosen": f"{HH} Oil it."}, HH, " Oil it."),
        ({"prompt": HH.removesuffix("\n\nAssistant:"), "chosen": f"{HH} Oil it."}, HH, " Oil it."),
        ({"prompt": HH.removesuffix("\n\nAssistant:") + "\n", "chosen": "Oil it."}, HH, "Oil it."),
        ({"chosen": f"{HH} Oil it.\n\nHuman:  \n"}, HH, " Oil it."),
    ],
    ids=["whole chosen", "Human last", "Human last and an answer", "nothing said last"],
)
def test_hh_turns_end_with_the_assistants(tmp_path: Path, row: dict[str, str], x: str, reference: str) -> None:
    path = write(tmp_path / "q.jsonl", [{"id": "1"} | row])
    assert load_queries(path, Reading(reader="hh")).queries == [Query("1", x, reference)]
    [chat] = load_queries(path, Reading(reader="hh"), chat=True).queries
    assert (chat.x[-1]["content"], chat.reference) == ("And how do I stop it?", "Oil it.")


def test_hh_text_without_turns_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", [{"prompt": HH}, {"prompt": "no turns at all"}])
    with pytest.raises(UsageError, match=r"q\.jsonl line 2: column prompt must be a dialogue.*no turns at all"):
        load_queries(path, Reading(reader="hh"))


def test_imdb_is_the_first_words_as_they_stand(tmp_path: Path) -> None:
    path = write(tmp_path / "q.parquet", [{"id": "1", "text": "A  fine\nfilm, I think."}, {"id": "2", "text": "Bad."}])
    found = load_queries(path, Reading(reader="imdb", prefix_words=3)).queries
    assert found == [Query("1", "A  fine\nfilm,", " I think."), Query("2", "Bad.", None)]


def test_tldr_is_the_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", [{"prompt": "POST: a long story\n\nTL;DR:", "summary": "a story"}])
    (query,) = load_queries(path, Reading(reader="tldr")).queries
    assert (query.x, query.reference) == ("POST: a long story\n\nTL;DR:", "a story")


def test_without_id_the_text_is_the_id_and_equal_texts_are_numbered(tmp_path: Path) -> None:
    first = load_queries(write(tmp_path / "a.jsonl", [{"x": "one"}, {"x": "two"}, {"x": "one"}])).queries
    second = load_queries(write(tmp_path / "b.jsonl", [{"x": "zero"}, {"x": "one"}])).queries
    assert first[0].id == second[1].id
    assert first[2].id == f"{first[0].id}-2"
    assert len({query.id for query in first}) == 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "a", "x": "1"}, {"id": "b", "x": "2"}, {"id": "a", "x": "3"}],
         r"duplicate ids in line 1 \(id a\), line 3 \(id a\)"),
        ([{"x": "1"}, {"x": "  \n"}, {"x": ""}], r"empty queries in line 2, line 3"),
        ([{"x": "1"}, {"x": 7}], r"column x must be text, but is not in line 2 \(7\)"),
        ([{"x": "1"}, {"y": "2"}], r"column x must be text, but is not in line 2 \(None\)"),
        ([{"id": "a", "x": "1"}, {"x": "2"}], r"no id in line 2"),
        ([{"text": "1", "label": 0}], r"no column x or prompt; its columns are text, label; .*--query-column"),
        ([{"messages": "hi"}], r"line 1: messages must be a list of role and content.*'hi'"),
        ([{"messages": [{"role": "assistant", "content": "hi"}]}], r"line 1: messages must be .* with a user turn"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_queries(write(tmp_path / "q.jsonl", rows))


HI = {"role": "user", "content": "hi"}
BEYOND = [
    ({"messages": [HI], "tools": [{"type": "function"}]}, "tools"),
    ({"messages": [HI], "images": ["a.png"]}, "images"),
    ({"messages": [HI, {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, HI]}, "tool_calls"),
    ({"messages": [HI, {"role": "tool", "content": "5"}, HI]}, "a turn of the role tool"),
    ({"messages": [HI | {"images": ["a.png"]}]}, "images"),
    (
        {"messages": [HI | {"content": [{"type": "image"}, {"type": "text", "text": "hi"}]}]},
        "content of the type image",
    ),
]


@pytest.mark.parametrize(("row", "what"), BEYOND)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_queries_with_tools_or_images_are_refused(tmp_path: Path, row: dict[str, Any], what: str, suffix: str) -> None:
    path = write(tmp_path / "q.jsonl", [{"messages": [HI], "tools": [], "images": None}, row])
    place = "line 2"
    if suffix == ".parquet":
        if what.startswith("content"):  # a column holds one type
            path.write_text(path.read_text().splitlines()[1])
        frame = pl.read_ndjson(path)
        path, place = tmp_path / "q.parquet", f"row {frame.height}"
        frame.write_parquet(path)
    with pytest.raises(
        UsageError, match=rf"^{path} {place} has {what}: prompts are text alone, without tools or images"
    ):
        load_queries(path)


@pytest.mark.parametrize("how", [{}, {"query_column": "text"}, {"reader": "imdb"}])
def test_texts_with_tools_or_images_are_refused(tmp_path: Path, how: dict[str, Any]) -> None:
    rows = [{"prompt": "a", "text": "a", "images": []}, {"prompt": "b", "text": "b", "images": ["a.png"]}]
    with pytest.raises(UsageError, match=r"line 2 has images: prompts are text alone"):
        load_queries(write(tmp_path / "q.jsonl", rows), Reading(**how))


def test_columns_for_tools_and_images_may_be_empty(tmp_path: Path) -> None:
    rows = [{"messages": [HI], "tools": empty, "images": empty} for empty in ([], None, "[]", "")]
    assert len(load_queries(write(tmp_path / "q.jsonl", rows))) == 4


def test_many_bad_rows_are_cut_short(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"line 10 and 15 more"):
        load_queries(write(tmp_path / "q.jsonl", [{"x": ""}] * 25))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.jsonl", b'{"x": "1"}\n{"x": \n{"x": "3"}\n', r"q\.jsonl line 2 is no valid JSON"),
        ("q.jsonl", b'{"x": "1"}\n"two"\n', r"line 2 is a JSON str, not an object"),
        ("q.jsonl", b'{"x": "1"}\n{"x": "\xff"}\n', r"line 2 is no valid JSON"),
        ("q.jsonl", b"", r"is empty"),
        ("q.jsonl", b"\n\n", r"has no rows"),
        ("q.json", b'[{"x": "1"}, 2]', r"row 2 is a JSON int"),
        ("q.json", b'[{"x": "1"}', r"is no valid JSON"),
        ("q.csv", b"id,x\na,one\nb\n", r"line 3 does not have the 2 fields of the header"),
        ("q.csv", b"id,x\na,one,more\n", r"line 2 does not have the 2 fields"),
        ("q.parquet", b"PAR1 nothing", r"is no whole Parquet file"),
        ("q.txt", b"hello", r"unknown format '\.txt'"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_queries(tmp_path / name)


def test_missing_file_directory_and_split_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_queries(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match="is a directory"):
        load_queries(tmp_path)
    path = write(tmp_path / "q.jsonl", [{"x": "1"}])
    with pytest.raises(UsageError, match="--split is for a hub dataset"):
        load_queries(path, Reading(split="test"))
    with pytest.raises(UsageError, match="no column post"):
        load_queries(path, Reading(query_column="post"))


def taken(tmp_path: Path, xs: list[str], seed: int = 0, **options: Any) -> Taken:
    queries = load_queries(write(tmp_path / "q.jsonl", [{"id": n, "x": x} for n, x in enumerate(xs)]))
    return Taken(tiny.tiny_tokenizer(), queries, Queries(**{"max_query_tokens": 99, **options}), Form(), seed)


def test_over_long_queries_are_dropped_and_counted(tmp_path: Path) -> None:
    longest = len(tiny.tiny_tokenizer()("a b").input_ids)
    found = taken(tmp_path, ["a b", "a b c d e f", "a"], max_query_tokens=longest)
    assert list(found.find(0, 5)) == [0, 2]
    assert found.counts == {"queries_read": 3, "queries_looked_at": 3, "queries_too_long": 1, "queries_taken": 2}


def test_skip_limit_and_shuffle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with fewer queries rendered, or asked for, at once than there are, which must change nothing."""
    xs = [f"query {i}" for i in range(10)]

    def ids(seed: int = 0, **options: Any) -> list[int]:
        orders = []
        for at_once in (1, 3, 1000):
            monkeypatch.setattr("ple_data.sampling.plan.RENDERED_AT_ONCE", at_once)
            orders.append(list(taken(tmp_path, xs, seed, **options).find(0, 1000)))
            found, slow = taken(tmp_path, xs, seed, **options), []
            while part := list(found.find(len(slow), len(slow) + 2)):
                slow += part
            orders.append(slow)
            assert found.complete
            assert len(found) == found.most == len(slow)
        assert all(order == orders[0] for order in orders)
        return orders[0]

    assert ids() == list(range(10))
    assert ids(skip=7) == [7, 8, 9]
    assert ids(skip=23) == [3, 4, 5, 6, 7, 8, 9]
    assert ids(skip=8, limit=4) == [8, 9, 0, 1]
    assert ids(skip=23, limit=2) == [3, 4]
    assert ids(limit=99) == list(range(10))
    shuffled = ids(1, shuffle=True)
    assert shuffled == sorted(range(10), key=lambda i: hashlib.sha256(f"1/{i}".encode()).digest())
    assert ids(1, shuffle=True) == shuffled != ids(2, shuffle=True)
    rounds = [ids(1, shuffle=True, skip=4 * t, limit=4) for t in range(2)]
    assert not set(rounds[0]) & set(rounds[1])


def test_a_limit_renders_no_more_than_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ple_data.sampling.plan.RENDERED_AT_ONCE", 4)
    found = taken(tmp_path, [f"query {i}" for i in range(100)], skip=3, limit=2)
    found.find(0, 1000)
    assert found.counts == {"queries_read": 100, "queries_looked_at": 8, "queries_too_long": 0, "queries_taken": 2}


def test_a_round_has_about_64_units_of_64_to_2048_queries() -> None:
    counts = [1, 64, 4096, 4097, 50_000, 10**6]
    assert [default_unit_size(count) for count in counts] == [64, 64, 64, 65, 782, 2048]
    assert default_unit_size(50_000, RoundManifest(round=0, settings={"unit_size": 64})) == 64


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("q.jsonl", '{"x": "whole"}\n{"x": "a\\ud800b"}\n', "line 2"),
        ("q.json", '[{"x": "whole"}, {"x": "a\\ud83d"}]', "row 2"),
        ("q.jsonl", '{"messages": [{"role": "user", "content": "\\udc00"}]}\n', "line 1"),
    ],
)
def test_half_a_character_is_named(tmp_path: Path, name: str, text: str, place: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=rf"{name} {place}: column (x|messages) holds half a character"):
        load_queries(str(tmp_path / name))


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("q.json", BOM + b'[{"x": "one"}, {"x": "two"}]'),
        ("q.json", BOM + b'{"x": "one"}\n{"x": "two"}\n'),
        ("q.jsonl", BOM + b'{"x": "one"}\n' + BOM + b'{"x": "two"}\n'),  # two files in one
        ("q.csv", BOM + b"x\none\ntwo\n"),
    ],
)
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert [query.x for query in load_queries(tmp_path / name).queries] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.jsonl", b'{"x": "1"}\n{"x": ' + b"[" * 10**6, r"line 2 is no valid JSON: it is nested too deeply"),
        ("q.json", b"[" * 10**6, r"q\.json is no valid JSON: it is nested too deeply"),
        ("q.jsonl", b'{"x": "1", "id": ' + b"9" * 5000 + b"}", r"line 1 .* a number of thousands of digits"),
        ("q.jsonl", b'{"x": "1", "id": 1}\n{"x": "2", "id": NaN}', r"NaN\) in line 2"),
        ("q.jsonl", b'{"messages": [{"role": "user", "content": "a"}], "reference": 7}', r"line 1: reference must be"),
        ("q.csv", b"x\n\xff\n", r"is no valid CSV"),
    ],
)
def test_what_no_file_of_ours_can_keep_is_found_early(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_queries(tmp_path / name)


def test_parquet_text_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"x": bad}), tmp_path / "q.parquet")
    with pytest.raises(UsageError, match=r"q\.parquet: column x holds what Python does not"):
        load_queries(tmp_path / "q.parquet")


@pytest.mark.parametrize(
    "column",
    [
        pa.array([3_000_000], pa.date32()),
        pa.array([2**62], pa.timestamp("ms")),
        pa.array([2**62], pa.timestamp("us", "Nowhere/Land")),
        pa.array([2**62], pa.duration("s")),
        pa.array([[3_000_000]], pa.list_(pa.date32())),
        pa.array([{"a": 3_000_000}], pa.struct([("a", pa.date32())])),
    ],
    ids=lambda column: str(column.type),
)
def test_a_value_that_python_cannot_hold_is_named_with_its_column(tmp_path: Path, column: pa.Array) -> None:
    pq.write_table(pa.table({"x": ["one"], "when": column}), tmp_path / "q.parquet")
    with pytest.raises(
        UsageError, match=r"q\.parquet: column when holds what Python does not .*; correct or remove the column$"
    ):
        load_queries(tmp_path / "q.parquet")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_the_digest_is_of_the_bytes_that_were_read(tmp_path: Path, mark: bytes) -> None:
    (tmp_path / "q.jsonl").write_bytes(mark + b'{"x": "one"}\n')
    assert load_queries(tmp_path / "q.jsonl").digest == sha256_file(tmp_path / "q.jsonl")


def test_a_text_that_begins_like_a_deep_chat_is_a_text() -> None:
    x = '[{"role": ' + "[" * 10**6
    assert to_messages(x) == [{"role": "user", "content": x}]


@pytest.mark.parametrize("name", ["q.jsonl", "q.json", "q.csv", "q.parquet"])
def test_a_pipe_or_a_device_is_refused_before_it_is_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / name).symlink_to("/dev/zero")
    os.mkfifo(tmp_path / name)
    for path in (tmp_path / name, tmp_path / "link" / name):
        with pytest.raises(UsageError, match="no regular file"):
            load_queries(path)
