"""What a round is sampled under beside its options: the ends of a response, the form of a principle, the day.

They come from the tokenizer's chat template and are fixed when a round first starts. A round that an older version
began goes on as it was made. Only where a model is concerned do they count in what a round is.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from ple_data.common.digests import text_digest
from ple_data.common.models import end_ids
from ple_data.inputs.chat import stored_chat
from ple_data.inputs.principles import Form, Principle, render_all
from ple_data.inputs.templates import instructed, own_system, response_form, uses_chat, writes_date
from ple_data.sampling.thoughts import Thoughts
from ple_data.storage.store import Store
from schemas.json_text import named_values
from schemas.options import Gen, Prompting
from schemas.records import RoundManifest, read_record

IN_OLDER = {"end_tokens": None, "principle_form": "replace", "strip_thoughts": None}
"""What held before a round's settings said it."""


@dataclass(frozen=True)
class Terms:
    """ends: all ids that end a response. chat: prompts are chats. identity: what of it decides the rows, as JSON.
    thoughts: what takes a response apart, where one is asked for."""

    form: Form
    chat: bool
    ends: tuple[int, ...]
    identity: dict[str, Any]
    thoughts: Thoughts | None = None


def terms_of(
    options: Gen, tokenizer: Any, principle: Principle | None, store: Store, say: Callable[[str], None]
) -> Terms:
    """The terms of a round: those that it was begun under, else what the options and the tokenizer say now."""
    number, prompt_format, begun = options.round, options.prompt_format, store.load_manifest(options.round)
    identity = said(options)

    def fixed(name: str, value: Any, otherwise: str) -> bool:
        if holds := begun is None or name in begun.settings:
            identity[name] = value
        else:
            say(f"round {number} was begun by an older version and goes on as it was made: {otherwise}")
        return holds

    ends, chat = end_ids(options.model, tokenizer, options.revision), uses_chat(tokenizer, prompt_format)
    asked = [response_form(tokenizer, prompt_format).end, *_stop_ids(tokenizer, options.stop, say)]
    more = [token for token in dict.fromkeys(asked) if token not in ends]
    tokens = tokenizer.convert_ids_to_tokens(more)
    if more and fixed("end_tokens", tokens, f"{', '.join(tokens)} does not end a response"):
        ends = (*ends, *more)
    today = None
    if chat and writes_date(tokenizer):
        last = [path for directory in options.reuse for path in Store(directory).manifest_paths()[-1:]]
        today = next(map(_day, [store.manifest_path(number)] if begun else last), None) or date.today()
        say(f"the chat template writes the date; in the whole of round {number} it is {today}")
        fixed("template_date", today.isoformat(), "its day is that of its first start")
    form = options.principle_form
    if chat and principle and principle.text and own_system(tokenizer, today):
        new = fixed("principle_form", form, "the principle replaces the template's own system message")
        form = form if new else "replace"
    thoughts = Thoughts(tokenizer, options.strip_thoughts) if options.strip_thoughts is not None else None
    if thoughts:
        identity["strip_thoughts"] = list(thoughts.marks)
    return Terms(Form(prompt_format, form, today), chat, ends, identity, thoughts)


def said(options: Prompting) -> dict[str, Any]:
    """What the chat template is told, values in one spelling; nothing where it is told nothing."""
    values = named_values(options.chat_template_arg, "--chat-template-arg")
    spelt = [f"{name}={json.dumps(values[name], ensure_ascii=False)}" for name in sorted(values)]
    return {
        name: told
        for name, told in {"system": options.system, "chat_template_arg": spelt}.items()
        if told not in (None, [])
    }


def rendered_again(
    tokenizer: Any, xs: list[str], principle: str, made: Mapping[str, Any]
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of x and of [p, x], from the texts of a committed file's rows and its metadata `made`.

    What 0.1.0 did not keep counts as plain text: whether the ids of x are those in the file tells whether all is right.
    """
    chat, day = made.get("prompts") == "chat", made.get("template_date")
    how = made.get("principle_form", IN_OLDER["principle_form"])
    form = Form("auto" if chat else "plain", how, date.fromisoformat(day) if day else None)
    told = Prompting(system=made.get("system"), chat_template_arg=tuple(made.get("chat_template_arg", ())))
    tokenizer = instructed(tokenizer, told)
    queries = [(stored_chat(x) if chat else None) or x for x in xs]
    p = Principle("of these rows", principle, text_digest(principle))
    return render_all(tokenizer, queries, how=form), render_all(tokenizer, queries, p, form)


def _stop_ids(tokenizer: Any, stop: Iterable[str], say: Callable[[str], None]) -> list[int]:
    """Ids of the stop texts that are one special token: no text holds these, so they cannot be looked for there."""
    special = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    for word in stop:
        if word.strip() not in special and (within := next(filter(word.__contains__, special), None)):
            say(f"note: --stop {word!r} holds the special token {within}, which no text does; give the token alone")
    return [special[word.strip()] for word in stop if word.strip() in special]


def _day(manifest: Path) -> date:
    """The day that a round's prompts have; of one that an older version began, the day of its first start."""
    day = read_record(RoundManifest, manifest).settings.get("template_date")
    return date.fromisoformat(str(day)) if day else date.fromtimestamp(manifest.stat().st_mtime)
