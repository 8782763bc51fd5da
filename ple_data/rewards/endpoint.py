"""An HTTP endpoint as reward model, asked in one of the forms of `ple_data.rewards.forms`.

The key in PLE_REWARD_API_KEY, if set, is sent as `Authorization: Bearer` and is never written or shown.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ple_data.common import web
from ple_data.common.digests import text_digest
from ple_data.common.secrets import public
from ple_data.common.web import ask_json, checked_url, excerpt
from ple_data.rewards import RewardModel
from ple_data.rewards.forms import FORMS, number_of
from schemas.errors import PleError, UsageError
from schemas.json_text import parse_json
from schemas.options import Rewards

if TYPE_CHECKING:
    import httpx

API_KEY_VARIABLE = "PLE_REWARD_API_KEY"


def check(spec: str, options: Rewards) -> None:
    """Refuse a wrong address, or a --join that the form does not have. Raises UsageError."""
    HttpReward(spec, options)


def takes(options: Rewards) -> set[str]:
    """What the form of the requests has."""
    joins = FORMS[options.reward_format].joins
    return ({"join"} if options.join in joins else set()) | ({"output_index"} if joins else set())


def load(spec: str, options: Rewards) -> HttpReward:
    """The endpoint. It is not asked yet, but whether it has a chat template where the form and `auto` leave that open.

    Raises UsageError, PleError.
    """
    found = HttpReward(spec, options)
    found.choose_join()
    return found


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

    batch_size: rows a request; in_flight: requests, where `how` has none; timeout: seconds a try; first_wait: seconds,
    doubled every try.
    """

    url: str = field(repr=False)
    how: Rewards = field(default_factory=Rewards)
    batch_size: int = 32
    in_flight: int = 4
    tries: int = 6
    timeout: float = 60.0
    first_wait: float = 0.5

    def __post_init__(self) -> None:
        self._form = FORMS[self.how.reward_format]
        format, joins = self.how.reward_format, self._form.joins or ("auto",)
        if self.how.join not in joins:
            raise UsageError(f"--join {self.how.join}: --reward-format {format} has {', '.join(joins)}")
        if self.how.output_index is not None and not self._form.joins:
            raise UsageError(f"--output-index {self.how.output_index}: --reward-format {format} gives one number a row")
        parts = checked_url(self.url, "reward model", API_KEY_VARIABLE)
        if self._form.path and parts.path == "/":
            self.url = str(parts.copy_with(path=self._form.path))
        self._who = f"reward model at {shown(self.url)}"
        self._join = self.how.join
        self._set_name()

    def _set_name(self) -> None:
        self.name = recorded(self.url)
        if self.how.reward_format != "ple":
            output = "" if self.how.output_index is None else f"[{self.how.output_index}]"
            told = self.how.join != "auto" or "chat" in self._form.joins  # else there is but one
            joined = f"+{self._join}" if told and self._join != "auto" else ""
            self.name = f"{self.how.reward_format}{output}{joined}:{self.name}"

    def choose_join(self) -> None:
        """How x and y are joined where that was left open: a server that refuses a chat has no chat template."""
        if not self._form.joins:
            return
        if self._join == "auto":
            self._join = self._form.joins[-1]
            try:
                if self._join == "chat":
                    self.score([("x", "y")])
            except web.RefusedError as error:
                if error.status != 400:
                    raise
                self._join = "text"
            self._set_name()
            if "chat" in self._form.joins:
                print(f"{self._who}: it reads x and y as --join {self._join} has them", file=sys.stderr)
        self.runs_on = self._join == "text"

    def stream(self, rows: Sequence[tuple[str, str]]) -> Iterator[list[tuple[int, float]]]:
        size = 1 if self._join == "chat" else self.batch_size  # vLLM takes one chat a request
        in_flight = self.how.reward_concurrency or self.in_flight * (8 if self._join == "chat" else 1)
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        key = web.key_from_environment(API_KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with web.open_client(in_flight, headers=headers, timeout=self.timeout) as client:

            def score_batch(batch: Sequence[tuple[str, str]], stop: threading.Event) -> list[float]:
                response = ask_json(
                    client,
                    self.url,
                    self._form.body(batch, self._join),
                    web.Patience(self.tries, self.first_wait, stop),
                    what=self._who,
                    failed="what was finished before is kept; check the server and run the same command again",
                    key=key,
                )
                return self._scores(response, len(batch), key)

            for index, scores in web.each(score_batch, batches, in_flight):
                yield list(enumerate(scores, start=index * size))

    def _scores(self, response: httpx.Response, expected: int, key: str | None) -> list[float]:
        try:
            values = self._form.read(parse_json(response.content))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise PleError(f"{self._who}: expected {self._form.answer}, got {excerpt(response, key)}") from None
        lists = bool(self._form.joins)
        rows = values if isinstance(values, list) else []
        scores = [number_of(row, self.how.output_index) if lists or type(row) is not list else None for row in rows]
        if several := next((score for score in scores if isinstance(score, str)), None):
            raise UsageError(f"{self._who}: {several}")
        found = [score for score in scores if isinstance(score, float)]
        if len(found) != expected or len(scores) != expected:
            got = f"{len(scores)} values" if isinstance(values, list) else type(values).__name__
            raise PleError(
                f'{self._who}: "{self._form.field}" must be a list of {expected} numbers, got {got}: '
                f"{excerpt(response, key)}"
            )
        return found
