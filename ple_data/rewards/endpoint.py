"""An HTTP endpoint as reward model.

POST {"inputs": [{"x": "...", "y": "..."}, ...]}, answered by {"scores": [number, ...]} in the same order.
The key in PLE_REWARD_API_KEY, if set, is sent as `Authorization: Bearer` and is never written or shown.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ple_data.common import web
from ple_data.common.digests import text_digest
from ple_data.common.secrets import public
from ple_data.common.web import ask_json, checked_url, excerpt
from ple_data.rewards import RewardModel
from schemas.errors import PleError
from schemas.json_text import parse_json
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
    """The address without its query, and what in its path may be a key. Raises UsageError."""
    return web.shown_url(checked_url(spec, "reward model", API_KEY_VARIABLE))


def recorded(url: str) -> str:
    """The address as files name it: of a query, and of what may be a key in its path, the digest. Raises UsageError."""
    parts = checked_url(url, "reward model", API_KEY_VARIABLE)
    address = public(str(parts.copy_with(query=None, fragment=None)), text_digest)
    return address + (f"?{text_digest(parts.query.decode())}" if parts.query else "")


@dataclass
class HttpReward(RewardModel):
    """A reward model behind a URL. Several requests are in flight at once; each is tried several times.

    batch_size: rows a request; timeout: seconds a try; first_wait: seconds, doubled every try.
    """

    url: str = field(repr=False)
    batch_size: int = 32
    in_flight: int = 4
    tries: int = 6
    timeout: float = 60.0
    first_wait: float = 0.5

    def __post_init__(self) -> None:
        self.name = recorded(self.url)
        self._who = f"reward model at {shown(self.url)}"

    def stream(self, rows: Sequence[tuple[str, str]]) -> Iterator[list[tuple[int, float]]]:
        batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        key = web.key_from_environment(API_KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with web.open_client(headers=headers, timeout=self.timeout) as client:

            def score_batch(batch: Sequence[tuple[str, str]], stop: threading.Event) -> list[float]:
                response = ask_json(
                    client,
                    self.url,
                    {"inputs": [{"x": x, "y": y} for x, y in batch]},
                    web.Patience(self.tries, self.first_wait, stop),
                    what=self._who,
                    failed="what was finished before is kept; check the server and run the same command again",
                    key=key,
                )
                return self._scores(response, len(batch), key)

            for index, scores in web.each(score_batch, batches, self.in_flight):
                yield list(enumerate(scores, start=index * self.batch_size))

    def _scores(self, response: httpx.Response, expected: int, key: str | None) -> list[float]:
        try:
            scores = parse_json(response.content)["scores"]
        except (ValueError, KeyError, TypeError):
            raise PleError(f'{self._who}: expected {{"scores": [...]}}, got {excerpt(response, key)}') from None
        numbers = isinstance(scores, list) and all(
            type(score) is float or (type(score) is int and abs(score) < 1e308) for score in scores
        )
        if not numbers or len(scores) != expected:
            got = f"{len(scores)} values" if isinstance(scores, list) else type(scores).__name__
            raise PleError(
                f'{self._who}: "scores" must be a list of {expected} numbers, got {got}: {excerpt(response, key)}'
            )
        return [float(score) for score in scores]
