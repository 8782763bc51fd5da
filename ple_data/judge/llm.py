"""A language model as judge, behind an OpenAI-compatible endpoint or the Anthropic API.

Every query is asked twice, with the responses in both orders, and each answer is kept as it arrives. The key comes from
the environment and goes into a header; it is never written or shown.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

from ple_data.common import web
from ple_data.common.digests import json_digest
from ple_data.common.progress import Progress
from ple_data.inputs.chat import readable
from ple_data.judge.journal import Journal
from ple_data.judge.prompt import Template
from ple_data.judge.sources import Pair
from schemas.errors import UsageError
from schemas.json_text import parse_json
from schemas.judging import Answer, Order

if TYPE_CHECKING:
    import httpx

DEFAULT_MAX_TOKENS = 1024
TRIES = 6
TIMEOUT = 300.0
"""Seconds that an endpoint may be silent; a whole try takes half as many more (`web.WHOLE`)."""
FIRST_WAIT = 1.0
"""Seconds before the second try; doubled every try."""
MOST_FAULTS = 8
"""So many requests without a single answer mean that the settings are wrong or the server is down, not a query."""
_QUERY_REFUSED = {400, 413, 422}
"""Statuses that may be about one query (too long, say); any other refusal is about all."""

Asked = tuple[str, Order]
"""A question: its query id, and which response stands first."""


@dataclass(frozen=True)
class Api:
    """How one kind of endpoint is asked, and where its answer holds what."""

    endpoint: str
    path: str
    key_variable: str
    headers: Callable[[str], dict[str, str]]
    length: str
    """The field of the request that bounds an answer's tokens."""
    read: Callable[[dict[str, Any]], tuple[str, str | None, int | None, int | None]]
    """Text, finish reason, tokens of the prompt and of the answer."""


def _read_openai(found: dict[str, Any]) -> tuple[str, str | None, int | None, int | None]:
    choice, usage = found["choices"][0], found.get("usage") or {}
    text = choice["message"].get("content") or ""
    return text, choice.get("finish_reason"), usage.get("prompt_tokens"), usage.get("completion_tokens")


def _read_anthropic(found: dict[str, Any]) -> tuple[str, str | None, int | None, int | None]:
    usage = found.get("usage") or {}
    text = "".join(block["text"] for block in found["content"] if block.get("type") == "text")
    return text, found.get("stop_reason"), usage.get("input_tokens"), usage.get("output_tokens")


APIS = {
    # https://platform.openai.com/docs/api-reference/chat/create
    "openai": Api(
        "https://api.openai.com/v1",
        "chat/completions",
        "OPENAI_API_KEY",
        lambda key: {"Authorization": f"Bearer {key}"},
        "max_completion_tokens",
        _read_openai,
    ),
    # https://docs.anthropic.com/en/api/messages
    "anthropic": Api(
        "https://api.anthropic.com/v1",
        "messages",
        "ANTHROPIC_API_KEY",
        lambda key: {"x-api-key": key, "anthropic-version": "2023-06-01"},
        "max_tokens",
        _read_anthropic,
    ),
}


class LanguageModelJudge:
    """One model behind one endpoint. `fields` go into every request; a field that is None is left out."""

    def __init__(self, kind: str, model: str, endpoint: str | None, template: Template, fields: dict[str, Any]) -> None:
        """Raises UsageError for a wrong address, or where the kind's own endpoint lacks its key."""
        self.name, self.template = f"{kind}:{model}", template
        self._kind, self._model, self._api = kind, model, APIS[kind]
        base = web.checked_url((endpoint or self._api.endpoint).rstrip("/"), "judge", self._api.key_variable)
        self._key = web.key_from_environment(self._api.key_variable)
        if endpoint is None and not self._key:
            raise UsageError(f"judge {self.name}: set the environment variable {self._api.key_variable}")
        self._url = str(base.copy_with(path=f"{base.path}/{self._api.path}"))
        self.address = web.shown_url(base)
        given = {self._api.length: DEFAULT_MAX_TOKENS, "temperature": 0, **fields}
        self.request_fields = {name: value for name, value in given.items() if value is not None}

    def ask(self, pairs: Sequence[Pair], answers: Journal[Answer], concurrency: int) -> dict[Asked, Answer]:
        """The answer to each question, from the file where it was given before, else from the endpoint.

        Equal requests are sent once. One that the endpoint refuses because of its text, or on which it fails in every
        try, is left out and told on stderr. Raises PleError where the endpoint is down, UsageError where it refuses
        everything; what was answered stays in the file.
        """
        import httpx

        bodies = {(pair.query_id, order): self._body(pair, order) for pair in pairs for order in get_args(Order)}
        digests = {asked: json_digest({"api": self._kind, "body": body}) for asked, body in bodies.items()}
        distinct = {digest: asked for asked, digest in digests.items()}
        waiting = [asked for digest, asked in distinct.items() if digest not in answers]
        headers = self._api.headers(self._key) if self._key else {}
        faults = _Faults(answered=len(waiting) < len(distinct), enough=min(MOST_FAULTS, len(waiting)))
        with (
            web.open_client(
                headers=headers, timeout=TIMEOUT, limits=httpx.Limits(max_connections=concurrency)
            ) as client,
            Progress("judge", len(distinct), "answers", done=len(distinct) - len(waiting)) as progress,
        ):

            def answer(asked: Asked, stop: threading.Event) -> web.RefusedError | web.UnansweredError | None:
                try:
                    answers.add(self._post(client, asked, digests[asked], bodies[asked], stop))
                except web.RefusedError as error:
                    if error.status not in _QUERY_REFUSED:
                        raise UsageError(f"{error}: check the key, the model's name and the address") from error
                    return error
                except web.UnansweredError as error:
                    if stop.is_set():
                        raise
                    return error
                return None

            for at, fault in web.each(answer, waiting, concurrency):
                progress.advance(1)
                faults.note(waiting[at][0], fault)
        for message in faults.messages:
            print(f"judge: no verdict: {message}", file=sys.stderr)
        return {asked: answers[digest] for asked, digest in digests.items() if digest in answers}

    def _body(self, pair: Pair, order: Order) -> dict[str, Any]:
        first, second = (pair.a, pair.b) if order == "a_first" else (pair.b, pair.a)
        question = self.template.render(readable(pair.x), first, second)
        return {"model": self._model, "messages": [{"role": "user", "content": question}], **self.request_fields}

    def _post(self, client: httpx.Client, asked: Asked, digest: str, body: Any, stop: threading.Event) -> Answer:
        what = f"judge {self.name} at {self.address}"
        failed = "what was answered is kept; check the server and run the same command again"
        patience = web.Patience(TRIES, FIRST_WAIT, stop)
        response = web.ask_json(client, self._url, body, patience, what=what, failed=failed, key=self._key)
        try:
            text, finish, prompt_tokens, completion_tokens = self._api.read(parse_json(response.content))
            return Answer(
                request=digest,
                query_id=asked[0],
                order=asked[1],
                text=text.encode("utf-8", "replace").decode(),
                finish=finish and finish.encode("utf-8", "replace").decode(),
                prompt_tokens=prompt_tokens,
                completion_tokens=completion_tokens,
            )
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            got = web.excerpt(response, self._key)
            raise web.UnansweredError(f"{what}: expected the answer of the {self._kind} API, got {got}") from None


@dataclass
class _Faults:
    """Requests without an answer, and whether they are about single queries or about the settings or the server.

    answered: whether the endpoint has ever answered; enough: faults from the start that mean it never will.
    """

    answered: bool
    enough: int
    messages: list[str] = field(default_factory=list)
    _failed_in_a_row: int = 0

    def note(self, query_id: str, fault: web.RefusedError | web.UnansweredError | None) -> None:
        """Count what became of one request. Raises UsageError or PleError where going on makes no sense."""
        self._failed_in_a_row = self._failed_in_a_row + 1 if isinstance(fault, web.UnansweredError) else 0
        if fault is None:
            self.answered = True
            return
        self.messages.append(f"query {query_id!r}: {fault}")
        hopeless = not self.answered and len(self.messages) == self.enough
        if hopeless and isinstance(fault, web.RefusedError):
            raise UsageError(
                f"{self.messages[-1]} (and none of {self.enough} requests was answered): check the model's name and "
                "the request's fields; --request-arg temperature=null leaves a field out"
            )
        if hopeless or self._failed_in_a_row == MOST_FAULTS:
            raise fault


def parse_request_args(arguments: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` texts as fields; a value is JSON where it parses as such, else text. Raises UsageError."""
    fields = {}
    for argument in arguments:
        name, sign, text = argument.partition("=")
        if not sign or not name.isidentifier() or name in ("model", "messages", "stream", "n"):
            raise UsageError(f"--request-arg {argument}: expected NAME=VALUE; model, messages, stream and n are set")
        try:
            fields[name] = parse_json(text)
        except ValueError:
            fields[name] = text
        try:
            json.dumps(fields[name], allow_nan=False, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            raise UsageError(f"--request-arg {name}: no request can hold this value; correct it") from None
    return fields
