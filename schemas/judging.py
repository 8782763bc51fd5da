"""What judges leave while they work: answers and rewards, and what an annotation page gives back. Forms only."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from schemas.records import Record

Order = Literal["a_first", "b_first"]
Choice = Literal["first", "second", "tie"]


class Paid(Record):
    """One line of a file of what a judge gave. request: digest of all that the judge was given."""

    version: Literal[1] = 1
    request: str = Field(min_length=1)


class Answered(Paid):
    """What a language model's endpoint answered to one request, as it came: one line of a reward model's answers.

    request: digest of the API's kind and the whole request body, so that an answer is used again for the very same
    request only, at whatever address. Tokens are None where the endpoint did not say.
    """

    text: str
    finish: str | None
    prompt_tokens: int | None = Field(ge=0, le=10**12)
    completion_tokens: int | None = Field(ge=0, le=10**12)


class Answer(Answered):
    """One line of `answers.jsonl`: an answer to one query, and in which order its responses stood."""

    query_id: str
    order: Order


class Reward(Paid):
    """One line of `rewards.jsonl`: a reward model's number for one response; request: digest of its name, x and y."""

    reward: FiniteFloat


class AnnotationPage(Record):
    """`page.json` beside an annotation page: from what it was made, so that exports can be read back.

    page: digest of the texts in the order and on the sides in which the page holds them. seed: draws the queries.
    secret: draws order and sides where no seed was given (None: the seed does, as in every page of version 1).
    """

    version: Literal[1, 2] = 2
    kind: Literal["annotation page"] = "annotation page"
    page: str
    a: str
    b: str
    seed: int
    secret: int | None = None
    limit: int | None = Field(ge=1)


class Annotation(BaseModel):
    """One verdict on one query: which of the two answers, on the sides on which the page's file holds them, is better.

    swapped: whether this annotator saw them the other way round (never on a page of version 1).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    query_id: str
    choice: Choice
    swapped: bool = False

    @property
    def took_first_shown(self) -> bool:
        """Whether the annotator chose the answer on the first side of the screen."""
        return self.choice == ("second" if self.swapped else "first")


class AnnotationExport(Record):
    """The file that an annotator downloads from a page."""

    version: Literal[1, 2] = 2
    kind: Literal["annotations"] = "annotations"
    page: str
    annotator: str = Field(min_length=1)
    verdicts: list[Annotation]
