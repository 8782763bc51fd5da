"""The JSON results that measuring commands leave for `ple report` and for other programs: forms only, nothing computed.

Written by `ple eval`, `ple judge` and `ple purity`; every number is in the units of what it measures.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from schemas.records import Record


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Estimate(_Part):
    """A mean (or a corpus statistic) with its 95 % interval over `count` queries: of a bootstrap or jackknife."""

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
    """Label's value less baseline's on the same queries."""

    label: str
    baseline: str
    metric: str
    difference: Estimate


class EvalReport(Record):
    """`eval.json` of `ple eval`. Metrics: reward:NAME, kl (to the first policy, in nats a response), entropy and
    mean_logps_first (of the policy's own responses, in nats a token), perplexity, bleu, length, truncated, distinct_1,
    distinct_2.

    settings: the options with which it was made, as they came to count; empty in files of older programs. left_out:
    sentences that say why metrics of log-probabilities are missing.
    """

    version: Literal[1, 2] = 2
    kind: Literal["eval"] = "eval"
    queries: str
    seed: int
    reward_models: list[RewardModelUse]
    bleu_signature: str | None
    policies: list[PolicyResult]
    comparisons: list[Comparison]
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    left_out: list[str] = Field(default_factory=list)

    def differences(self) -> dict[str, dict[str, dict[str, Estimate]]]:
        """The comparisons by baseline, label and metric."""
        found: dict[str, dict[str, dict[str, Estimate]]] = {}
        for c in self.comparisons:
            found.setdefault(c.baseline, {}).setdefault(c.label, {})[c.metric] = c.difference
        return found


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
    language model's answer held no verdict; they count nowhere else. orders_disagree: ties of which a language model's
    two answers chose differently, the others being those that it called a tie twice (None for other judges and in
    files of version 1). template: digest of the prompt template.
    only_a, only_b: queries that only one side has, left out. kappa: Fleiss' kappa over the `kappa_queries` queries that
    every annotator judged. first_side: of the `sides` verdicts of annotators for one side, how many took the one that
    stood first on the screen. settings: the options with which it was made, for a language model the address and
    the fields of its requests; empty in files of older programs.
    """

    version: Literal[1, 2] = 2
    kind: Literal["judge"] = "judge"
    a: str
    b: str
    judge: str
    template: str | None = None
    wins: int = Field(ge=0)
    ties: int = Field(ge=0)
    losses: int = Field(ge=0)
    unparsed: int = Field(ge=0)
    orders_disagree: int | None = Field(default=None, ge=0)
    win_rate: Estimate | None
    parts: list[JudgePart] = Field(default_factory=list)
    only_a: int = Field(default=0, ge=0)
    only_b: int = Field(default=0, ge=0)
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)
    annotators: int = Field(default=0, ge=0)
    kappa: float | None = None
    kappa_queries: int = Field(default=0, ge=0)
    first_side: int = Field(default=0, ge=0)
    sides: int = Field(default=0, ge=0)
    settings: dict[str, JsonValue] = Field(default_factory=dict)


class PurityBin(_Part):
    """Pairs with a margin from `low` to `high` (0 in neither), and in how many of them the policy agrees with the
    reward: log pi(y_prompt|x) - log pi(y|x) has the sign of s_prompt - s.
    """

    low: float
    high: float
    pairs: int = Field(ge=0)
    agree: int = Field(ge=0)


class PureSet(_Part):
    """The smallest observed e > 0 whose level set L(e) = {s_prompt - s >= e} is pure at `percent` %: in that share of
    it log pi(y_prompt|x) > log pi(y|x) (Definition 5.1: 100 %). `pairs`: the size of L(e). e is None if there is none.
    """

    percent: int = Field(ge=1, le=100)
    e: float | None
    pairs: int = Field(ge=0)


class PurityCounts(_Part):
    """One policy on the pairs of one round, or of all (`round` None). `ranked`: pairs with a margin other than 0;
    `agree`: those of them in which the policy agrees with the reward; `positive`: those with a margin above 0.
    """

    round: int | None = Field(ge=0)
    pairs: int = Field(ge=0)
    ranked: int = Field(ge=0)
    agree: int = Field(ge=0)
    positive: int = Field(ge=0)
    pure_sets: list[PureSet]


class PurityPolicy(_Part):
    """One policy on all pairs. `after_round` is the round whose training made it: None for the start policy and for one
    of unknown origin. `left_out`: pairs without a log-probability (an empty response, or over the model's positions).
    """

    label: str
    policy: str
    after_round: int | None = Field(ge=0)
    left_out: int = Field(ge=0)
    all_pairs: PurityCounts
    by_round: list[PurityCounts]
    bins: list[PurityBin]


class PurityBound(_Part):
    """The rounds that the proof of Theorem 5.3 asks for, as measured; on the scale on which the observed rewards run
    from 0 to 1 (the proof's assumption). Fields are None where they could not be measured; `says` tells why.

    percent: the purity at which e_0 (first policy) and e_end (last) were taken; l: the margins' highest density over
    the lowest, an estimate; median_reward: the median r = R(x, y_prompt) in L(e_0); rounds_by_proof: Eq. 17 at alpha =
    1, 6 l / e_end * log((r - e_end) / (r - e_0)).
    """

    percent: int | None = None
    e_0: float | None = None
    e_end: float | None = None
    l: float | None = None  # noqa: E741 (the paper's symbol)
    median_reward: float | None = None
    rounds_by_proof: float | None = None
    says: str = ""

    @model_validator(mode="before")
    @classmethod
    def _without_old_fields(cls, found: Any) -> Any:
        """Versions 1 and 2 also held the theorem's conditions (1) and (3) as printed, and what they were made from."""
        scale = {"reward_low", "reward_high", "density_low", "density_high"}
        conditions = {"vocabulary", "epsilon", "alpha_limit", "rounds"}
        if not isinstance(found, dict):
            return found
        return {name: value for name, value in found.items() if name not in scale | conditions}


class PurityReport(Record):
    """`purity.json` of `ple purity`. `normalized`: log-probabilities are means over tokens, not sums. `precision`: the
    number type of the policies (None in files of version 1). Policies are in the order in which they were trained, the
    start policy first.
    """

    version: Literal[1, 2, 3] = 3
    kind: Literal["purity"] = "purity"
    data: list[str]
    rounds: list[int]
    normalized: bool
    precision: str | None = None
    policies: list[PurityPolicy] = Field(min_length=1)
    bound: PurityBound
