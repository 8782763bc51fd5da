"""Principles and prompts: p, and the token ids of x and [p, x]. Never samples and never reads queries.

Plain-text models get p, a newline and x. Models with a chat template get p as the system message where the
template takes one, else before the first user turn; whether it does is seen by rendering, not by the model's name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ple_data.common.digests import text_digest
from ple_data.inputs.chat import Message, X
from schemas.errors import UsageError
from schemas.options import PromptFormat

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
        file = resources.files("ple_data.inputs") / "principles" / f"{name_or_path}.txt"
    elif path.is_file():
        file = path
    else:
        raise UsageError(f"principle {name_or_path} is neither built in ({', '.join(BUILT_IN)}, none) nor a file")
    try:
        text = file.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise UsageError(f"principle file {path} is not UTF-8 text: {error}") from error
    if not text:
        raise UsageError(f"principle file {name_or_path} is empty; write the rules that y_prompt should follow")
    return Principle(path.name, text, text_digest(text))


def uses_chat(tokenizer: Any, prompt_format: PromptFormat = "auto") -> bool:
    """Whether prompts are rendered by the tokenizer's chat template: `auto` says yes where it has one."""
    if prompt_format == "auto":
        return bool(tokenizer.chat_template)
    if prompt_format == "chat" and not tokenizer.chat_template:
        raise UsageError("--prompt-format chat needs a tokenizer with a chat template; this one has none")
    return prompt_format == "chat"


def render(
    tokenizer: Any, x: X, principle: Principle | None = None, *, prompt_format: PromptFormat = "auto"
) -> list[int]:
    """Token ids of x, or of [p, x] with a principle, ready for the model to continue.

    x: a text, or chat messages that end with a user turn. Special tokens stand exactly once: the chat template's
    where there is one, else the tokenizer's own (a BOS, never an EOS).
    """
    return render_all(tokenizer, [x], principle, prompt_format=prompt_format)[0]


def render_all(
    tokenizer: Any, queries: Sequence[X], principle: Principle | None = None, *, prompt_format: PromptFormat = "auto"
) -> list[list[int]]:
    """`render` of many queries, in their order; fast, because the tokenizer gets them together."""
    if not queries:
        return []
    p = principle.text if principle else ""
    if not uses_chat(tokenizer, prompt_format):
        if not all(isinstance(x, str) for x in queries):
            raise UsageError("queries are chat messages, but the model has no chat template; give a text column")
        return _plain_ids(tokenizer, [f"{p}\n{x}" if p else str(x) for x in queries])
    with_system = bool(p) and _takes_system(tokenizer)
    chats = ([{"role": "user", "content": x}] if isinstance(x, str) else x for x in queries)
    texts = [_chat_text(tokenizer, messages, p, with_system) for messages in chats]
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


def _chat_text(tokenizer: Any, messages: list[Message], p: str, with_system: bool) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return _template(tokenizer, _guided(messages, p, with_system) if p else messages)
    except TemplateError as error:
        raise UsageError(f"the chat template refuses the query {str(messages)[:200]}: {error}") from error


def _guided(messages: list[Message], p: str, with_system: bool) -> list[Message]:
    """The messages with p in front: in the system message, or in the first user turn."""
    if messages[0]["role"] == "system":
        at = 0
    elif with_system:
        return [{"role": "system", "content": p}, *messages]
    else:
        at = next(i for i, message in enumerate(messages) if message["role"] == "user")
    guided = {"role": messages[at]["role"], "content": f"{p}\n{messages[at]['content']}"}
    return [*messages[:at], guided, *messages[at + 1 :]]


def _takes_system(tokenizer: Any) -> bool:
    """True where the template renders a system message: some templates raise on one, some leave it out."""
    from jinja2.exceptions import TemplateError

    probe = "a principle to look for"
    try:
        text = _template(tokenizer, [{"role": "system", "content": probe}, {"role": "user", "content": "x"}])
    except TemplateError:
        return False
    return probe in text


def _template(tokenizer: Any, messages: list[Message]) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TypeError, AttributeError, ValueError, KeyError, OverflowError, RecursionError) as error:
        raise TemplateError(f"{type(error).__name__}: {error}") from error  # a template computes what it likes
