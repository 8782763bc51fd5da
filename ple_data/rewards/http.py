"""An HTTP endpoint as reward model.

POST {"inputs": [{"x": "...", "y": "..."}, ...]}, answered by {"scores": [number, ...]} in the same order.
The key in PLE_REWARD_API_KEY, if set, is sent as `Authorization: Bearer` and is never written or shown.
"""

import email.utils
import os
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import httpx

from ple_data.digests import text_digest
from schemas.errors import PleError, UsageError

API_KEY_VARIABLE = "PLE_REWARD_API_KEY"
RETRIED_STATUS = {408, 425, 429}
"""Answers below 500 that say 'later'; every answer from 500 on is retried too."""
LONGEST_WAIT = 60.0
"""Seconds between two tries at most, whatever the server asks for."""


class HttpReward:
    """A reward model behind a URL. Several requests are in flight at once; each is tried several times."""

    truncated = 0

    def __init__(
        self,
        url: str,
        *,
        batch_size: int = 32,
        in_flight: int = 4,
        tries: int = 6,
        timeout: float = 60.0,
        first_wait: float = 0.5,
    ) -> None:
        """batch_size: rows a request; timeout: seconds a try; first_wait: seconds, doubled every try."""
        parts = httpx.URL(url)
        if parts.userinfo or not parts.host:
            raise UsageError(
                f"reward model at {parts.scheme}://{parts.host or '?'}: the URL needs a host and may hold "
                f"no user or password; put the key in the environment variable {API_KEY_VARIABLE}"
            )
        self._url = url
        self._shown = str(parts.copy_with(query=None, fragment=None))
        self.name = self._shown + (f"?{text_digest(parts.query.decode())}" if parts.query else "")
        self._batch_size = batch_size
        self._in_flight = in_flight
        self._tries = tries
        self._timeout = timeout
        self._first_wait = first_wait

    def score(self, rows: Sequence[tuple[str, str]]) -> list[float]:
        starts = range(0, len(rows), self._batch_size)
        batches = [rows[start : start + self._batch_size] for start in starts]
        key = os.environ.get(API_KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        stop = threading.Event()
        with (
            httpx.Client(headers=headers, timeout=self._timeout) as client,
            ThreadPoolExecutor(max_workers=self._in_flight) as pool,
        ):
            try:
                futures = [pool.submit(self._score_batch, client, batch, stop) for batch in batches]
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()  # raises what the first failed request raised
                return [score for future in futures for score in future.result()]
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _score_batch(
        self, client: httpx.Client, batch: Sequence[tuple[str, str]], stop: threading.Event
    ) -> list[float]:
        body = {"inputs": [{"x": x, "y": y} for x, y in batch]}
        for attempt in range(self._tries):
            pause = self._first_wait * 2**attempt * random.uniform(0.5, 1.0)
            try:
                response = client.post(self._url, json=body)
            except httpx.TransportError as error:
                fault = f"{type(error).__name__}: {error}"
            else:
                if response.status_code == 200:
                    return self._scores(response, len(batch))
                fault = f"status {response.status_code} {response.text[:200]!r}"
                if response.status_code < 500 and response.status_code not in RETRIED_STATUS:
                    raise PleError(f"reward model at {self._shown} refused the request: {fault}")
                pause = max(pause, _retry_after(response))
            last = attempt == self._tries - 1
            if last or stop.wait(min(pause, LONGEST_WAIT)):
                break
        raise PleError(
            f"reward model at {self._shown} failed {attempt + 1} times, the last with {fault}: nothing of "
            "this unit was kept; check the server and run the same command again"
        )

    def _scores(self, response: httpx.Response, expected: int) -> list[float]:
        try:
            scores = response.json()["scores"]
        except (ValueError, KeyError, TypeError):
            raise PleError(
                f'reward model at {self._shown}: expected {{"scores": [...]}}, got {response.text[:200]!r}'
            ) from None
        numbers = isinstance(scores, list) and all(type(score) in (int, float) for score in scores)
        if not numbers or len(scores) != expected:
            got = f"{len(scores)} values" if isinstance(scores, list) else type(scores).__name__
            raise PleError(
                f'reward model at {self._shown}: "scores" must be a list of {expected} numbers, got {got}: '
                f"{response.text[:200]!r}"
            )
        return [float(score) for score in scores]


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the Retry-After header asks for (a number or a date, RFC 9110 section 10.2.3), else 0."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
