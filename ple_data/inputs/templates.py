"""What a tokenizer's chat template writes: a dialogue, the end of a turn, its own system message, today's date.

`--system` and `--chat-template-arg` become its beginning, so that all that is rendered heeds them.

All of it is seen by rendering, never by a model's name. A template may raise anything, or write anything.
"""

import copy
import keyword
import re
from datetime import date, datetime, time
from typing import Any, NamedTuple

from ple_data.common.tokens import added_ids
from ple_data.inputs.chat import Message
from schemas.errors import UsageError
from schemas.json_text import named_values
from schemas.options import PromptFormat, Prompting

STANDING_DATE = date(2024, 7, 26)
"""What a template that writes today's date writes outside of a round: in SFT and to reward models."""
OURS = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
"""What a template is given beside the values that a user may give."""
LONGEST = 10**7
"""Characters of a dialogue at most: no model takes more, and their ids would fill memory."""
_PROBE = "a text to look for"
_ASK = {"role": "user", "content": "x"}


def uses_chat(tokenizer: Any, prompt_format: PromptFormat = "auto") -> bool:
    """Whether prompts are rendered by the tokenizer's chat template: `auto` says yes where it has one."""
    if prompt_format == "auto":
        return bool(tokenizer.chat_template)
    if prompt_format == "chat" and not tokenizer.chat_template:
        raise UsageError("--prompt-format chat needs a tokenizer with a chat template; this one has none")
    return prompt_format == "chat"


def instructed(tokenizer: Any, how: Prompting) -> Any:
    """The tokenizer with a chat template that begins by setting what `how` says; itself where that is nothing.

    A copy: what is saved with a model is never changed. Raises UsageError for what the template has no place for.
    """
    values = named_values(how.chat_template_arg, "--chat-template-arg")
    if how.system is None and not values:
        return tokenizer
    name = tokenizer.name_or_path
    if not uses_chat(tokenizer, how.prompt_format):
        why = "--prompt-format is plain" if tokenizer.chat_template else f"{name} has none"
        raise UsageError(f"--system and --chat-template-arg are for a chat template, and {why}: leave them out")
    template = tokenizer.get_chat_template()
    if how.system is not None and own_system(tokenizer) is None:
        raise UsageError(
            f"--system: the chat template of {name} takes no system message; leave it out, or say it in the queries"
        )
    for word in values:
        if (
            word in OURS
            or keyword.iskeyword(word)
            or not word.isidentifier()
            or not re.search(rf"\b{word}\b", template)
        ):
            raise UsageError(f"--chat-template-arg {word}: the chat template of {name} asks for no such value")
    parts = [f"{{% set {word} = {value!r} +%}}" for word, value in values.items()]
    if how.system is not None:
        first = f"[{{'role': 'system', 'content': {how.system!r}}}]"
        parts.append(
            "{% if messages[0]['role'] != 'system' +%}{% set messages = " + first + " + messages +%}{% endif +%}"
        )
    found = copy.copy(tokenizer)
    found.chat_template = "".join(parts) + template
    return found


def rendered(tokenizer: Any, messages: list[Message], *, today: date | None = None, prompt: bool = True) -> str:
    """A dialogue in the template's words, up to where the model goes on, or (`prompt` off) to its end."""
    from jinja2.exceptions import TemplateError

    now = datetime.combine(today or STANDING_DATE, time())
    clock = {"strftime_now": now.strftime} if writes_date(tokenizer) else {}
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **clock)
    except (TypeError, AttributeError, ValueError, KeyError, OverflowError, RecursionError) as error:
        raise TemplateError(f"{type(error).__name__}: {error}") from error  # a template computes what it likes
    if len(text) > LONGEST:
        raise TemplateError(f"it makes {len(text):,} characters of them, more than {LONGEST:,}")
    return text


def writes_date(tokenizer: Any) -> bool:
    """Whether what the template writes depends on the day."""
    return "strftime_now" in str(tokenizer.chat_template)


def own_system(tokenizer: Any, today: date | None = None) -> str | None:
    """The system message that the template writes where a dialogue has none, or ""; None where it takes none at all."""

    def told(content: str) -> str:
        return _tried(tokenizer, [{"role": "system", "content": content}, _ASK], today=today)

    before, found, after = told(_PROBE).partition(_PROBE)
    if not found:  # some templates raise on a system message, some leave it out
        return None
    plain = _tried(tokenizer, [_ASK], today=today)
    own = plain.removeprefix(before).removesuffix(after)
    return own if before + own + after == plain == told(own) else ""


class Response(NamedTuple):
    """How a response stands after its prompt: the id that ends it, and white space in front of it."""

    end: int
    lead: str = ""


def response_form(tokenizer: Any, prompt_format: PromptFormat = "auto") -> Response:
    """How responses stand after prompts of this form: a chat's end as its template ends a turn, else with EOS."""
    end = tokenizer.eos_token_id
    if not uses_chat(tokenizer, prompt_format):
        return Response(end)
    prompt = _tried(tokenizer, [_ASK])
    text = _tried(tokenizer, [_ASK, {"role": "assistant", "content": _PROBE}], prompt=False)
    before, found, after = text.rpartition(_PROBE)
    lead = before.removeprefix(prompt) if prompt else ""
    ends = added_ids(tokenizer) - {tokenizer.unk_token_id}
    written = tokenizer(after, add_special_tokens=False)["input_ids"] if found else []
    return Response(next((i for i in written if i in ends), end), lead if lead.isspace() else "")


def _tried(tokenizer: Any, messages: list[Message], **how: Any) -> str:
    """The rendered dialogue; empty where the template refuses it."""
    try:
        return rendered(tokenizer, messages, **how)
    except Exception:  # a template may raise anything
        return ""
