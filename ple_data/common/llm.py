"""A language model as judge or as reward model, behind an OpenAI-compatible endpoint or the Anthropic API.

Each answer is kept as it arrives. The key comes from the environment and goes into a header; it is never written or
shown. What is asked, and what an answer means, is not known here.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ple_data.common import web
from ple_data.common.digests import json_digest
from ple_data.common.journal import Records
from ple_data.common.progress import Progress
from schemas.errors import UsageError
from schemas.json_text import parse_json
from schemas.judging import Answered, Paid

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

Asked = TypeVar("Asked")
Kept = TypeVar("Kept", bound=Paid)


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


@dataclass(frozen=True)
class Keeping(Generic[Asked, Kept]):
    """Where answers are kept. make: the record of one, from what was asked and the fields of an `Answered`; name: what
    messages call what was asked; label: of the progress, if there is to be one.
    """

    answers: Records[Kept]
    make: Callable[[Asked, dict[str, Any]], Kept]
    name: Callable[[Asked], str]
    label: str | None = None


class LanguageModel:
    """One model behind one endpoint. `fields` go into every request; a field that is None is left out."""

    role, field_option, address_option = "judge", "--request-arg", "--endpoint"
    """What messages call it, and the options that give a field and its address."""
    uncounted: Collection[str] = ()
    """Fields of a request whose change makes no other question of it."""

    def __init__(self, kind: str, model: str, endpoint: str | None, fields: dict[str, Any]) -> None:
        """Raises UsageError for a wrong address, or where the kind's own endpoint lacks its key."""
        self.name = f"{kind}:{model}"
        self._kind, self._model, self._api = kind, model, APIS[kind]
        base = web.checked_url((endpoint or self._api.endpoint).rstrip("/"), self.role, self._api.key_variable)
        self._key = web.key_from_environment(self._api.key_variable)
        if endpoint is None and not self._key:
            raise UsageError(
                f"{self.role} {self.name}: set the environment variable {self._api.key_variable}, or give the address "
                f"of a server of your own with {self.address_option}"
            )
        self._url = str(base.copy_with(path=f"{base.path}/{self._api.path}"))
        self.address = web.shown_url(base)
        self._who = f"{self.role} {self.name} at {self.address}"
        given = {self._api.length: DEFAULT_MAX_TOKENS, "temperature": 0, **fields}
        self._faults = _Faults(self.field_option)
        self.request_fields = {name: value for name, value in given.items() if value is not None}

    def digest(self, question: str) -> str:
        """Of the request, but of its `uncounted` fields: that of the answer's record."""
        return json_digest({"api": self._kind, "body": self.counted(self._body(question))})

    def counted(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a request's fields that tell its answer from others."""
        return {name: value for name, value in fields.items() if name not in self.uncounted}

    def ask(
        self, questions: Mapping[Asked, str], keeping: Keeping[Asked, Kept], concurrency: int
    ) -> Iterator[tuple[Asked, str | None]]:
        """What was asked, as its answer is among those kept or it is given up, and then why: at first what was answered
        before.

        Equal requests are sent once. One is given up that the endpoint refuses because of its text, or on which it
        fails in every try. Raises PleError where the endpoint is down, UsageError where it refuses everything; what was
        answered is kept.
        """
        digests = {asked: self.digest(question) for asked, question in questions.items()}
        same: dict[str, list[Asked]] = {}
        for asked, digest in digests.items():
            same.setdefault(digest, []).append(asked)
        waiting = [alike for digest, alike in same.items() if digest not in keeping.answers]
        yield from ((asked, None) for asked, digest in digests.items() if digest in keeping.answers)
        if not waiting:
            return
        headers = self._api.headers(self._key) if self._key else {}
        self._faults.begin(answered=len(waiting) < len(same), enough=min(MOST_FAULTS, len(waiting)))
        with contextlib.ExitStack() as stack:
            client = stack.enter_context(web.open_client(concurrency, headers=headers, timeout=TIMEOUT))
            progress = None
            if keeping.label:
                told = Progress(keeping.label, len(same), "answers", done=len(same) - len(waiting))
                progress = stack.enter_context(told)

            def answer(alike: Sequence[Asked], stop: threading.Event) -> web.RefusedError | web.UnansweredError | None:
                asked = alike[0]
                try:
                    found = self._post(client, self._body(questions[asked]), stop)
                    keeping.answers.add(keeping.make(asked, {"request": digests[asked], **found}))
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
                if progress:
                    progress.advance(1)
                why = self._faults.note(keeping.name(waiting[at][0]), fault)
                yield from ((asked, why) for asked in waiting[at])

    def _body(self, question: str) -> dict[str, Any]:
        return {"model": self._model, "messages": [{"role": "user", "content": question}], **self.request_fields}

    def _post(self, client: httpx.Client, body: Any, stop: threading.Event) -> dict[str, Any]:
        """The answer's fields, without the digest of its request."""
        failed = "what was answered is kept; check the server and run the same command again"
        patience = web.Patience(TRIES, FIRST_WAIT, stop)
        response = web.ask_json(client, self._url, body, patience, what=self._who, failed=failed, key=self._key)
        try:
            text, finish, prompt_tokens, completion_tokens = self._api.read(parse_json(response.content))
            return Answered(
                request="-",
                text=text.encode("utf-8", "replace").decode(),
                finish=finish and finish.encode("utf-8", "replace").decode(),
                prompt_tokens=prompt_tokens,
                completion_tokens=completion_tokens,
            ).model_dump(include={"text", "finish", "prompt_tokens", "completion_tokens"})
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            got = web.excerpt(response, self._key)
            raise web.UnansweredError(f"{self._who}: expected the answer of the {self._kind} API, got {got}") from None


@dataclass
class _Faults:
    """Requests without an answer, and whether they are about single queries or about the settings or the server.

    option: of a request's field. answered: whether the endpoint has ever answered; enough: faults from the start that
    mean it never will.
    """

    option: str
    answered: bool = False
    enough: int = 0
    _count: int = 0
    _failed_in_a_row: int = 0

    def begin(self, *, answered: bool, enough: int) -> None:
        """Of some more questions."""
        self.answered, self.enough = self.answered or answered, enough
        self._count = self._failed_in_a_row = 0

    def note(self, name: str, fault: web.RefusedError | web.UnansweredError | None) -> str | None:
        """Count what became of one request → why it has no answer. Raises UsageError or PleError where going on makes
        no sense.
        """
        self._failed_in_a_row = self._failed_in_a_row + 1 if isinstance(fault, web.UnansweredError) else 0
        if fault is None:
            self.answered = True
            return None
        self._count += 1
        message = f"{name}: {fault}"
        hopeless = not self.answered and self._count == self.enough
        if hopeless and isinstance(fault, web.RefusedError):
            raise UsageError(
                f"{message} (and none of {self.enough} requests was answered): check the model's name and "
                f"the request's fields; {self.option} temperature=null leaves a field out"
            )
        if hopeless or self._failed_in_a_row == MOST_FAULTS:
            raise fault
        return message


def parse_request_args(arguments: Sequence[str], option: str = LanguageModel.field_option) -> dict[str, Any]:
    """`NAME=VALUE` texts as fields; a value is JSON where it parses as such, else text. Raises UsageError."""
    fields = {}
    for argument in arguments:
        name, sign, text = argument.partition("=")
        if not sign or not name.isidentifier() or name in ("model", "messages", "stream", "n"):
            raise UsageError(f"{option} {argument}: expected NAME=VALUE; model, messages, stream and n are set")
        try:
            fields[name] = parse_json(text)
        except ValueError:
            fields[name] = text
        try:
            json.dumps(fields[name], allow_nan=False, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            raise UsageError(f"{option} {name}: no request can hold this value; correct it") from None
    return fields
