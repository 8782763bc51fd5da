"""What `ple inspect` says, and that no text of a model gets at the terminal."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ple_data.common.terminal import display_width, printable, shorten, side_by_side, wrap
from ple_data.exchange.export import export
from ple_data.inspection import WIDTH, format_statistics, inspect
from ple_data.partition import round_statistics
from ple_data.storage.store import Store
from ple_data.storage.verify import check, held
from schemas.errors import DamagedError, UsageError
from schemas.records import RoundManifest
from tests.tables import table


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store(tmp_path / "data")
    rows = [{"s": 0.0, "s_prompt": margin} for margin in (0.1, 2.5, -1.0, 0.19)]
    for round in (0, 1):
        store.commit("responses", round, "00000-aa", table("responses", rows, round), {})
        store.commit("pairs", round, "00000-aa", table("pairs", rows, round), {})
    store.commit("responses", 2, "00000-aa", table("responses", rows, 2), {})
    return store


def test_the_tables(store):
    text = inspect(store.root)
    lines = text.splitlines()
    assert max(map(display_width, lines)) <= WIDTH
    assert ["2", "4", "0"] in [line.split() for line in lines]  # responses that are not scored yet
    # round, rows, s, s_prompt, margin: (0.1 + 2.5 - 1 + 0.19) / 4 = 0.4475, in float32 a hair less
    # rank: 1 of 4, at tau_1 2 of 4
    [first] = [line.split() for line in lines if line.split()[:3] == ["0", "4", "0.000"]]
    assert first[3:5] == ["0.447", "0.447"]
    assert first[-5:] == ["0.200", "25.0", "%", "25.0", "%"]
    [second] = [line.split() for line in lines if line.split()[:3] == ["1", "4", "0.000"]]
    assert second[-5:] == ["0.180", "50.0", "%", "25.0", "%"]
    assert "judge@0123456789ab" in text
    assert "Be kind." in text
    assert "warning" not in text
    assert "Margins from -1.000 to 2.500" in text


def test_warnings_are_shown(store):
    assert "warning: round 0: none of the 4 rows in the rank set" in inspect(store.root, tau0=3.0)


def test_json_is_the_same_content(store):
    found = json.loads(inspect(store.root, sort="margin", rows=2, as_json=True))
    assert [r["rank_share"] for r in found["rounds"]] == [0.25, 0.5]
    assert [(r["round"], r["kind"], r["rows"]) for r in found["counts"]][-1] == (1, "pairs", 4)
    assert sum(found["histogram"]["counts"]["0"]) == 4
    assert [(r["margin"], r["round"], r["set"]) for r in found["rows"]] == [(2.5, 0, "rank"), (2.5, 1, "rank")]
    assert found["warnings"] == []


def test_rows_in_the_order_of_keys_or_of_margins(store):
    def keys(**options):
        return [r["query_id"] for r in json.loads(inspect(store.root, as_json=True, **options))["rows"]]

    assert keys(rows=3) == ["q0", "q1", "q2"]
    assert keys(rows=100, sort="margin")[::2] == ["q1", "q3", "q0", "q2"]
    assert len(keys(sort="margin")) == 5
    assert keys() == []
    with pytest.raises(UsageError, match="sort"):
        keys(rows=1, sort="length")


def test_a_pair_side_by_side(tmp_path):
    store = Store(tmp_path)
    row = {"x": "Why?", "y": "no " * 60, "y_prompt": "yes", "s": 0.0, "s_prompt": 0.5, "reference": None}
    store.commit("pairs", 0, "00000-aa", table("pairs", [row]), {})
    text = inspect(tmp_path, rows=1)
    assert "margin 0.5 > tau 0.2: rank (in Eq. 6 c = -0.3333, c_prompt = 0.25)" in text
    assert "x: Why?" in text
    [line] = [line for line in text.splitlines() if line.endswith("| yes")]
    assert line.startswith("no no no")
    assert "y: s = 0, 3 tokens, stop" in text
    assert "y_prompt: s_prompt = 0.5, 4 tokens, stop" in text


EVIL = "\x1b[2J\x1b]0;title\x07\x9b31m\r\b\u202e\u2028\x00 a\nb \x7f"


def test_no_escape_sequence_passes(tmp_path):
    store = Store(tmp_path)
    row = dict.fromkeys(("query_id", "x", "y", "y_prompt", "principle", "policy", "reward_model"), EVIL)
    store.commit("pairs", 0, "00000-aa", table("pairs", [row, {"query_id": "q", "y": "\x1b\x9b"}]), {})
    text = inspect(tmp_path, rows=2)
    assert all(c.isprintable() or c == "\n" for c in text)
    assert r"\x1b[2J" in text
    assert r"a\nb" in text
    found = inspect(tmp_path, rows=2, as_json=True)
    assert all(ord(c) >= 32 or c == "\n" for c in found)
    assert found.isascii()
    assert json.loads(found)["rows"][0]["y"] == EVIL


def test_empty_responses_say_so(tmp_path):
    store = Store(tmp_path)
    store.commit("pairs", 0, "00000-aa", table("pairs", [{"y": " \n", "y_ids": [], "y_empty": True}]), {})
    assert r"(empty: ' \n')" in inspect(tmp_path, rows=1)


def test_what_is_held_is_counted_by_kind(store):
    assert held(store.root) == "12 rows of responses, 8 rows of pairs"


def test_with_beta_it_says_where_the_median_margin_rests(store):
    """Margins 0.1, 2.5, -1 and 0.19: the median, 0.145, is at rest where the policy has learned 0.145 / 0.5 of it."""
    assert "beta = 0.5: the median margin comes to rest where Delta = margin / beta is 0.290 in round 0, 0.290" in (
        " ".join(inspect(store.root, beta=0.5).split())
    )
    assert "comes to rest" not in inspect(store.root)


def test_only_responses(tmp_path):
    store = Store(tmp_path)
    store.commit("responses", 0, "00000-aa", table("responses", [{}]), {})
    assert "no pairs yet: ple-score" in inspect(tmp_path)
    assert json.loads(inspect(tmp_path, as_json=True))["rounds"] == []


def test_nothing_there(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no committed rows: run ple-gen first"):
        inspect(tmp_path / "empty")
    for look in (inspect, lambda path: list(check(path)), lambda path: export(path, format="sft", output="x.jsonl")):
        with pytest.raises(UsageError, match="there is no such folder; give the DATA that ple-gen wrote"):
            look(tmp_path / "no")


def test_a_runs_folder_is_not_taken_for_its_data(tmp_path):
    """Least of all called whole where a shard of it is damaged."""
    (tmp_path / ".ple").mkdir()
    store = Store(tmp_path / "data")
    store.commit("responses", 0, "00000-aa", table("responses", [{}]), {})
    with store.path("responses", 0, "00000-aa").open("ab") as shard:
        shard.write(b"x")
    for look in (inspect, lambda path: list(check(path)), lambda path: export(path, format="sft", output="x.jsonl")):
        with pytest.raises(UsageError, match=r"a run's folder; its rows are in .*/data: give that"):
            look(tmp_path)
    with pytest.raises(DamagedError, match="2 problems"):
        list(check(tmp_path / "data"))


def test_a_round_that_was_begun_is_not_one_that_is_not_there(tmp_path):
    store = Store(tmp_path)
    store.save_manifest(RoundManifest(round=3, settings={}))
    assert held(tmp_path) == "no rows yet"
    with pytest.raises(UsageError, match=r"no rows yet: round 3 was begun, .*; wait, or run the same ple-gen"):
        inspect(tmp_path)


def test_alpha_is_checked(store):
    with pytest.raises(UsageError, match="alpha"):
        inspect(store.root, alpha=1.0)


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_a_damaged_shard_is_one_sentence(store, keep):
    path = store.path("pairs", 0, "00000-aa")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(DamagedError, match="ple verify"):
        inspect(store.root)


def test_damaged_pages_are_one_sentence(store):
    path = store.path("pairs", 0, "00000-aa")
    data = bytearray(path.read_bytes())
    data[4:3000] = bytes(2996)  # the size and the footer stay
    path.write_bytes(data)
    with pytest.raises(DamagedError, match="ple verify"):
        inspect(store.root)


def test_format_statistics_of_one_threshold(store):
    statistics = round_statistics(store.scan("pairs"), 0.2, 0.9, at_round=1)
    text = format_statistics(statistics, tau0=0.2, alpha=0.9, at_round=1)
    assert "tau of round 1 (tau_t = 0.2 * 0.9^t)" in text
    assert max(map(len, text.splitlines())) <= WIDTH


# Text


@given(st.text())
def test_printable_text_is_printable(text):
    assert printable(text).isprintable()
    if text.isprintable():
        assert printable(text) == text


@given(st.text(st.characters(categories=["L", "Zs", "Mn"])), st.integers(2, 30))
def test_wrapped_lines_fit_and_lose_nothing_but_spaces(text, width):
    text = printable(text)
    lines = wrap(text, width)
    assert all(display_width(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_shorten_and_side_by_side():
    assert shorten("abcdef", 6) == "abcdef"
    assert shorten("abcdefg", 6) == "abc..."
    assert side_by_side([["世", "b"], ["x"]], 3) == ["世  | x", "b   |"]


def test_the_directory_of_a_run_leads_to_its_data(tmp_path):
    Store(tmp_path / "run" / "data").commit("pairs", 0, "00000-aa", table("pairs", [{}]), {})
    with pytest.raises(UsageError, match=r"its rows are in .*run/data: give that"):
        inspect(tmp_path / "run")
