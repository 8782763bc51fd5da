"""A language model as pairwise judge: every query is asked twice, with the responses in both orders."""

import sys
from collections.abc import Sequence
from typing import Any, get_args

from ple_data.common.journal import Journal
from ple_data.common.llm import Keeping, LanguageModel
from ple_data.inputs.chat import readable
from ple_data.judge.prompt import Template
from ple_data.judge.sources import Pair
from schemas.judging import Answer, Order

Asked = tuple[str, Order]
"""A question: its query id, and which response stands first."""


class LanguageModelJudge(LanguageModel):
    """One model behind one endpoint, asked by a template."""

    def __init__(self, kind: str, model: str, endpoint: str | None, template: Template, fields: dict[str, Any]) -> None:
        super().__init__(kind, model, endpoint, fields)
        self.template = template

    def verdicts(self, pairs: Sequence[Pair], answers: Journal[Answer], concurrency: int) -> dict[Asked, Answer]:
        """The answer to each question, from the file where it was given before, else from the endpoint.

        One without an answer is left out and told on stderr. Raises as `ask` does.
        """
        questions = {(pair.query_id, order): self._question(pair, order) for pair in pairs for order in get_args(Order)}
        keeping: Keeping[Asked, Answer] = Keeping(
            answers,
            lambda asked, found: Answer(query_id=asked[0], order=asked[1], **found),
            lambda asked: f"query {asked[0]!r}",
            "judge",
        )
        told = dict(self.ask(questions, keeping, concurrency))
        for message in filter(None, dict.fromkeys(told.values())):
            print(f"judge: no verdict: {message}", file=sys.stderr)
        return {asked: answers[self.digest(questions[asked])] for asked, why in told.items() if why is None}

    def _question(self, pair: Pair, order: Order) -> str:
        first, second = (pair.a, pair.b) if order == "a_first" else (pair.b, pair.a)
        return self.template.render(readable(pair.x), first, second)
