"""Principles and prompts: p, and the token ids of x and [p, x]. Never samples and never reads queries.

Plain-text models get p, a newline and x. Models with a chat template get p as the system message where the
template takes one, else before the first user turn. Where the template writes a system message of its own, p stands in
front of it, so that the arms differ by p alone.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Any

from ple_data.common.digests import text_digest
from ple_data.inputs.chat import Message, X
from ple_data.inputs.templates import own_system, rendered, uses_chat
from schemas.errors import UsageError
from schemas.files import read_given_text
from schemas.options import PrincipleForm, PromptFormat

BUILT_IN = ("hh", "imdb", "tldr")
"""The paper's own principles (Liu, Xu, Geng, ICML 2025, appendix), verbatim in `principles/*.txt`."""
NO_PRINCIPLE = "none"
"""An empty principle: [p, x] is x, so that y and y_prompt are two independent plain responses (an ablation)."""


@dataclass(frozen=True)
class Principle:
    """p: its name (built-in or file), its text without surrounding whitespace, and the digest of that text."""

    name: str
    text: str
    digest: str


def load_principle(name_or_path: str) -> Principle:
    """A built-in principle (`hh`, `imdb`, `tldr`), the empty one (`none`) or a UTF-8 file's text. Raises UsageError."""
    if name_or_path == NO_PRINCIPLE:
        return Principle(NO_PRINCIPLE, "", text_digest(""))
    path = Path(name_or_path)
    if name_or_path in BUILT_IN:
        text = (resources.files("ple_data.inputs") / "principles" / f"{name_or_path}.txt").read_text(encoding="utf-8")
    elif os.path.exists(path) and not os.path.isdir(path):  # False for what is too long to be a path
        text = read_given_text(path, "principle file")
    else:
        raise UsageError(f"principle {name_or_path} is neither built in ({', '.join(BUILT_IN)}, none) nor a file")
    text = text.strip()
    if not text:
        raise UsageError(f"principle file {name_or_path} is empty; write the rules that y_prompt should follow")
    return Principle(path.name, text, text_digest(text))


@dataclass(frozen=True)
class Form:
    """How queries become prompts. form: p is added to the template's default system message, or replaces it. today: the
    day that a template writes which writes one; a standing date where it is not given.
    """

    prompt_format: PromptFormat = "auto"
    form: PrincipleForm = "add"
    today: date | None = None


def render(
    tokenizer: Any, x: X, principle: Principle | None = None, *, prompt_format: PromptFormat = "auto"
) -> list[int]:
    """Token ids of x, or of [p, x] with a principle, ready for the model to continue.

    x: a text, or chat messages that end with a user turn. Special tokens stand exactly once: the chat template's
    where there is one, else the tokenizer's own (a BOS, never an EOS).
    """
    return render_all(tokenizer, [x], principle, Form(prompt_format))[0]


def render_all(
    tokenizer: Any, queries: Sequence[X], principle: Principle | None = None, how: Form = Form()
) -> list[list[int]]:
    """`render` of many queries, in their order; fast, because the tokenizer gets them together."""
    if not queries:
        return []
    p = principle.text if principle else ""
    if not uses_chat(tokenizer, how.prompt_format):
        if not all(isinstance(x, str) for x in queries):
            raise UsageError("queries are chat messages, but the model has no chat template; give a text column")
        return _plain_ids(tokenizer, [f"{p}\n{x}" if p else str(x) for x in queries])
    chats: Iterable[list[Message]] = ([{"role": "user", "content": x}] if isinstance(x, str) else x for x in queries)
    if p:
        own = own_system(tokenizer, how.today)
        system = "" if own and how.form == "replace" else own
        chats = (_guided(messages, p, system) for messages in chats)
    texts = [_chat_text(tokenizer, messages, how.today) for messages in chats]
    return tokenizer(texts, add_special_tokens=False).input_ids


def _plain_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    rendered = []
    for text, ids in zip(texts, tokenizer(texts).input_ids, strict=True):
        if bos and text.startswith(bos) and ids[:2] == [tokenizer.bos_token_id] * 2:
            ids = ids[1:]  # written in the text and added by the tokenizer
        if eos and ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(eos):
            ids = ids[:-1]  # a tokenizer that ends every text: the model must go on from here
        rendered.append(list(ids))
    return rendered


def _chat_text(tokenizer: Any, messages: list[Message], today: date | None) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return rendered(tokenizer, messages, today=today)
    except TemplateError as error:
        raise UsageError(f"the chat template refuses the query {str(messages)[:200]}: {error}") from error


def _guided(messages: list[Message], p: str, default: str | None) -> list[Message]:
    """The messages with p in front: in the system message, or in the first user turn.

    default: the system message of a dialogue that has none; None where the template takes none.
    """
    if messages[0]["role"] == "system":
        at = 0
    elif default is not None:
        return [{"role": "system", "content": f"{p}\n{default}" if default else p}, *messages]
    else:
        at = next(i for i, message in enumerate(messages) if message["role"] == "user")
    guided = {"role": messages[at]["role"], "content": f"{p}\n{messages[at]['content']}"}
    return [*messages[:at], guided, *messages[at + 1 :]]
