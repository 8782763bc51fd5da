"""What figures say about a run: from their numbers, a change only where the intervals leave no doubt."""

from typing import Any

from ple_data.report import reading
from schemas.reports import Estimate
from tests.run_dir import judge_report, purity_report


def row(t: int, s: float, s_prompt: float, half: float | None = 0.1, **more: Any) -> dict[str, Any]:
    halves = {f"half_{name}": half for name in ("s", "s_prompt", "margin")}
    return {
        "round": t, "rows": 100, "mean_s": s, "mean_s_prompt": s_prompt, "mean_margin": s_prompt - s, **halves,
        "tau": 0.2, "rank_share": 0.5, "lowered_share": 0.25, "margin_q25": -0.1, "margin_q75": 0.3,
        "mean_len_y": 10.0, "mean_len_y_prompt": 12.0, "truncated_y": 0.0, "truncated_y_prompt": 0.5, **more,
    }  # fmt: skip


START, END = row(0, 0.1, 0.54), row(3, 0.9, 0.98, tau=0.15, rank_share=0.2)


def test_a_gap_that_falls_below_tau():
    assert reading.gap([START, END], True) == (
        "From round 0 to 3: the gap fell from 0.44 to 0.08; τ_t (0.15) is now above it, and the share of pairs that "
        "rank fell from 50 % to 20 %."
    )
    assert reading.rewards([START, END]) == (
        "From round 0 to 3: the reward of y rose from 0.10 to 0.90, that of y_prompt rose from 0.54 to 0.98. y catches "
        "up with y_prompt."
    )


def test_what_the_intervals_allow_is_no_change():
    """0.44 and 0.34 with 0.1 each: the difference may be 0 (0.1 < sqrt(0.02)). So may that of 50 and 45 of 100."""
    later = row(1, 0.2, 0.54, rank_share=0.45)
    assert reading.gap([START, later], True) == (
        "From round 0 to 1: the gap did not clearly change (from 0.44 to 0.34); τ_t (0.20) is below it, and the share "
        "of pairs that rank did not clearly change (from 50 % to 45 %)."
    )
    assert "y catches up" not in reading.rewards([START, later])
    one_query = [row(0, 0.0, 1.0, half=None), row(1, 5.0, 9.0, half=None)]
    assert "did not clearly change (from 0.00 to 5.00)" in reading.rewards(one_query)
    assert "the gap stayed at 0.44" in reading.gap([START, row(1, 0.1, 0.54)], False)


def test_one_round_says_that_it_is_one():
    assert reading.rewards([START]).startswith("One round: with the principle responses earn 0.44 more (0.54 to 0.10")
    assert reading.rewards([row(0, 0.5, 0.55)]).startswith("One round: with the principle responses earn not clearly")
    assert reading.gap([START], True) == "One round: the gap is 0.44; τ_t (0.20) is below it: 50 % of the pairs rank."
    assert reading.shares([START], False) == "One round: the principle lowered the reward of 25 %."
    assert reading.lengths([START]) == (
        "One round: y has 10.0 tokens, y_prompt has 12.0 tokens. The limit cut 0 % of y and 50 % of y_prompt."
    )
    assert reading.curves({"loss": [(1.0, 2.0)]}) == "One point: no change to see yet."


def test_the_others_say_their_ends():
    assert reading.margins([START, END], True) == (
        "In round 3 half of the margins lie between -0.10 and 0.30; τ_t (0.15) is among them. The principle lowered "
        "the reward of 25 % of the pairs."
    )
    bins = [{"length": 3.0, "mean": 0.0, "half": 0.1}, {"length": 9.0, "mean": 0.5, "half": 0.2}]
    assert reading.rewards_by_length({"y": bins, "y_prompt": [bins[0], {**bins[1], "mean": 0.1}]}, 2) == (
        "In round 2: the longest y (about 9 tokens) earn 0.50 more than the shortest (3); the longest y_prompt (about "
        "9 tokens) earn no clearly other reward than the shortest (3)."
    )
    curves = {"rank, y_prompt": [(1.0, -2.0), (9.0, -2.5)], "rank, y": [(1.0, -2.0), (9.0, -4.0)]}
    assert reading.logps(curves).endswith("In the rank set y_prompt gained on y, though both fell.")
    assert reading.drift([(1.0, 0.0), (5.0, -3.0), (9.0, -0.5)]) == (
        "At the end they stand at -0.50 nats a token against the start policy. The lowest was -3.00."
    )
    policies = purity_report("tuned").policies
    assert reading.purity(policies) == (
        "tuned agrees with the reward on 44.4 % of the pairs, which chance allows too; start did on 33.3 % of the same "
        "pairs."
    )
    assert reading.smallest_pure(policies[:1]).startswith("One policy: at 100 % none; at 95 % 0.50 (4 pairs)")
    assert reading.stage_times({"sft": {"sft": 60.0}, "round 0": {"gen": 120.0}}) == (
        "gen took the most: 2.0 of 3.0 minutes."
    )


def test_a_win_is_one_where_its_interval_is_past_a_half():
    def told(mean: float, low: float, high: float) -> str:
        rate = Estimate(mean=mean, low=low, high=high, count=9)
        return reading.win_rates([("A against B", judge_report("x").model_copy(update={"win_rate": rate}))])

    assert told(0.7, 0.55, 0.8) == "A against B: A is better (70 % of verdicts)."
    assert told(0.3, 0.1, 0.45) == "A against B: A is worse (30 % of verdicts)."
    assert told(0.6, 0.45, 0.7) == "A against B: no clear winner (60 %)."
    found = {"kl": Estimate(mean=2.0, low=1, high=3, count=9), "r": Estimate(mean=0.5, low=0, high=1, count=9)}
    assert reading.rewards_by_kl([("p", found)], {"r": "R1"}) == "R1 is highest for p: 0.50 at 2.00 nats."
