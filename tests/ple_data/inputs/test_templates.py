"""What chat templates write: ends of turns, system messages of their own, dates; and those that write nothing of it."""

from datetime import date

import pytest

from ple_data.common.tokens import ids_after
from ple_data.inputs.principles import Form, Principle, render_all
from ple_data.inputs.templates import instructed, own_system, rendered, response_form
from schemas.errors import UsageError
from schemas.options import Prompting
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


NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + tiny.TURNS
THINKS = (
    tiny.TURNS
    + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}(none){% endif %}"
)
ASK = [{"role": "user", "content": "x"}]


def with_system(template: str, system: str, *values: str):
    return instructed(tokenizer(template), Prompting(system=system, chat_template_arg=values))


@pytest.mark.parametrize("system", ["Be brave.", "", "'\"\\ {{ x }} {% if %} %} é 🙂\n\n#}", "a\tb\u2028"])
@pytest.mark.parametrize("template", [tiny.TURNS, OWN_SYSTEM, DATED, "\n  " + tiny.TURNS])
def test_a_system_message_is_as_if_the_dialogue_had_it(template: str, system: str) -> None:
    found, said = with_system(template, system), [{"role": "system", "content": system}, *ASK]
    assert rendered(found, ASK) == rendered(tokenizer(template), said) == rendered(found, said)
    own = [{"role": "system", "content": "Be quiet."}, *ASK]
    assert rendered(found, own) == rendered(tokenizer(template), own)
    assert rendered(found, said, prompt=False) == rendered(tokenizer(template), said, prompt=False)


def test_the_principle_is_added_to_the_system_message_or_takes_its_place() -> None:
    for template in (tiny.TURNS, OWN_SYSTEM):
        found = with_system(template, "Be brave.")
        plain = found.decode(render_all(found, ["x"])[0])
        added, instead = (found.decode(render_all(found, ["x"], P, Form(form=form))[0]) for form in ("add", "replace"))
        assert added == plain.replace("Be brave.", "Be kind.\nBe brave.") != plain
        assert instead == plain.replace("Be brave.", "Be kind.")


def test_what_a_template_is_told_is_what_transformers_tells_it() -> None:
    plain = tokenizer(THINKS)
    for word, value in (("false", False), ("False", False), ("true", True), ("null", None), ("0", 0), ("off", "off")):
        found = instructed(plain, Prompting(chat_template_arg=[f"enable_thinking={word}"]))
        how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": value}
        assert rendered(found, ASK) == plain.apply_chat_template(ASK, **how)
    assert rendered(plain, ASK) != rendered(
        instructed(plain, Prompting(chat_template_arg=["enable-thinking=false"])), ASK
    )


def test_values_of_any_kind_reach_a_template() -> None:
    plain = tokenizer("{{ a }} {{ b['k'][1] }} {{ c }}{% macro m() %}{{ c }}{% endmacro %}{{ m() }}" + tiny.TURNS)
    told = ['a="x y"', 'b={"k": [1, 2.5]}', "c=it's {{ 1 }}"]
    assert rendered(instructed(plain, Prompting(chat_template_arg=told)), ASK).startswith(
        "x y 2.5 it's {{ 1 }}it's {{ 1 }}<|turn|>"
    )


def test_the_models_own_tokenizer_is_left_as_it_is() -> None:
    plain = tokenizer(THINKS)
    before = plain.chat_template
    assert instructed(plain, Prompting()) is plain
    assert instructed(plain, Prompting(system="s")).chat_template != before == plain.chat_template


@pytest.mark.parametrize(
    ("template", "how", "message"),
    [
        (NO_SYSTEM, {"system": "s"}, "--system: the chat template of .* takes no system message"),
        (
            THINKS,
            {"chat_template_arg": ["enable_thought=1"]},
            "enable_thought: the chat template of .* asks for no such",
        ),
        (THINKS, {"chat_template_arg": ["messages=[]"]}, "--chat-template-arg messages: "),
        (THINKS, {"chat_template_arg": ["if=1"]}, "--chat-template-arg if: "),
        (
            THINKS,
            {"chat_template_arg": ["enable_thinking"]},
            "--chat-template-arg 'enable_thinking' must be name=value",
        ),
        (THINKS, {"system": "s", "prompt_format": "plain"}, "for a chat template, and --prompt-format is plain"),
        (False, {"system": "s"}, "for a chat template, and .* has none"),
    ],
)
def test_what_a_template_has_no_place_for_is_refused(template, how: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        instructed(tokenizer(template), Prompting(**how))
