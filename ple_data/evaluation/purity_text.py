"""The tables of `ple purity` for a terminal. Computes nothing: every number comes from the PurityReport."""

from __future__ import annotations

import itertools

from ple_data.common.terminal import WIDTH, printable, shorten, text_table, wrap
from schemas.reports import PureSet, PurityBound, PurityPolicy, PurityReport

_LABEL = 24
L_BIAS = "an estimate: noise in the histogram raises it, the tails that are left out lower it"
"""What a person must know of the measured l."""


def format_purity(report: PurityReport) -> str:
    """Agreement, the smallest pure e, agreement by margin and by round of the pairs, and Theorem 5.3's bound."""
    policies = report.policies
    counted = policies[0].all_pairs
    how = "mean over tokens" if report.normalized else "sum over tokens"
    how += f" in {report.precision}" if report.precision else ""
    parts = [
        [
            f"Purity on {counted.pairs} pairs of {_rounds(report.rounds)}; log pi is the {how}, both given x alone.",
            "agree: log pi(y_prompt|x) - log pi(y|x) has the sign of the margin s_prompt - s (chance: 50 %).",
            "e at P %: the smallest e > 0 for which P % of the pairs with margin >= e have pi(y_prompt|x) > pi(y|x);",
            "in brackets the number of these pairs (Definition 5.1 asks for 100 %). after t: trained on rounds",
            "0 to t.",
            *_policy_lines(policies),
            *_shrinking(policies),
            *_left_out(policies),
        ],
        ["Share in agreement by margin", *_bin_lines(policies)],
        [
            "Share in agreement by the round of the pairs (+: the policy was trained on that round)",
            *_round_lines(policies),
        ]
        if len(report.rounds) > 1
        else [],
        _bound_lines(report.bound),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _rounds(rounds: list[int]) -> str:
    if rounds == list(range(rounds[0], rounds[-1] + 1)) and len(rounds) > 1:
        return f"rounds {rounds[0]} to {rounds[-1]}"
    return f"round{'s' * (len(rounds) > 1)} {', '.join(map(str, rounds))}"


def _label(policy: PurityPolicy) -> str:
    return shorten(printable(policy.label), _LABEL)


def _policy_lines(policies: list[PurityPolicy]) -> list[str]:
    percents = [pure.percent for pure in policies[0].all_pairs.pure_sets]
    rows = [
        [_label(policy), percentage(policy.all_pairs.agree, policy.all_pairs.ranked)]
        + [_pure_set(pure) for pure in policy.all_pairs.pure_sets]
        for policy in policies
    ]
    return text_table(["policy", "agree", *[f"e at {percent} %" for percent in percents]], rows)


def _pure_set(pure: PureSet) -> str:
    return "none" if pure.e is None else f"{pure.e:.3g} [{pure.pairs}]"


def shrinking(policies: list[PurityPolicy]) -> list[tuple[int, int, int]]:
    """By purity: (percent, steps from policy to policy in which the smallest pure e fell or first appeared, steps)."""
    result = []
    for place, pure in enumerate(policies[0].all_pairs.pure_sets):
        series = [policy.all_pairs.pure_sets[place].e for policy in policies]
        infinite = [float("inf") if e is None else e for e in series]
        steps = list(itertools.pairwise(infinite))
        result.append((pure.percent, sum(after < before for before, after in steps), len(steps)))
    return result


def _shrinking(policies: list[PurityPolicy]) -> list[str]:
    if len(policies) == 1:
        return []
    fell = ", ".join(f"at {percent} % in {fell} of {steps}" for percent, fell, steps in shrinking(policies))
    return [f"Lemma 5.2: e falls with every round. It fell {fell} steps."]


def _left_out(policies: list[PurityPolicy]) -> list[str]:
    most = max(policy.left_out for policy in policies)
    return [f"{most} pairs left out: an empty response, or longer than the model's positions"] if most else []


def _bin_lines(policies: list[PurityPolicy]) -> list[str]:
    rows = [
        [f"{bins[0].low:.3g} to {bins[0].high:.3g}", bins[0].pairs, *[percentage(b.agree, b.pairs) for b in bins]]
        for bins in zip(*[policy.bins for policy in policies], strict=True)
    ]
    return text_table(["margin", "pairs", *[_label(policy) for policy in policies]], rows)


def _round_lines(policies: list[PurityPolicy]) -> list[str]:
    rows = [
        [_label(policy)]
        + [
            percentage(counts.agree, counts.ranked) + (" +" if _trained_on(policy, counts.round) else "  ")
            for counts in policy.by_round
        ]
        for policy in policies
    ]
    return text_table(["policy", *[f"round {counts.round}  " for counts in policies[0].by_round]], rows)


def _trained_on(policy: PurityPolicy, round: int | None) -> bool:
    return policy.after_round is not None and round is not None and round <= policy.after_round


def percentage(part: int, whole: int) -> str:
    """'97.3 %', or '-' of nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _bound_lines(bound: PurityBound) -> list[str]:
    lines = ["Theorem 5.3, on rewards mapped to [0, 1]"]
    if bound.density_low is not None and bound.density_high is not None:
        l = "unbounded" if bound.l is None else f"{bound.l:.3g}, {L_BIAS}"  # noqa: E741
        lines.append(f"density of the margin from {bound.density_low:.3g} to {bound.density_high:.3g}: l = {l}")
    if bound.e_0 is not None:
        lines.append(
            f"e_0 = {bound.e_0:.3g} (first policy, at {bound.percent} %), "
            f"epsilon = e_end = {bound.epsilon:.3g} (last policy), |V| = {bound.vocabulary}"
        )
        lines.append(f"condition (1) holds for {_alphas(bound.alpha_limit)}")
    if bound.rounds is not None:
        lines.append(f"condition (3) as printed: I >= {bound.rounds:.4g} rounds")
    if bound.rounds_by_proof is not None:
        lines.append(
            f"Eq. 17, the proof's own step, at the median R(x, y_prompt) = {bound.median_reward:.3g} of L(e_0): at "
            f"most {bound.rounds_by_proof:.4g} rounds from e_0 to e_end for alpha = 1; "
            "that number times alpha in general"
        )
    return [line for text in [*lines, bound.says] for line in wrap(text, WIDTH)]


def _alphas(limit: float | None) -> str:
    which = "alpha of Eq. 8 (not the decay of tau)"
    if limit is None:
        return f"no {which}"
    return f"every {which}" if limit >= 1 else f"an {which} up to {limit:.3g}"
