"""Principles and rendering: the paper's texts, [p, x] in plain text and through chat templates, special tokens once."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from ple_data.inputs.principles import BUILT_IN, Principle, load_principle, render, render_all
from schemas.errors import UsageError
from tests import tiny

P = Principle("test", "Be kind.", "0")
USER = [{"role": "user", "content": "Hi"}]


def test_the_papers_principles_are_built_in() -> None:
    assert load_principle("hh").text == (
        "Your answers should follow these rules: 1 ethical: You should actively refrain users on illegal, immoral, or "
        "harmful topics. 2 informative: You should provide users with accurate, relevant, and up-to-date information "
        "in your responses. 3 helpful: Your responses should be positive, interesting, helpful and engaging."
    )
    assert load_principle("imdb").text.startswith("Write a positive and enthusiastic review with a natural and")
    assert load_principle("imdb").text.endswith("strong recommendations. Input text:")
    assert load_principle("tldr").text.startswith("You are an expert summarizer.")
    assert load_principle("tldr").text.endswith("omit unnecessary details. Input Text:")
    assert len({load_principle(name).digest for name in BUILT_IN}) == 3


def test_a_principle_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("\nBe kind.\n")
    assert load_principle(str(path)).text == "Be kind."
    path.write_text(" \n")
    with pytest.raises(UsageError, match="is empty"):
        load_principle(str(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        load_principle(str(path))
    with pytest.raises(UsageError, match=r"neither built in \(hh, imdb, tldr, none\) nor a file"):
        load_principle("hhh")


def test_plain_text_is_p_newline_x() -> None:
    tokenizer = tiny.tiny_tokenizer()
    assert tokenizer.decode(render(tokenizer, "Hi there")) == "Hi there"
    assert tokenizer.decode(render(tokenizer, "Hi there", P)) == "Be kind.\nHi there"


def test_the_empty_principle_changes_nothing() -> None:
    none = load_principle("none")
    assert none.text == ""
    for options, x in (({}, "Hi there"), ({"chat": True, "add_bos": True}, USER)):
        tokenizer = tiny.tiny_tokenizer(**options)
        assert render(tokenizer, x, none) == render(tokenizer, x)


@pytest.mark.parametrize("x", ["Hi", f"{tiny.BOS}Hi"])
def test_plain_text_has_the_tokenizers_bos_once(x: str) -> None:
    tokenizer = tiny.tiny_tokenizer(add_bos=True)
    assert tokenizer(x).input_ids.count(tokenizer.bos_token_id) == (1 if x == "Hi" else 2)
    for ids in (render(tokenizer, x), render(tokenizer, "Hi", P)):
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id


def test_a_bos_written_in_x_stays_where_the_tokenizer_adds_none() -> None:
    tokenizer = tiny.tiny_tokenizer()
    assert render(tokenizer, f"{tiny.BOS}Hi") == tokenizer(f"{tiny.BOS}Hi").input_ids


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt() -> None:
    tokenizer = tiny.tiny_tokenizer()
    eos = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {tiny.EOS}", special_tokens=[(tiny.EOS, eos)]
    )
    assert tokenizer("Hi").input_ids[-1] == eos
    assert eos not in render(tokenizer, "Hi", P)


def test_chat_template_writes_bos_and_the_tokenizer_must_not_add_another() -> None:
    tokenizer = tiny.tiny_tokenizer(add_bos=True, chat=True)
    for principle in (None, P):
        ids = render(tokenizer, "Hi", principle)
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id


def test_principle_is_the_system_message_where_the_template_takes_one() -> None:
    tokenizer = tiny.tiny_tokenizer(chat=True)
    assert tokenizer.decode(render(tokenizer, "Hi")) == f"{tiny.BOS}<user>Hi</user>\n<assistant>"
    expected = f"{tiny.BOS}<system>Be kind.</system>\n<user>Hi</user>\n<assistant>"
    assert tokenizer.decode(render(tokenizer, "Hi", P)) == expected
    assert render(tokenizer, USER, P) == render(tokenizer, "Hi", P)


def test_a_querys_own_system_message_follows_the_principle() -> None:
    tokenizer = tiny.tiny_tokenizer(chat=True)
    text = tokenizer.decode(render(tokenizer, [{"role": "system", "content": "Rhyme."}, *USER], P))
    assert text == f"{tiny.BOS}<system>Be kind.\nRhyme.</system>\n<user>Hi</user>\n<assistant>"


IGNORES_SYSTEM = (
    "{% for m in messages %}{% if m['role'] != 'system' %}<{{ m['role'] }}>{{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("template", [tiny.CHAT_TEMPLATE_WITHOUT_SYSTEM, IGNORES_SYSTEM])
def test_else_the_principle_stands_before_the_first_user_turn(template: str) -> None:
    tokenizer = tiny.tiny_tokenizer(chat=True)
    tokenizer.chat_template = template
    turns = [*USER, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}]
    text = tokenizer.decode(render(tokenizer, turns, P))
    assert text.count("Be kind.") == 1
    assert "<user>Be kind.\nHi" in text
    assert "<user>Bye" in text
    assert turns[0]["content"] == "Hi"  # the query itself is unchanged


def test_a_query_that_the_template_refuses_is_a_clear_error() -> None:
    tokenizer = tiny.tiny_tokenizer(chat="no-system")
    with pytest.raises(UsageError, match=r"refuses the query.*System role not supported"):
        render(tokenizer, [{"role": "system", "content": "Rhyme."}, *USER])


def test_a_template_that_computes_nonsense_is_a_clear_error() -> None:
    tokenizer = tiny.tiny_tokenizer(chat="no-system")
    tokenizer.chat_template = "{{ messages[0].content + 1 }}"
    with pytest.raises(UsageError, match=r"refuses the query.*TypeError"):
        render(tokenizer, USER)


def test_prompt_format_overrules_the_template() -> None:
    tokenizer = tiny.tiny_tokenizer(chat=True)
    assert tokenizer.decode(render(tokenizer, "Hi", P, prompt_format="plain")) == "Be kind.\nHi"
    with pytest.raises(UsageError, match="needs a tokenizer with a chat template"):
        render(tiny.tiny_tokenizer(), "Hi", prompt_format="chat")
    with pytest.raises(UsageError, match="no chat template"):
        render(tiny.tiny_tokenizer(), USER)


@pytest.mark.parametrize("chat", [False, True])
def test_many_are_rendered_as_one_by_one(chat: bool) -> None:
    tokenizer = tiny.tiny_tokenizer(chat=chat, add_bos=True)
    queries = tiny.corpus()[:20]
    assert render_all(tokenizer, queries, P) == [render(tokenizer, x, P) for x in queries]
    assert render_all(tokenizer, []) == []


@cache
def _plain_tokenizer() -> Any:
    return tiny.tiny_tokenizer()


@settings(max_examples=50, deadline=None)
@given(x=st.text(min_size=1).filter(str.strip))
def test_rendering_keeps_every_text(x: str) -> None:
    """Byte-level tokens lose nothing: decoding gives back p, a newline and x."""
    tokenizer = _plain_tokenizer()
    x = x.encode("utf-8", "replace").decode()
    assert tokenizer.decode(render(tokenizer, x, P)) == f"Be kind.\n{x}"


def test_a_principle_file_may_begin_with_a_byte_order_mark_and_is_no_pipe(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfBe kind.\n")
    assert load_principle(str(tmp_path / "p.txt")) == load_principle(str(write(tmp_path / "q" / "p.txt", "Be kind.")))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="no regular file"):
        load_principle(str(tmp_path / "pipe"))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir()
    path.write_text(text)
    return path
