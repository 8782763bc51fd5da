"""JSON requests over HTTP for paid or busy servers: tried again where that may help, several at once.

Knows nothing of what is asked. Keys go into headers and are struck out of every message.
"""

from __future__ import annotations

import email.utils
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from ple_data.common.extras import need
from schemas.errors import PleError, UsageError

if TYPE_CHECKING:
    import httpx

RETRIED_STATUS = {408, 425, 429}
"""Answers below 500 that say 'later'; every answer from 500 on is retried too."""
LONGEST_WAIT = 60.0
"""Seconds between two tries at most, whatever the server asks for."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class RefusedError(PleError):
    """The server will not answer this request, however often it is asked."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class UnansweredError(PleError):
    """The server was reached and gave no answer to this request in all tries; it may answer others."""


def checked_url(url: str, what: str, key_variable: str) -> httpx.URL:
    """The parsed URL. Raises UsageError for one without a host, or with a user or password in it: never shown.

    Every request begins here, so this is where httpx is asked for.
    """
    need("httpx", f"a {what} behind a URL is asked with")
    import httpx

    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL:
        raise UsageError(
            f"{what}: its address is not of the form http://host:port/path (not shown, as it may hold a password): "
            "correct it"
        ) from None
    if parts.userinfo or not parts.host or parts.scheme not in ("http", "https"):
        raise UsageError(
            f"{what} at {parts.scheme}://{parts.host or '?'}: the URL needs http(s) and a host and may hold "
            f"no user or password; put the key in the environment variable {key_variable}"
        )
    return parts


def key_from_environment(variable: str) -> str | None:
    """The key in an environment variable, without white space around it; None where there is none.

    Raises UsageError, which does not show it, for one that cannot stand in a header.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"the key in {variable} holds characters that no key has (line breaks, accents): set it again")
    return key or None


def shown_url(url: httpx.URL) -> str:
    """The URL as messages show it: without its query, which may hold a secret."""
    return str(url.copy_with(query=None, fragment=None))


@dataclass(frozen=True)
class Patience:
    """How long a server is tried. first_wait: seconds, doubled every try; stop: set, it ends the waiting."""

    tries: int
    first_wait: float
    stop: threading.Event


def post_json(
    client: httpx.Client, url: str, body: Any, patience: Patience, *, what: str, failed: str, key: str | None = None
) -> httpx.Response:
    """The answer with status 200 to a JSON body; connection errors, RETRIED_STATUS and 5xx are tried again.

    what: the server as messages name it; failed: how the message after the last try ends; key: what no message may
    show. Retry-After is heeded up to LONGEST_WAIT. Raises RefusedError for any other status; after the last try
    UnansweredError where the server failed on the request (5xx, a broken or timed-out connection), PleError where it
    could not be reached or told us to wait.
    """
    import httpx

    for attempt in range(patience.tries):
        pause = patience.first_wait * 2**attempt * random.uniform(0.5, 1.0)
        try:
            response = client.post(url, json=body)
        except httpx.TransportError as error:
            fault = f"{type(error).__name__}: {error}"
            unreached = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            raised = PleError if unreached else UnansweredError
        else:
            if response.status_code == 200:
                return response
            fault = f"status {response.status_code} {excerpt(response, key)}"
            if response.status_code < 500 and response.status_code not in RETRIED_STATUS:
                raise RefusedError(f"{what} refused the request: {fault}", response.status_code)
            raised = PleError if response.status_code < 500 else UnansweredError
            pause = max(pause, _retry_after(response))
        if attempt == patience.tries - 1 or patience.stop.wait(min(pause, LONGEST_WAIT)):
            break
    raise raised(f"{what} failed {attempt + 1} times, the last with {fault}: {failed}")


def excerpt(response: httpx.Response, key: str | None = None) -> str:
    """The beginning of an answer's text for a message, the key struck out."""
    text = response.text.replace(key, "[key]") if key else response.text
    return repr(text[:200])


def each(
    work: Callable[[Item, threading.Event], Result], items: Sequence[Item], in_flight: int
) -> Iterator[tuple[int, Result]]:
    """(index, work(item, stop)) as each is done, at most `in_flight` at once.

    The first exception sets `stop`, drops what has not begun, lets what has begun come to its end, and is raised
    after the results of that.
    """
    stop, failures = threading.Event(), SimpleQueue[BaseException]()

    def guarded(item: Item) -> Result:
        if stop.is_set():
            raise CancelledError
        try:
            return work(item, stop)
        except BaseException as error:
            failures.put(error)
            stop.set()
            raise

    pool = ThreadPoolExecutor(max_workers=in_flight)
    try:
        futures = {pool.submit(guarded, item): index for index, item in enumerate(items)}
        for future in as_completed(futures):
            if future.exception() is None:
                yield futures[future], future.result()
        if not failures.empty():
            raise failures.get()
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the Retry-After header asks for (a number or a date, RFC 9110 section 10.2.3), else 0."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
