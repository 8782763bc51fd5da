"""What chat templates write: ends of turns, system messages of their own, dates; and those that write nothing of it."""

from datetime import date

import pytest

from ple_data.common.tokens import ids_after
from ple_data.inputs.principles import Form, Principle, render_all
from ple_data.inputs.templates import own_system, rendered, response_form
from schemas.errors import UsageError
from tests import tiny

SPECIAL = ("<|turn|>", "<|over|>")
OWN_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|turn|>system\nBe brief.<|over|>\n{% endif %}" + tiny.TURNS
DATED = "{{ strftime_now('%d %b %Y %H') }}\n" + tiny.TURNS
P = Principle("own", "Be kind.", "0")
REFUSES = "{% if messages | length > 1 %}{{ raise_exception('one turn alone') }}{% endif %}{{ messages[0]['content'] }}"


def tokenizer(template: str):
    return tiny.tiny_tokenizer(chat=template, special=SPECIAL)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (tiny.TURNS, "<|over|>"),
        (tiny.TURNS.replace("<|over|>\n", " <|end|>"), tiny.EOS),
        (tiny.TURNS.replace("<|over|>", "</turn>"), tiny.EOS),  # a text, not a token
        (tiny.CHAT_TEMPLATE, tiny.EOS),
        (REFUSES, tiny.EOS),
        ("{{ messages[0]['content'] }}", tiny.EOS),  # leaves the answer out
        ("{{ messages[0]['content'] | int_of_nothing }}", tiny.EOS),
        (tiny.TURNS.replace("| trim", "| upper"), tiny.EOS),
        (DATED, "<|over|>"),
        ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + tiny.TURNS, "<|over|>"),
    ],
)
def test_what_ends_a_response(template: str, end: str) -> None:
    found = tokenizer(template)
    assert found.convert_ids_to_tokens(response_form(found).end) == end
    assert response_form(found, "plain").end == found.eos_token_id


def test_without_a_template_eos_ends_a_response() -> None:
    found = tiny.tiny_tokenizer()
    assert response_form(found).end == found.eos_token_id


def test_white_space_before_an_answer_is_the_templates() -> None:
    template = "{% for m in messages %}{{ 'Q: ' if m['role'] == 'user' else ' ' }}{{ m['content'] }}{% endfor %}"
    found = tiny.spm_tokenizer(template=template)
    form, prompt = response_form(found), found("Q: x").input_ids
    [ids] = ids_after(found, [prompt], ["was"], form.lead)
    assert [*prompt, *ids] == found("Q: x was").input_ids
    assert ids_after(found, [prompt], [""], form.lead) == [[]]


def test_white_space_before_an_answer_is_written_by_byte_level_tokenizers_too() -> None:
    found = tokenizer(tiny.TURNS)
    [bare, spaced] = ids_after(found, [[1], [1]], ["was", " was"], " ")
    assert found.decode(bare) == found.decode(spaced) == " was"
    assert found.decode(ids_after(found, [[1]], ["was"], "")[0]) == "was"


def texts(template: str, form: str = "add", **more) -> tuple[str, str]:
    found = tokenizer(template)
    plain, guided = (render_all(found, ["x"], p, Form(form=form, **more))[0] for p in (None, P))
    return found.decode(plain), found.decode(guided)


def test_the_principle_is_added_to_the_templates_own_system_message() -> None:
    plain, guided = texts(OWN_SYSTEM)
    assert guided == plain.replace("Be brief.", "Be kind.\nBe brief.") != plain
    assert texts(OWN_SYSTEM, "replace")[1] == plain.replace("Be brief.", "Be kind.")


def test_a_template_without_a_system_message_gets_the_principle_alone() -> None:
    assert own_system(tokenizer(tiny.TURNS)) == ""
    assert texts(tiny.TURNS) == texts(tiny.TURNS, "replace")
    assert own_system(tokenizer(REFUSES)) is None


def test_a_date_is_that_which_is_given() -> None:
    found = tokenizer(DATED)
    ask = [{"role": "user", "content": "x"}]
    assert rendered(found, ask, today=date(2031, 2, 3)).startswith("03 Feb 2031 00\n")
    assert rendered(found, ask) == rendered(found, ask, today=date(2024, 7, 26))
    assert all(text.startswith("03 Feb 2031") for text in texts(DATED, today=date(2031, 2, 3)))


def test_a_template_that_writes_without_end_is_refused() -> None:
    with pytest.raises(UsageError, match=r"refuses the query .* more than 10,000,000"):
        render_all(tokenizer("{{ messages[0]['content'] * 2000000 }}"), ["a text"])
