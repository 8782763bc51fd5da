"""The partition in polars against the plain-Python oracle, and the statistics by round."""

import math
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ple_data.partition import partition, rank_shares, round_statistics, tau, warnings
from schemas.errors import UsageError
from tests import oracle
from tests.tables import table

REWARDS = st.floats(-1e4, 1e4, width=32)
LENGTHS = st.integers(0, 40)
PAIRS = st.lists(st.tuples(REWARDS, REWARDS, LENGTHS, LENGTHS), min_size=1, max_size=20)


def frame(pairs: list[tuple[float, float, int, int]]) -> pl.LazyFrame:
    """Rows as the store holds them: rewards in float32, responses as ids."""
    return pl.LazyFrame(
        {
            "s": [p[0] for p in pairs],
            "s_prompt": [p[1] for p in pairs],
            "y_ids": [[0] * p[2] for p in pairs],
            "y_prompt_ids": [[0] * p[3] for p in pairs],
        },
        schema={"s": pl.Float32, "s_prompt": pl.Float32, "y_ids": pl.List(pl.Int32), "y_prompt_ids": pl.List(pl.Int32)},
    )


def computed(pairs: list[tuple[float, float, int, int]], threshold: float, **options) -> list[dict]:
    """The partition of `pairs`, run lazily by the streaming engine."""
    return frame(pairs).select(partition(threshold, **options)).collect(engine="streaming").to_dicts()


@settings(max_examples=200, deadline=None)
@given(PAIRS, st.floats(0, 10), st.booleans(), st.sampled_from([0.0, 0.25]), st.sampled_from([None, "rank", "wsft"]))
@example([(0.0, 0.0, 3, 4)], 0.2, False, 0.0, None)  # a tie
@example([(1.0, 1.5, 3, 4)], 0.5, False, 0.0, None)  # margin exactly tau
@example([(1.0, 1.0, 3, 4)], 0.0, False, 0.25, None)  # both
@example([(1e4, -1e4, 3, 4), (-1e4, 1e4, 3, 4)], 0.2, True, 0.25, "rank")
@example([(0.0, 1.0, 0, 0), (1.0, 0.0, 0, 0)], 0.2, True, 0.25, "wsft")  # empty responses
def test_every_column_agrees_with_the_oracle(pairs, threshold, normalize_wsft, anchor, without):
    options = {"normalize_wsft": normalize_wsft, "anchor": anchor, "without": without}
    for found, pair in zip(computed(pairs, threshold, **options), pairs, strict=True):
        expected = oracle.row(*pair, threshold, **options)
        assert found["margin"] == expected.margin
        assert found["set"] == expected.set
        for name in ("w", "w_prompt", "c", "c_prompt"):
            assert math.isclose(found[name], getattr(expected, name), rel_tol=1e-12, abs_tol=1e-15), name


@settings(max_examples=100, deadline=None)
@given(REWARDS, REWARDS)
def test_the_two_weights_sum_to_zero_and_a_tie_weighs_nothing(s, s_prompt):
    [row] = computed([(s, s_prompt, 5, 5)], 1e9)
    assert row["w"] + row["w_prompt"] == 0
    assert (row["w"] == 0) == (s == s_prompt) or abs(s - s_prompt) < 1e-300


@settings(max_examples=50, deadline=None)
@given(
    REWARDS,
    REWARDS,
    st.lists(st.floats(-20, 0), min_size=1, max_size=8),
    st.lists(st.floats(-20, 0), min_size=1, max_size=8),
    st.floats(0, 2),
)
def test_coefficients_times_log_probabilities_are_the_loss(s, s_prompt, logps, logps_prompt, threshold):
    """L = - c sum_j log pi(y^j) - c_prompt sum_j log pi(y_prompt^j) is Eqs. 3, 4 and 6 as printed."""
    [row] = computed([(s, s_prompt, len(logps), len(logps_prompt))], threshold)
    found = -row["c"] * sum(logps) - row["c_prompt"] * sum(logps_prompt)
    assert math.isclose(
        found, oracle.pair_loss(s, s_prompt, logps, logps_prompt, threshold), rel_tol=1e-9, abs_tol=1e-9
    )


def test_by_hand():
    """margin 0.5 > 0.2: rank, -1/2 and +1/4. margin 0.1: weighted SFT, w = tanh(-0.05) = -0.04995837..."""
    rank, wsft = computed([(0.0, 0.5, 2, 4), (0.0, np.float32(0.1), 2, 4)], 0.2)
    assert (rank["set"], rank["c"], rank["c_prompt"]) == ("rank", -0.5, 0.25)
    assert wsft["set"] == "wsft"
    assert wsft["c"] == pytest.approx(-0.0499583749, abs=1e-9)
    assert wsft["c_prompt"] == -wsft["c"]


def test_ablations_by_hand():
    """Margins 0.5 and 0.1 at tau = 0.2. Without rank both are weighted SFT; without wsft the second weighs nothing."""
    pairs = [(0.0, 0.5, 2, 4), (0.0, np.float32(0.1), 2, 4)]
    first, second = computed(pairs, 0.2, without="rank")
    assert (first["set"], second["set"]) == ("wsft", "wsft")
    assert first["c"] == pytest.approx(math.tanh(-0.25), rel=1e-12)
    assert first["c_prompt"] == -first["c"]
    first, second = computed(pairs, 0.2, without="wsft")
    assert (first["set"], first["c"], first["c_prompt"]) == ("rank", -0.5, 0.25)
    assert (second["set"], second["c"], second["c_prompt"]) == ("wsft", 0.0, 0.0)


def test_the_margin_is_not_rounded_to_float32():
    """16777216 + 1 is no float32: a margin computed there would be 16777216, a tie with tau."""
    [row] = computed([(-1.0, 16777216.0, 1, 1)], 16777216.0)
    assert (row["margin"], row["set"]) == (16777217.0, "rank")


@given(st.floats(0, 1e3), st.floats(0.01, 0.99), st.integers(0, 60))
def test_tau_is_the_repeated_product(tau0, alpha, t):
    assert tau(tau0, alpha, t) == pytest.approx(oracle.tau(tau0, alpha, t), rel=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.5, 1.5, math.nan])
def test_alpha_outside_its_interval_is_refused(alpha):
    with pytest.raises(UsageError, match="alpha"):
        tau(0.2, alpha, 0)
    with pytest.raises(UsageError, match="alpha"):
        round_statistics(pl.LazyFrame(), 0.2, alpha)


@pytest.mark.parametrize(("tau0", "t"), [(-0.1, 0), (math.inf, 0), (math.nan, 0), (0.2, -1)])
def test_a_threshold_that_is_none_is_refused(tau0, t):
    with pytest.raises(UsageError):
        tau(tau0, 0.9, t)


def stored(rows: list[dict], round: int = 0) -> pl.LazyFrame:
    return pl.DataFrame(pl.from_arrow(table("pairs", rows, round))).lazy()


def test_statistics_by_hand():
    """Margins -1, 0, 0.19, 1 in round 0; tau_0 = 0.2, tau_1 = 0.18: in round 1 the third is in the rank set
    too.
    """
    margins = [-1.0, 0.0, 0.19, 1.0]
    rows = [{"s": 1.0, "s_prompt": 1.0 + m} for m in margins]
    rows[0] |= {"y_finish": "length", "y_ids": [1, 2, 3, 4, 5, 6, 7], "y_empty": True}
    both = pl.concat([stored(rows, 1), stored(rows, 0)])
    first, second = round_statistics(both, 0.2, 0.9).to_dicts()
    assert (first["round"], second["round"]) == (0, 1)
    assert first["rows"] == 4
    assert (first["tau"], second["tau"]) == (tau(0.2, 0.9, 0), tau(0.2, 0.9, 1))
    assert (first["rank_share"], second["rank_share"]) == (0.25, 0.5)
    assert first["lowered_share"] == 0.25
    assert first["mean_s"] == 1.0
    assert first["mean_margin"] == pytest.approx(np.mean(margins), abs=1e-7)
    for name, q in [("margin_q05", 5), ("margin_q50", 50), ("margin_q95", 95)]:
        assert first[name] == pytest.approx(np.percentile(margins, q), abs=1e-6)
    assert (first["truncated_y"], first["truncated_y_prompt"]) == (0.25, 0.0)
    assert (first["empty_y"], first["empty_y_prompt"]) == (0.25, 0.0)
    assert (first["mean_len_y"], first["mean_len_y_prompt"]) == (4.0, 4.0)  # (7 + 3 + 3 + 3) / 4


def test_at_round_uses_one_threshold_for_old_rows_too():
    rows = [{"s": 1.0, "s_prompt": 1.19}]
    [old, new] = round_statistics(pl.concat([stored(rows, 0), stored(rows, 1)]), 0.2, 0.9, at_round=1).to_dicts()
    assert old["tau"] == new["tau"] == tau(0.2, 0.9, 1)
    assert old["rank_share"] == 1.0


def test_rank_shares_are_those_of_the_statistics():
    margins = [-1.0, 0.0, 0.2, 0.19, 1.0]
    rows = pl.concat([stored([{"s": 1.0, "s_prompt": 1.0 + m} for m in margins[t:]], t) for t in (0, 1)])
    for at_round in (0, 1):
        expected = round_statistics(rows, 0.2, 0.9, at_round=at_round).select("round", "rows", "rank_share")
        assert rank_shares(rows, tau(0.2, 0.9, at_round)).equals(expected)


def test_no_rows_give_no_statistics_and_no_warning():
    statistics = round_statistics(stored([]), 0.2, 0.9)
    assert statistics.height == 0
    assert warnings(statistics) == []


def test_warns_when_all_or_no_rows_are_in_the_rank_set():
    none, some = {"s": 0.0, "s_prompt": 0.0}, {"s": 0.0, "s_prompt": 5.0}
    frames = [stored([none, none], 0), stored([none, some], 1), stored([some, some], 2)]
    messages = warnings(round_statistics(pl.concat(frames), 0.2, 0.9))
    assert [m.split(" rows in")[0] for m in messages] == ["round 0: none of the 2", "round 2: all of the 2"]
    assert "tau = 0.2 " in messages[0]
    assert "--tau0" in messages[0]


MEMORY = """
import resource, sys
import polars as pl
from ple_data.partition import partition, round_statistics
files = [sys.argv[1]] * int(sys.argv[2])
rows = pl.scan_parquet(files)
assert round_statistics(rows, 0.2, 0.9)["rows"].sum() == 20_000 * len(files)
rows.with_columns(partition(0.2)).select(pl.col("c").sum(), pl.col("c_prompt").sum()).collect(engine="streaming")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_is_flat_in_the_number_of_rows(tmp_path):
    """60 times the rows (1.2 million, 1 GB of ids) cost less than 250 MB, the numbers kept of each row included."""
    ids = pl.Series([list(range(100))] * 20_000, dtype=pl.List(pl.Int32))
    one = stored([{}]).collect()
    big = pl.concat([one] * 20_000).with_columns(ids.alias("y_ids"), ids.alias("y_prompt_ids"))
    big.write_parquet(tmp_path / "rows.parquet", row_group_size=2000)

    def peak(files: int) -> int:
        command = [sys.executable, "-c", MEMORY, str(tmp_path / "rows.parquet"), str(files)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert peak(60) < peak(1) + 250
