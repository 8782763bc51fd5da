"""An HTTP endpoint as reward model.

POST {"inputs": [{"x": "...", "y": "..."}, ...]}, answered by {"scores": [number, ...]} in the same order.
The key in PLE_REWARD_API_KEY, if set, is sent as `Authorization: Bearer` and is never written or shown.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ple_data.common.digests import text_digest
from ple_data.common.web import Patience, checked_url, each, excerpt, key_from_environment, post_json, shown_url
from schemas.errors import PleError
from schemas.options import Rewards

if TYPE_CHECKING:
    import httpx

API_KEY_VARIABLE = "PLE_REWARD_API_KEY"


def check(spec: str, output_index: int | None) -> None:
    """Refuse a wrong address. Raises UsageError."""
    shown(spec)


def load(spec: str, options: Rewards) -> HttpReward:
    """The endpoint; it is not asked yet."""
    return HttpReward(spec)


def shown(spec: str) -> str:
    """The address without its query and password. Raises UsageError."""
    return shown_url(checked_url(spec, "reward model", API_KEY_VARIABLE))


def recorded(url: str) -> str:
    """The address as files name it: of its query, which may hold a secret, only the digest. Raises UsageError."""
    parts = checked_url(url, "reward model", API_KEY_VARIABLE)
    return shown_url(parts) + (f"?{text_digest(parts.query.decode())}" if parts.query else "")


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
        self.name = recorded(url)
        import httpx

        self._url = url
        self._shown = shown_url(httpx.URL(url))
        self._batch_size = batch_size
        self._in_flight = in_flight
        self._tries = tries
        self._timeout = timeout
        self._first_wait = first_wait

    def score(self, rows: Sequence[tuple[str, str]]) -> list[float]:
        rewards = dict(item for batch in self.stream(rows) for item in batch)
        return [rewards[row] for row in range(len(rows))]

    def stream(self, rows: Sequence[tuple[str, str]]) -> Iterator[list[tuple[int, float]]]:
        import httpx

        starts = range(0, len(rows), self._batch_size)
        batches = [rows[start : start + self._batch_size] for start in starts]
        key = key_from_environment(API_KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with httpx.Client(headers=headers, timeout=self._timeout) as client:

            def score_batch(batch: Sequence[tuple[str, str]], stop: threading.Event) -> list[float]:
                response = post_json(
                    client,
                    self._url,
                    {"inputs": [{"x": x, "y": y} for x, y in batch]},
                    Patience(self._tries, self._first_wait, stop),
                    what=f"reward model at {self._shown}",
                    failed="what was finished before is kept; check the server and run the same command again",
                    key=key,
                )
                return self._scores(response, len(batch), key)

            for index, scores in each(score_batch, batches, self._in_flight):
                yield list(enumerate(scores, start=index * self._batch_size))

    def _scores(self, response: httpx.Response, expected: int, key: str | None) -> list[float]:
        try:
            scores = response.json()["scores"]
        except (ValueError, KeyError, TypeError):
            raise PleError(
                f'reward model at {self._shown}: expected {{"scores": [...]}}, got {excerpt(response, key)}'
            ) from None
        numbers = isinstance(scores, list) and all(type(score) in (int, float) for score in scores)
        if not numbers or len(scores) != expected:
            got = f"{len(scores)} values" if isinstance(scores, list) else type(scores).__name__
            raise PleError(
                f'reward model at {self._shown}: "scores" must be a list of {expected} numbers, got {got}: '
                f"{excerpt(response, key)}"
            )
        return [float(score) for score in scores]
