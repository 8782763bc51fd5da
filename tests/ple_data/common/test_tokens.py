"""What ids say after a prompt, and which ids a text has there: for tokenizers of both families."""

import random

import pytest

from ple_data.common.tokens import CONTEXT, ids_after, text_after
from tests import tiny

TEXTS = ["The film was great.", "Ein schöner Film, 感動した 🎬🎬🎬!", " two  spaces ", "a\nb"]


def whole(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", TEXTS)
def test_prompt_and_response_are_the_text_that_all_ids_say(text: str) -> None:
    """Cut anywhere between two characters; the prompt may end with a special token, or be empty."""
    tokenizer = tiny.spm_tokenizer(special=("<|turn|>",))
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    ids = tokenizer(text).input_ids
    cuts = [at for at in range(len(ids) + 1) if "\ufffd" not in whole(tokenizer, ids[:at])]
    assert len(cuts) > 3
    for at in cuts:
        for x_ids in (ids[:at], [*ids[:at], turn]):
            assert whole(tokenizer, x_ids) + text_after(tokenizer, x_ids, ids[at:]) == text


def test_random_ids_after_a_prompt() -> None:
    tokenizer = tiny.spm_tokenizer()
    draw = random.Random(0)
    x_ids = tokenizer("this story was").input_ids
    for _ in range(200):
        ids = draw.choices(range(4, len(tokenizer)), k=6)
        assert "this story was" + text_after(tokenizer, x_ids, ids) == whole(tokenizer, [*x_ids, *ids])


def test_a_response_that_begins_inside_a_character_leaves_the_prompt_whole() -> None:
    tokenizer = tiny.spm_tokenizer()
    x_ids, stray = tokenizer("schö").input_ids, tokenizer.convert_tokens_to_ids("<0x80>")
    assert text_after(tokenizer, x_ids, [stray, *tokenizer("the", add_special_tokens=False).input_ids]) == "\ufffd the"


def test_only_the_end_of_a_long_prompt_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny.spm_tokenizer()
    x_ids, y_ids = tokenizer("the film " * 500).input_ids, tokenizer("was", add_special_tokens=False).input_ids
    decoded = []
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids, **_: decoded.append(len(ids)) or "x" * len(ids))
    text_after(tokenizer, x_ids, y_ids)
    assert max(decoded) == CONTEXT + len(y_ids)


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_tokenizers_say_what_they_said(text: str) -> None:
    tokenizer = tiny.tiny_tokenizer(add_bos=True)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    for x in ("", "The film", "感動 🎬"):
        x_ids = tokenizer(x).input_ids
        assert all(text_after(tokenizer, x_ids, ids[at:]) == whole(tokenizer, ids[at:]) for at in range(len(ids)))
        assert ids_after(tokenizer, [x_ids], [text], "") == [ids]


@pytest.mark.parametrize("y", [" was great.", "ing was", "\nwas", "感動", " 🎬 was"])
def test_ids_of_a_text_say_the_text(y: str) -> None:
    tokenizer = tiny.spm_tokenizer(special=("<|turn|>",))
    x_ids = tokenizer("the film").input_ids
    [ids] = ids_after(tokenizer, [x_ids], [y], "")
    assert text_after(tokenizer, x_ids, ids) == y
    if y == " was great.":  # and are those of the whole text
        assert [*x_ids, *ids] == tokenizer("the film was great.").input_ids
    [ids] = ids_after(tokenizer, [[]], ["was"], "")
    assert ids == tokenizer("was", add_special_tokens=False).input_ids


def test_white_space_of_a_template_stands_before_a_text_without_any() -> None:
    tokenizer = tiny.spm_tokenizer()
    x_ids = tokenizer("the film").input_ids
    bare, spaced = ids_after(tokenizer, [x_ids] * 2, ["was", " was"], " ")
    assert bare == spaced
