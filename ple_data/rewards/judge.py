"""A language model as reward model: it rates each response by a rubric, with a number from 1 to 10.

It is asked at an OpenAI-compatible server (`ple_data.common.llm`), and each answer is kept as it comes. It sees x, y
and the rubric, which may be the principle itself; never the prompt [p, x].
"""

import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ple_data.common.digests import json_digest
from ple_data.common.journal import Records, SharedJournal
from ple_data.common.llm import Keeping, LanguageModel, parse_request_args
from ple_data.inputs.chat import readable
from ple_data.inputs.principles import load_principle
from ple_data.rewards import LENGTH_FIELDS, RewardModel
from schemas.errors import UsageError
from schemas.files import read_given_text
from schemas.judging import Answered
from schemas.options import Rewards

LOWEST, HIGHEST = 1, 10
IN_FLIGHT = 8
AGAIN = "Answer with your rating alone, a number from 1 to 10 in double brackets, and with no other word: [[N]]"
"""What is added where an answer holds no rating."""
_PLACEHOLDER = re.compile(r"\{(rubric|mark|query|response)\}")
_MARKS = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
_RATING = re.compile(r"\s*([0-9]{1,2}(?:\.[0-9]{1,6})?)\s*")
_END = re.compile(r"[\s*_.]*")


class _Model(LanguageModel):
    role, field_option, address_option = "reward model", "--reward-arg", "--reward-endpoint"
    uncounted = LENGTH_FIELDS


def check(spec: str, options: Rewards) -> None:
    """Refuse a judge without a name or a rubric, and wrong settings. Raises UsageError."""
    JudgeReward(spec, options)


def load(spec: str, options: Rewards, keep: Path | None = None) -> "JudgeReward":
    """The judge; it is not asked yet."""
    return JudgeReward(spec, options, keep)


class JudgeReward(RewardModel):
    """A language model with a rubric. Its name holds a digest of the rubric, the question and the request's fields, but
    of the bound on an answer's length: what was rated stays so under another one.
    """

    def __init__(self, spec: str, options: Rewards, keep: Path | None = None) -> None:
        """keep: the folder of its answers. Raises UsageError."""
        model = spec.removeprefix("judge:")
        if not model:
            raise UsageError(f"reward model {spec}: expected judge:MODEL, the model's name at the server")
        if options.rubric is None:
            raise UsageError(f"reward model {spec}: give --rubric, the principle or a text file by which it rates")
        self._rubric = load_principle(options.rubric).text
        if not self._rubric:
            raise UsageError(f"--rubric {options.rubric} is empty; write the rules by which responses are rated")
        fields = parse_request_args(options.reward_arg, _Model.field_option)
        self._model = _Model("openai", model, options.reward_endpoint, fields)
        self._template = read_given_text(Path(__file__).with_suffix(".txt"), "question")
        self._in_flight = options.reward_concurrency or IN_FLIGHT
        self._keep = keep
        self._answers: Records[Answered] = Records() if keep is None else SharedJournal(keep, Answered)
        about = [self._rubric, self._template, AGAIN, self._model.counted(self._model.request_fields)]
        shown = f"judge:{Path(model).name}" if Path(model).is_absolute() else spec  # a server's folder is its own
        self.name = f"{shown}@{json_digest([*about, model] if shown != spec else about)}"

    def stream(self, rows: Sequence[tuple[str, str]]) -> Iterator[list[tuple[int, float]]]:
        """Those that are rated as they are, at the end those that are not, as NaN. An answer without a rating is asked
        for once more; where two were without one in an earlier run, both are asked for again.
        """
        if isinstance(self._answers, SharedJournal):
            self._answers.refresh()
        first = {row: self._question(x, y) for row, (x, y) in enumerate(rows)}
        second = {row: f"{question}\n{AGAIN}\n" for row, question in first.items()}
        for row, question in first.items():
            both = [self._model.digest(text) for text in (question, second[row])]
            if all(digest in self._answers and math.isnan(self._rating(digest)) for digest in both):
                for digest in both:
                    self._answers.pop(digest, None)
        keeping: Keeping[int, Answered] = Keeping(
            self._answers, lambda _, found: Answered(**found), lambda row: _named(*rows[row])
        )
        why: dict[int, str | None] = dict.fromkeys(first)
        for questions in (first, second):
            asked = {row: questions[row] for row, fault in why.items() if fault is None}
            for row, why[row] in self._model.ask(asked, keeping, self._in_flight):
                rating = math.nan if why[row] else self._rating(self._model.digest(asked[row]))
                if not math.isnan(rating):
                    del why[row]
                    yield [(row, rating)]
        if why:
            self._tell(why)
            yield [(row, math.nan) for row in sorted(why)]

    def _tell(self, why: dict[int, str | None]) -> None:
        for fault in filter(None, dict.fromkeys(why.values())):
            print(f"no rating: {fault}", file=sys.stderr)
        if silent := sum(fault is None for fault in why.values()):
            where = f"; see {self._keep}" if self._keep else ""
            print(
                f"{self.name} gave {silent} responses no rating from {LOWEST} to {HIGHEST} in two answers{where}: they "
                "are asked for again when the same command is",
                file=sys.stderr,
            )

    def _question(self, x: str, y: str) -> str:
        """The question; its mark is of these texts, so that a response cannot hold the line that would end it."""
        values = {"rubric": self._rubric, "query": readable(x), "response": y, "mark": json_digest([x, y])}
        return _PLACEHOLDER.sub(lambda found: values[found.group(1)], self._template)

    def _rating(self, digest: str) -> float:
        return rating_of(self._answers[digest].text)


def rating_of(answer: str) -> float:
    """The number from 1 to 10 with which an answer ends, in double brackets; NaN where there is none, or another too.

    >>> rating_of("It is kind. [[7.5]]"), rating_of("It says [[10]]. [[2]]"), rating_of("[[11]]"), rating_of("7")
    (7.5, nan, nan, nan)
    """
    marks = list(_MARKS.finditer(answer))
    found = _RATING.fullmatch(marks[-1].group(1)) if marks else None
    if not found or len({mark.group(1).strip() for mark in marks}) > 1 or not _END.fullmatch(answer[marks[-1].end() :]):
        return math.nan
    rating = float(found.group(1))
    return rating if LOWEST <= rating <= HIGHEST else math.nan


def _named(x: str, y: str) -> str:
    return f"the response that begins {y[:40]!r} to the query that begins {readable(x)[:40]!r}"
