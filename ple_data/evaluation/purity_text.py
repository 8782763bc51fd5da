"""The tables of `ple purity` for a terminal. Computes nothing: every number comes from the PurityReport."""

from __future__ import annotations

import itertools

from ple_data.common.terminal import WIDTH, printable, shorten, text_table, wrap
from schemas.reports import PurityBound, PurityPolicy, PurityReport

_LABEL = 24
L_BIAS = "an estimate: noise in the histogram raises it, the tails that are left out lower it"
"""What a person must know of the measured l."""


def format_purity(report: PurityReport) -> str:
    """Agreement, the smallest pure e, agreement by margin and by round of the pairs, and Theorem 5.3 in numbers."""
    policies = report.policies
    labels = [shorten(printable(policy.label), _LABEL) for policy in policies]
    how = "mean over tokens" if report.normalized else "sum over tokens"
    how += f" in {report.precision}" if report.precision else ""
    pairs = policies[0].all_pairs.pairs
    lines = [
        f"Purity on {pairs} pairs of {_rounds(report.rounds)}; log pi is the {how}, both given x alone.",
        "agree: log pi(y_prompt|x) - log pi(y|x) has the sign of the margin s_prompt - s (chance: 50 %).",
        "e at P %: the smallest e > 0 for which P % of the pairs with margin >= e have pi(y_prompt|x) > pi(y|x);",
        "in brackets the number of these pairs (Definition 5.1 asks for 100 %). after t: trained on rounds",
        "0 to t.",
        *text_table(*policy_table(policies, labels, "[{}]")),
    ]
    if len(policies) > 1:
        lines.append(f"Lemma 5.2: e falls with every round. It fell {steps_down(policies)} steps.")
    if most := max(policy.left_out for policy in policies):
        lines.append(f"{most} pairs left out: an empty response, or longer than the model's positions")
    by_margin = [
        [f"{bins[0].low:.3g} to {bins[0].high:.3g}", bins[0].pairs, *[_percentage(b.agree, b.pairs) for b in bins]]
        for bins in zip(*[policy.bins for policy in policies], strict=True)
    ]
    lines += ["", "Share in agreement by margin", *text_table(["margin", "pairs", *labels], by_margin)]
    if len(report.rounds) > 1:
        by_round = [
            [label, *[_percentage(c.agree, c.ranked) + _trained_mark(policy, c.round) for c in policy.by_round]]
            for label, policy in zip(labels, policies, strict=True)
        ]
        head = ["policy", *[f"round {counts.round}  " for counts in policies[0].by_round]]
        title = "Share in agreement by the round of the pairs (+: the policy was trained on that round)"
        lines += ["", title, *text_table(head, by_round)]
    return "\n".join([*lines, "", *_bound_lines(report.bound)])


def _rounds(rounds: list[int]) -> str:
    if rounds == list(range(rounds[0], rounds[-1] + 1)) and len(rounds) > 1:
        return f"rounds {rounds[0]} to {rounds[-1]}"
    return f"round{'s' * (len(rounds) > 1)} {', '.join(map(str, rounds))}"


def policy_table(policies: list[PurityPolicy], labels: list[str], size: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows: each policy's agreement and smallest pure e; `size` is how its number of pairs is put, "[{}]"."""
    head = ["policy", "agree", *[f"e at {pure.percent} %" for pure in policies[0].all_pairs.pure_sets]]
    rows = []
    for label, found in zip(labels, [policy.all_pairs for policy in policies], strict=True):
        sets = ["none" if pure.e is None else f"{pure.e:.3g} {size.format(pure.pairs)}" for pure in found.pure_sets]
        rows.append([label, _percentage(found.agree, found.ranked), *sets])
    return head, rows


def steps_down(policies: list[PurityPolicy]) -> str:
    """By purity, the steps from policy to policy in which the smallest pure e fell or first appeared, of all steps."""
    told = []
    for sets in zip(*[policy.all_pairs.pure_sets for policy in policies], strict=True):
        steps = list(itertools.pairwise(float("inf") if pure.e is None else pure.e for pure in sets))
        fell = sum(after < before for before, after in steps)
        told.append(f"at {sets[0].percent} % in {fell} of {len(steps)}")
    return ", ".join(told)


def _trained_mark(policy: PurityPolicy, round: int | None) -> str:
    trained = policy.after_round is not None and round is not None and round <= policy.after_round
    return " +" if trained else "  "


def _percentage(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _bound_lines(bound: PurityBound) -> list[str]:
    lines = ["Theorem 5.3, on rewards mapped to [0, 1]"]
    if bound.e_0 is not None:
        lines.append(
            f"e_0 = {bound.e_0:.3g} (first policy, at {bound.percent} %), e_end = {bound.e_end:.3g} (last policy)"
        )
    if bound.l is not None:
        lines.append(f"l = {bound.l:.3g}, {L_BIAS}")
    if bound.rounds_by_proof is not None:
        lines.append(
            f"Eq. 17, the proof's own step, at the median R(x, y_prompt) = {bound.median_reward:.3g} of L(e_0): at "
            f"most {bound.rounds_by_proof:.4g} rounds from e_0 to e_end for alpha = 1; "
            "that number times alpha in general"
        )
    return [line for text in [*lines, bound.says] if text for line in wrap(text, WIDTH)]
