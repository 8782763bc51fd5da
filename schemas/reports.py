"""The JSON results that measuring commands leave for `ple report` and for other programs: forms only, nothing computed.

Written by `ple eval`, `ple judge` and `ple purity`; every number is in the units of what it measures.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from schemas.records import Record


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Estimate(_Part):
    """A mean (or a corpus statistic) with its 95 % bootstrap interval over `count` queries."""

    mean: float
    low: float
    high: float
    count: int = Field(ge=1)

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


class RewardModelUse(_Part):
    """A reward model of a report, and whether its rewards trained one of the policies."""

    name: str
    trained: bool


class PolicyResult(_Part):
    """One policy's metrics. `label` is for people, `policy` the digest name of the stores."""

    label: str
    policy: str
    metrics: dict[str, Estimate]


class Comparison(_Part):
    """Mean of (label's value - baseline's value) on the same queries."""

    label: str
    baseline: str
    metric: str
    difference: Estimate


class EvalReport(Record):
    """`eval.json` of `ple eval`. Metrics: perplexity, bleu, length, truncated, distinct_1, distinct_2, reward:NAME."""

    version: Literal[1] = 1
    kind: Literal["eval"] = "eval"
    queries: str
    seed: int
    reward_models: list[RewardModelUse]
    bleu_signature: str | None
    policies: list[PolicyResult]
    comparisons: list[Comparison]


class JudgePart(_Part):
    """The verdicts of some queries (`by` kind) or of one person on all queries that this person judged (annotator)."""

    by: Literal["kind", "annotator"]
    name: str
    wins: int = Field(ge=0)
    ties: int = Field(ge=0)
    losses: int = Field(ge=0)
    unparsed: int = Field(ge=0)
    win_rate: Estimate | None


class JudgeReport(Record):
    """`judge.json` of `ple judge A B`: verdicts by query, each asked in both orders; wins are A's.

    win_rate: (wins + ties / 2) / (wins + ties + losses), None without any of them. unparsed: queries of which a
    language model's answer held no verdict; they count nowhere else. template: digest of the prompt template.
    only_a, only_b: queries that only one side has, left out. kappa: Fleiss' kappa over the `kappa_queries` queries that
    every annotator judged.
    """

    version: Literal[1] = 1
    kind: Literal["judge"] = "judge"
    a: str
    b: str
    judge: str
    template: str | None = None
    wins: int = Field(ge=0)
    ties: int = Field(ge=0)
    losses: int = Field(ge=0)
    unparsed: int = Field(ge=0)
    win_rate: Estimate | None
    parts: list[JudgePart] = Field(default_factory=list)
    only_a: int = Field(default=0, ge=0)
    only_b: int = Field(default=0, ge=0)
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)
    annotators: int = Field(default=0, ge=0)
    kappa: float | None = None
    kappa_queries: int = Field(default=0, ge=0)


class PurityBin(_Part):
    """Pairs with a margin in [low, high), and how many of them have log pi(y_prompt|x) > log pi(y|x)."""

    low: float
    high: float
    pairs: int = Field(ge=0)
    agree: int = Field(ge=0)


class PurityRound(_Part):
    """One policy on the pairs of one round. `smallest_e`: by purity ('1.0', '0.95', '0.9') the least margin e whose
    level set {s_prompt - s >= e} is that pure; None where there is none.
    """

    round: int = Field(ge=0)
    policy: str
    pairs: int = Field(ge=0)
    share: float
    bins: list[PurityBin]
    smallest_e: dict[str, float | None]


class PurityBound(_Part):
    """Theorem 5.3 as measured: density bounds, l, e_0, and the rounds that suffice or why it says nothing."""

    density_low: float | None
    density_high: float | None
    l: float | None  # noqa: E741 (the paper's symbol)
    e_0: float | None
    epsilon: float | None
    rounds: float | None
    says: str


class PurityReport(Record):
    """`purity.json` of `ple purity`. `normalized`: log-probabilities are means over tokens, not sums."""

    version: Literal[1] = 1
    kind: Literal["purity"] = "purity"
    data: str
    normalized: bool
    rounds: list[PurityRound]
    bound: PurityBound
