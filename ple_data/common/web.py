"""JSON requests over HTTP for paid or busy servers: tried again where that may help, several at once.

Knows nothing of what is asked. Keys go into headers and are struck out of every message. What a server may cost is
bounded: the time and the size of an answer, and the wait that it may ask for.
"""

from __future__ import annotations

import contextlib
import email.utils
import os
import random
import re
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from ple_data.common.extras import need
from ple_data.common.secrets import public, remember
from schemas.errors import PleError, UsageError, first_line

if TYPE_CHECKING:
    import httpx

RETRIED_STATUS = {408, 425, 429}
"""Answers below 500 that say 'later'; every answer from 500 on is retried too."""
LONGEST_WAIT, LONGEST_ASKED = 60.0, 600.0
"""Seconds between two tries at most, and the wait at which a server that asks for more is not tried again."""
MOST_BYTES, WHOLE = 16 * 2**20, 1.5
"""An answer's size at most, as it comes and unpacked; and its time, as a multiple of the client's timeout."""

HERE = ("all://127.0.0.1", "all://localhost", "all://[::1]")
"""This machine, which no proxy reaches for us."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class RefusedError(PleError):
    """The server will not answer this request, however often it is asked."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class UnansweredError(PleError):
    """The server was reached and gave no answer to this request in all tries; it may answer others. status: that of
    the last try, where it had one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def checked_url(url: str, what: str, key_variable: str) -> httpx.URL:
    """The parsed URL. Raises UsageError for one without a host, or with a user or password in it: never shown.

    Every request begins here, so this is where httpx is asked for.
    """
    need("httpx", f"a {what} behind a URL is asked with")
    import httpx

    try:
        parts = httpx.URL(url)
        named = bool(parts.host and parts.raw_host.decode().encode("idna"))  # as a connection will spell it
    except (httpx.InvalidURL, ValueError):
        raise UsageError(
            f"{what}: its address is not of the form http://host:port/path (not shown, as it may hold a password): "
            "correct it"
        ) from None
    if not named or parts.scheme not in ("http", "https"):
        raise UsageError(f"{what}: its address needs http or https and a host, as in http://host:8000")
    if parts.userinfo:
        raise UsageError(
            f"{what} at {parts.scheme}://{parts.host}: the address may hold no user or password; put the key in the "
            f"environment variable {key_variable}"
        )
    remember(str(parts))
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
    """The URL as messages show it: without its query and the parts of its path that may be a key."""
    return public(str(url.copy_with(query=None, fragment=None)))


def open_client(connections: int, **options: Any) -> httpx.Client:
    """A client with so many connections at most, none used twice, so that each can be cut. Raises UsageError."""
    import httpx

    headers = {"Connection": "close", "Accept-Encoding": "identity", **options.pop("headers", {})}
    try:
        limits = httpx.Limits(max_connections=connections)
        return httpx.Client(headers=headers, limits=limits, mounts=dict.fromkeys(HERE), **options)
    except (ValueError, ImportError, OSError, httpx.InvalidURL) as error:
        raise _unreachable(error) from None


def _unreachable(error: Exception) -> UsageError:
    """That the environment's certificates or proxies are wrong: names their variables, and not what these hold."""
    part = "SSL_CERT_" if isinstance(error, OSError) else "_PROXY"
    given = ", ".join(name for name, value in os.environ.items() if value and part in name.upper())
    why = first_line(error) if isinstance(error, OSError | ImportError) else "an address is not http://host:port"
    return UsageError(f"this environment allows no HTTP client ({why}): correct {given or 'its proxies'}")


class Cut:
    """Ends all requests in flight that were made with it, and those to come."""

    def __init__(self) -> None:
        self._ways, self._lock, self._over = set[Callable[[], None]](), threading.Lock(), False

    def now(self) -> None:
        with self._lock:
            self._over, ways = True, list(self._ways)
        for way in ways:
            way()

    @contextlib.contextmanager
    def by(self, way: Callable[[], None]) -> Iterator[None]:
        """While this is entered, `way` ends a request."""
        with self._lock:
            self._ways.add(way)
            over = self._over
        if over:
            way()
        try:
            yield
        finally:
            with self._lock:
                self._ways.discard(way)


@dataclass(frozen=True)
class Patience:
    """How long a server is tried. first_wait: seconds, doubled every try; stop: set, it ends the waiting; cut: ends a
    request in flight."""

    tries: int
    first_wait: float
    stop: threading.Event
    cut: Cut = field(default_factory=Cut)


def ask_json(
    client: httpx.Client, url: str, body: Any, patience: Patience, *, what: str, failed: str, key: str | None = None
) -> httpx.Response:
    """The answer with status 200 to a JSON body, or to a GET where there is none. Connection errors, RETRIED_STATUS and
    5xx are tried again.

    what: the server as messages name it; failed: how the message after the last try ends; key: what no message may
    show. Retry-After is heeded up to LONGEST_WAIT. Raises RefusedError for any other status; UnansweredError where the
    server failed on the request in all tries (5xx, a broken or timed-out connection), or at once where its answer is
    too large, too slow or packed wrongly; PleError where it could not be reached or told us to wait.
    """
    import httpx

    raised: Callable[[str], PleError]
    for attempt in range(patience.tries):
        pause = patience.first_wait * 2**attempt * random.uniform(0.5, 1.0)
        try:
            response = _exchange(client, url, body, patience.cut)
        except UnansweredError as error:
            raise UnansweredError(f"{what} {error}: {failed}") from error
        except UnicodeError as error:  # no host has such a name: the server's was looked at, so it is a proxy's
            raise _unreachable(error) from None
        except httpx.TransportError as error:
            fault = f"{type(error).__name__}: {first_line(error)}"
            unreached = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            raised = PleError if unreached else UnansweredError
        else:
            if response.status_code == 200:
                return response
            fault = f"status {response.status_code} {excerpt(response, key)}"
            fault += ", a redirect: give the address to which it leads" if response.is_redirect else ""
            if response.status_code < 500 and response.status_code not in RETRIED_STATUS:
                raise RefusedError(f"{what} refused the request: {fault}", response.status_code)
            later = response.status_code < 500
            raised = PleError if later else partial(UnansweredError, status=response.status_code)
            asked = _retry_after(response)
            if asked > LONGEST_ASKED:
                raise PleError(f"{what} asks to wait for {asked:.0f} seconds ({fault}): {failed}")
            pause = max(pause, asked)
        if attempt == patience.tries - 1 or patience.stop.wait(min(pause, LONGEST_WAIT)):
            break
    raise raised(f"{what} failed {attempt + 1} times, the last with {fault}: {failed}")


def _exchange(client: httpx.Client, url: str, body: Any, ends: Cut) -> httpx.Response:
    """One try: the whole answer, unpacked. Raises httpx.TransportError, and UnansweredError without the server's name
    where another try would end no better.
    """
    import httpx

    seconds, raw = WHOLE * (client.timeout.read or 0.0), bytearray()
    late = UnansweredError(f"gave no whole answer in {seconds:.0f} seconds")
    with _deadline(seconds, ends) as (over, trace):
        try:
            how: dict[str, Any] = {} if body is None else {"json": body}
            with client.stream("POST" if how else "GET", url, **how, extensions={"trace": trace}) as found:
                for part in found.iter_raw():
                    raw += part
                    if len(raw) > MOST_BYTES:
                        raise UnansweredError(f"gave an answer of more than {MOST_BYTES} bytes")
        except httpx.TransportError as error:
            raise late if over.is_set() else error from error
        if over.is_set():  # where the end of the connection is the end of the answer
            raise late
    kept = [(name, value) for name, value in found.headers.raw if name.lower() in (b"location", b"retry-after")]
    content = _unpacked(bytes(raw), found.headers.get("Content-Encoding", ""))
    return httpx.Response(found.status_code, headers=kept, content=content)


@contextlib.contextmanager
def _deadline(seconds: float, ends: Cut) -> Iterator[tuple[threading.Event, Callable[[str, dict[str, Any]], None]]]:
    """Cut a request's connection when its time or all is over, in a handshake, headers or the body: whether that was
    done, and the trace of httpx that finds the connection. Its socket is duplicated, as TLS takes the first one over.
    """
    over, sockets = threading.Event(), list[socket.socket]()

    def cut() -> None:
        over.set()
        for connection in sockets:
            with contextlib.suppress(OSError):  # it has ended by itself
                connection.shutdown(socket.SHUT_RDWR)

    def trace(event: str, info: dict[str, Any]) -> None:
        if event.endswith("connect_tcp.complete"):
            sockets.append(info["return_value"].get_extra_info("socket").dup())
            if over.is_set():
                cut()

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        with ends.by(cut):
            yield over, trace
    finally:
        timer.cancel()
        timer.join()
        for connection in sockets:
            connection.close()


def _unpacked(raw: bytes, encoding: str) -> bytes:
    """The bytes of an answer that a server packed although it was asked not to; never more than MOST_BYTES."""
    if encoding.strip().lower() in ("", "identity"):
        return raw
    unpacker = zlib.decompressobj(wbits=47)  # gzip or zlib
    try:
        content = unpacker.decompress(raw, MOST_BYTES + 1)
    except zlib.error as error:
        raise UnansweredError(f"packed its answer as {encoding[:40]!r}, which does not unpack ({error})") from error
    if len(content) > MOST_BYTES or not unpacker.eof:
        wrong = f"is more than {MOST_BYTES} bytes" if len(content) > MOST_BYTES else "was cut short"
        raise UnansweredError(f"gave an answer that {wrong}, packed in {len(raw)} bytes")
    return content


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
    if re.fullmatch("[0-9]{1,300}", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
