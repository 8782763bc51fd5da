"""`ple purity`: level sets against a brute-force search over fractions, log-probabilities against a plain float64 loop
of transformers, Theorem 5.3 by hand, and that nothing is computed twice.
"""

import json
import math
import shutil
import signal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import cli
from ple_data.common.digests import policy_name
from ple_data.evaluation.purity import bin_edges, binned, count, density_ratio, smallest_pure, theorem_bound
from ple_data.evaluation.purity_text import format_purity
from ple_data.storage.store import Store
from ple_train.measure.purity import purity
from schemas import tables
from schemas.errors import DamagedError, UsageError
from schemas.options import Purity
from schemas.records import read_record
from schemas.reports import PureSet, PurityBound, PurityReport
from tests.run_dir import purity_report
from tests.tables import table
from tests.tiny import tiny_adapter

# Level sets


def brute_force(margins: list[float], ratios: list[float], percent: int) -> float | None:
    """Definition 5.1 word by word, for every observed e > 0."""
    found = [
        e
        for e in set(margins)
        if e > 0
        and Fraction(
            sum(ratio > 0 for margin, ratio in zip(margins, ratios, strict=True) if margin >= e),
            sum(margin >= e for margin in margins),
        )
        >= Fraction(percent, 100)
    ]
    return min(found, default=None)


PAIRS = st.lists(
    st.tuples(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5, 3.0]), st.sampled_from([-1.0, 0.0, 1.0])),
    max_size=60,
)


@given(pairs=PAIRS, percent=st.sampled_from([100, 95, 90, 50]))
def test_smallest_pure_e_is_the_least_of_all_level_sets(pairs, percent):
    """Few distinct values, so that ties in margin and in probability are common."""
    margins, ratios = [m for m, _ in pairs], [r for _, r in pairs]
    found = smallest_pure(np.array(margins), np.array(ratios), percent)
    assert found.e == brute_force(margins, ratios, percent)
    assert found.pairs == (0 if found.e is None else sum(margin >= found.e for margin in margins))


def test_purity_at_95_percent_is_counted_not_rounded():
    """Margins 1 to 20: with the 19 highest in agreement L(1) is pure at 95 % (19 of 20), with 18 it is not."""
    margins = np.arange(1.0, 21.0)
    for wrong, expected in ((1, 1.0), (2, 3.0)):
        ratios = np.where(margins > wrong, 1.0, -1.0)
        assert smallest_pure(margins, ratios, 95).e == expected
        assert smallest_pure(margins, ratios, 100).e == wrong + 1


@pytest.mark.parametrize(
    ("margins", "ratios", "e"),
    [
        ([1.0, 2.0], [1.0, -1.0], None),  # the highest margin disagrees
        ([1.0, 2.0, 2.0], [1.0, 1.0, -1.0], None),  # and so does its tie
        ([1.0, 2.0], [1.0, 0.0], None),  # equal probabilities are not pure
        ([-1.0, 0.0, 1.0], [1.0, 1.0, 1.0], 1.0),  # e > 0, although L(-1) is pure too
        ([0.5, 1.0, 2.0], [1.0, 1.0, 1.0], 0.5),
        ([-1.0, 0.0], [1.0, 1.0], None),
        ([], [], None),
    ],
)
def test_smallest_pure_e_by_hand(margins, ratios, e):
    assert smallest_pure(np.array(margins), np.array(ratios), 100).e == e


def test_counts_and_bins_by_hand():
    """One pair without a log-probability, one with margin 0; -2, 1 and 4 agree, -1 and 3 do not."""
    margin = np.array([-2.0, -1.0, 0.0, 1.0, 3.0, 4.0, 9.0])
    log_ratio = np.array([-1.0, 5.0, 1.0, 2.0, -2.0, 0.5, math.nan])
    everything = count(margin, log_ratio)
    assert (everything.pairs, everything.ranked, everything.agree, everything.positive) == (6, 5, 3, 3)
    assert everything.pure_sets[0] == PureSet(percent=100, e=4.0, pairs=1)
    second = count(margin[4:], log_ratio[4:], 1)
    assert (second.round, second.pairs, second.agree) == (1, 2, 1)
    found = binned(margin, log_ratio, [-2.0, -1.0, 0.0, 3.0, 9.0])
    assert [(b.pairs, b.agree) for b in found] == [(2, 1), (0, 0), (1, 1), (2, 1)]


@given(st.lists(st.floats(-5, 5).filter(bool), min_size=1, max_size=50))
def test_every_pair_with_a_margin_is_in_one_bin(margins):
    found = binned(np.array(margins), np.ones(len(margins)), bin_edges(np.array(margins)))
    assert sum(b.pairs for b in found) == len(margins)


# Theorem 5.3


def test_density_ratio_of_a_two_step_density():
    """Density 0.75 on [0, 1), 0.25 on [1, 2): l is about 3 (bins that straddle 1 lie between)."""
    margins = np.concatenate([np.linspace(0, 1, 7500, endpoint=False), np.linspace(1, 2, 2500, endpoint=False)])
    assert density_ratio(margins) == pytest.approx(3, rel=0.03)
    assert density_ratio(np.concatenate([np.linspace(0, 1, 500), np.linspace(9, 10, 500)])) is None
    assert density_ratio(np.ones(5)) is None
    assert density_ratio(np.array([0.0, 1.0])) is None  # no margin between the quantiles


def pure(e: float | None) -> list[PureSet]:
    return [PureSet(percent=100, e=e, pairs=1 if e else 0)]


def uniform_rewards() -> tuple[np.ndarray, np.ndarray]:
    """Rewards on [0, 10]: s = 0, s_prompt = 0, 0.01, ..., 10: margins are uniform, the density 1 on [0, 1]."""
    s_prompt = np.linspace(0, 10, 1001)
    return np.zeros_like(s_prompt), s_prompt


def test_bound_by_hand():
    """e_0 = 4 and e_end = 2 are 0.4 and 0.2 of the rewards' range of 10; L(0.4) holds r = 0.4 ... 1, median 0.7."""
    s, s_prompt = uniform_rewards()
    bound = theorem_bound(s, s_prompt, pure(4.0), pure(2.0))
    assert (bound.e_0, bound.e_end, bound.percent) == (pytest.approx(0.4), pytest.approx(0.2), 100)
    assert bound.l == pytest.approx(1, rel=0.05)
    assert bound.median_reward == pytest.approx(0.7)
    assert bound.rounds_by_proof == pytest.approx(6 * bound.l / 0.2 * math.log((0.7 - 0.2) / (0.7 - 0.4)))
    assert bound.says == ""


def test_the_bounds_text_says_what_the_numbers_are():
    """Eq. 17 has the factor alpha, so the number is the one for alpha = 1; l is an estimate that errs both ways."""
    bound = theorem_bound(*uniform_rewards(), pure(4.0), pure(2.0))
    text = bound_text(bound)
    assert (
        f"at most {bound.rounds_by_proof:.4g} rounds from e_0 to e_end for alpha = 1; that number times alpha" in text
    )
    assert f"l = {bound.l:.3g}, an estimate: noise in the histogram raises it" in text
    assert "at least" not in text


def bound_text(bound: PurityBound) -> str:
    return " ".join(format_purity(purity_report("p").model_copy(update={"bound": bound})).split())


def test_bound_says_why_it_says_nothing():
    s, s_prompt = uniform_rewards()
    assert "no level set is pure for the first policy" in theorem_bound(s, s_prompt, pure(None), pure(2.0)).says
    assert "no level set is pure for the last policy" in theorem_bound(s, s_prompt, pure(2.0), pure(None)).says
    assert "no level set is pure for the first policy" in theorem_bound(s, s, pure(None), pure(None)).says
    risen = theorem_bound(s, s_prompt, pure(2.0), pure(4.0))
    assert risen.rounds_by_proof is None
    assert "e did not fall" in risen.says
    assert "is e_0 itself" in theorem_bound(s, s_prompt, pure(10.0), pure(5.0)).says
    gap = np.concatenate([np.linspace(0, 1, 500), np.linspace(9, 10, 500)])
    assert "density is 0 somewhere" in theorem_bound(np.zeros(1000), gap, pure(2.0), pure(1.0)).says


@pytest.mark.parametrize("version", [1, 2])
def test_a_bound_of_an_older_version_is_read_without_the_printed_conditions(version, tmp_path):
    """Version 1 knew no precision; both held conditions (1) and (3) as printed, and what they were made from."""
    record = json.loads(purity_report("p").to_json()) | {"version": version}
    old = dict.fromkeys(("reward_low", "reward_high", "density_low", "density_high"), 0.5)
    record["bound"] |= old | {"vocabulary": 9, "epsilon": 0.2, "alpha_limit": 1.0, "rounds": None, "e_0": 0.4}
    if version == 1:
        del record["precision"]
    (tmp_path / "purity.json").write_text(json.dumps(record))
    found = read_record(PurityReport, tmp_path / "purity.json")
    assert found.bound == purity_report("p").bound.model_copy(update={"e_0": 0.4})
    (tmp_path / "purity.json").write_text(json.dumps(record | {"bound": 7}))
    with pytest.raises(DamagedError, match="not a readable PurityReport record"):
        read_record(PurityReport, tmp_path / "purity.json")


def test_bound_takes_the_strictest_purity_that_both_policies_reach():
    s, s_prompt = uniform_rewards()
    first = [
        PureSet(percent=100, e=None, pairs=0),
        PureSet(percent=95, e=6.0, pairs=9),
        PureSet(percent=90, e=5.0, pairs=9),
    ]
    last = [
        PureSet(percent=100, e=4.0, pairs=1),
        PureSet(percent=95, e=3.0, pairs=9),
        PureSet(percent=90, e=1.0, pairs=9),
    ]
    bound = theorem_bound(s, s_prompt, first, last)
    assert (bound.percent, bound.e_0, bound.e_end) == (95, pytest.approx(0.6), pytest.approx(0.3))


# The whole command on a tiny real model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of made-up pairs: lengths differ, one pair has equal responses, one an empty response."""
    root = tmp_path_factory.mktemp("purity") / "data"
    store, generator = Store(root), np.random.default_rng(0)
    for t in (0, 1):
        rows = []
        for index in range(7):
            ids = {
                name: generator.integers(3, 370, size=int(generator.integers(1, 9))).tolist()
                for name in ("x_ids", "y_ids", "y_prompt_ids")
            }
            s, s_prompt = generator.normal(size=2).astype(np.float32).tolist()
            rows.append({"query_id": f"q{t}{index}", **ids, "s": s, "s_prompt": s_prompt})
        rows[2] |= {"y_prompt_ids": rows[2]["y_ids"]}
        rows[3] |= {"y_ids": []}
        store.commit("pairs", t, f"00000-{t:012x}", table("pairs", rows, round=t), {})
    return root


@pytest.fixture(scope="module")
def adapters(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    return tuple(str(tiny_adapter(policy, folder / f"round={t:03d}", seed=t + 5)) for t in (0, 1))  # type: ignore[return-value]


def plain_sum(model, x_ids: list[int], ids: list[int]) -> float:
    """log pi(ids | x) by transformers alone, one sequence at a time, in float64."""
    import torch

    whole = torch.tensor([x_ids + ids])
    with torch.no_grad():
        logps = model(input_ids=whole, use_cache=False).logits[0].double().log_softmax(-1)
    return sum(logps[len(x_ids) + place - 1, token].item() for place, token in enumerate(ids))


def test_log_probabilities_are_those_of_a_plain_float64_loop(policy, adapters, data, tmp_path, capsys):
    """And purity is that of the level sets of these, found by brute force."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    text = purity(Purity(model=str(policy), adapter=adapters, data=(data,), output=tmp_path))
    report = read_record(PurityReport, tmp_path / "purity.json")
    rows = tables.read_table(tmp_path / "purity.parquet", "purity_logps").to_pylist()
    pairs = Store(data).scan("pairs").collect().to_dicts()
    assert len(rows) == 3 * len(pairs)
    assert [found.label for found in report.policies] == ["start", "after 0", "after 1"]
    for place, adapter in enumerate([None, *adapters]):
        model = AutoModelForCausalLM.from_pretrained(policy).double()
        if adapter:
            model = PeftModel.from_pretrained(model, adapter).double()
        mine = rows[place * len(pairs) : (place + 1) * len(pairs)]
        margins, ratios = [], []
        for row, pair in zip(mine, pairs, strict=True):
            assert row["policy"] == policy_name(policy, adapter) == report.policies[place].policy
            assert [row[key] for key in tables.KEY] == [pair[key] for key in tables.KEY]
            assert row["margin"] == pair["s_prompt"] - pair["s"]
            sums = {arm: plain_sum(model, pair["x_ids"], pair[f"{arm}_ids"]) for arm in ("y", "y_prompt")}
            for arm, total in sums.items():
                if not pair[f"{arm}_ids"]:
                    assert row[f"sum_logps_{arm}"] is None
                    continue
                assert row[f"sum_logps_{arm}"] == pytest.approx(total, abs=1e-3)
                assert row[f"mean_logps_{arm}"] == pytest.approx(total / len(pair[f"{arm}_ids"]), abs=1e-3)
            if pair["y_ids"]:
                margins.append(row["margin"])
                same = pair["y_ids"] == pair["y_prompt_ids"]
                ratios.append(0.0 if same else sums["y_prompt"] - sums["y"])
        counts = report.policies[place].all_pairs
        assert counts.pairs == len(margins) == 12
        assert counts.agree == sum(m * r > 0 for m, r in zip(margins, ratios, strict=True))
        for found in counts.pure_sets:
            assert found.e == brute_force(margins, ratios, found.percent)
    assert "2 pairs left out" in text
    assert text == format_purity(report)
    assert max(len(line) for line in text.splitlines()) <= 110


def test_normalized_compares_means(policy, data, tmp_path):
    purity(Purity(model=str(policy), data=(data,), output=tmp_path, normalized=True))
    report = read_record(PurityReport, tmp_path / "purity.json")
    rows = tables.read_table(tmp_path / "purity.parquet", "purity_logps").to_pylist()
    agree = sum(
        row["margin"] * (row["mean_logps_y_prompt"] - row["mean_logps_y"]) > 0
        for row in rows
        if row["mean_logps_y"] is not None
    )
    assert report.normalized
    assert report.policies[0].all_pairs.agree == agree


def test_precision_is_recorded_and_chooses_the_log_probabilities(policy, data, tmp_path):
    """float32 in small batches is float32 in one; bf16 in the same folder is measured anew, and close to it."""

    def measured(*more: str) -> tuple[PurityReport, np.ndarray]:
        words = ["purity", "--model", str(policy), "--data", str(data), "--output", str(tmp_path)]
        found = CliRunner().invoke(cli.ple, [*words, *more])
        assert found.exit_code == 0, found.stderr
        rows = tables.read_table(tmp_path / "purity.parquet", "purity_logps").drop_null()
        report = read_record(PurityReport, tmp_path / "purity.json")
        assert f"over tokens in {report.precision}," in found.stdout
        return report, rows["sum_logps_y"].to_numpy()

    report, whole = measured("--precision", "float32")
    assert report.precision == "float32"
    report, coarse = measured("--precision", "bf16")
    assert report.precision == "bf16"
    assert 1e-4 < np.abs(coarse - whole).max() < 0.5
    shutil.rmtree(tmp_path / "logps")
    _, small = measured("--precision", "float32", "--microbatch-tokens", "1")
    assert small == pytest.approx(whole, abs=1e-4)


def test_nothing_is_computed_twice_and_rounds_restrict_the_pairs(policy, adapters, data, tmp_path, monkeypatch):
    """Round 0 first, then everything: what is left is round 1, and the third time nothing loads a model."""
    import ple_train.measure.purity as room

    scored = []
    score = room.measured
    monkeypatch.setattr(room, "measured", lambda *words: scored.append(words[4].parent.name) or score(*words))
    options = {"model": str(policy), "adapter": adapters[:1], "data": (data,), "output": tmp_path}
    purity(Purity(**options, round=(0,)))
    assert read_record(PurityReport, tmp_path / "purity.json").rounds == [0]
    assert pq.read_metadata(tmp_path / "purity.parquet").num_rows == 14
    purity(Purity(**options))
    assert scored == ["round=000"] * 2 + ["round=001"] * 2
    before = (tmp_path / "purity.json").read_bytes(), (tmp_path / "purity.parquet").read_bytes()
    monkeypatch.setattr(room, "load_policy", None)
    purity(Purity(**options))
    assert before == ((tmp_path / "purity.json").read_bytes(), (tmp_path / "purity.parquet").read_bytes())


def test_a_run_directory_gives_its_policies(policy, adapters, data, tmp_path):
    """RUN as `ple run` leaves it; a round without ple.json is not finished and is no policy yet."""
    run = tmp_path / "run"
    (run / "policy").mkdir(parents=True)
    (run / "data").symlink_to(data)
    recipe = {"model": str(policy), "queries": "q", "principles": "hh", "reward_model": "r", "run_dir": str(run)}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for t, adapter in enumerate(adapters):
        (run / "policy" / f"round={t:03d}").symlink_to(adapter)
    (Path(adapters[0]) / "ple.json").write_text("{}")
    try:
        found = CliRunner().invoke(cli.ple, ["purity", "--run", str(run)])
        assert found.exit_code == 0, found.stderr
        report = read_record(PurityReport, run / "purity" / "purity.json")
    finally:
        (Path(adapters[0]) / "ple.json").unlink()
    assert [(p.label, p.after_round) for p in report.policies] == [("start", None), ("after 0", 0)]
    assert found.stdout == format_purity(report) + "\n"


def test_policies_of_a_run_stand_in_the_order_of_their_rounds(policy, adapters, data, tmp_path):
    recipe = {"model": str(policy), "queries": "q", "principles": "hh", "reward_model": "r", "run_dir": "run"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "data").symlink_to(data)
    for t in (1000, 2, 999):
        output = shutil.copytree(adapters[0], tmp_path / "policy" / f"round={t:03d}")
        (output / "ple.json").write_text("{}")
    purity(Purity(run=tmp_path))
    found = read_record(PurityReport, tmp_path / "purity" / "purity.json").policies
    assert [policy.after_round for policy in found] == [None, 2, 999, 1000]


def test_an_interrupted_measurement_goes_on_where_it_was(policy, data, tmp_path, monkeypatch):
    """Stopped in the second shard: the first is kept, and the results appear only when everything is measured."""
    import ple_train.measure.purity as room

    score = room.measured

    def stop_at_round_1(*words):
        if words[4].parent.name == "round=001":
            raise KeyboardInterrupt
        return score(*words)

    monkeypatch.setattr(room, "measured", stop_at_round_1)
    options = {"model": str(policy), "data": (data,), "output": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        purity(Purity(**options))
    assert [path.name for path in tmp_path.iterdir()] == ["logps"]
    scored = []
    monkeypatch.setattr(room, "measured", lambda *words: scored.append(words[4].parent.name) or score(*words))
    purity(Purity(**options))
    assert scored == ["round=001"]


def test_killed_with_sigkill_and_run_again_is_the_uninterrupted_measurement(policy, adapters, data, tmp_path, forks):
    """Killed just before a change of the file system, in the middle and then early again; what was kept stays."""

    def contents(place: Path) -> dict[str, bytes]:
        found = [place / "purity.json", place / "purity.parquet", *(place / "logps").rglob("[!.]*.parquet")]
        return {str(path.relative_to(place)): path.read_bytes() for path in found}

    def kept(place: Path) -> dict[Path, int]:
        return {path: path.stat().st_ino for path in (place / "logps").rglob("[!.]*.parquet")}

    def run(place: Path, **kill: int) -> int:
        words = [
            "purity",
            "--model",
            str(policy),
            "--adapter",
            adapters[0],
            "--data",
            str(data),
            "--output",
            str(place),
        ]
        return forks.run(words, log=str(log), watch=str(place), **kill)[0]

    log, whole, killed = tmp_path / "log", tmp_path / "whole", tmp_path / "killed"
    assert run(whole) == 0, log.read_text()
    changes = int(log.read_text().rsplit("changes ", 1)[1])
    assert run(killed, kill_at=changes // 2) == -signal.SIGKILL
    before = kept(killed)
    assert 0 < len(before) < len(kept(whole))
    assert run(killed, kill_at=3) == -signal.SIGKILL
    assert not (killed / "purity.json").exists()
    assert run(killed) == 0, log.read_text()
    assert before.items() <= kept(killed).items()
    assert contents(killed) == contents(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either --run RUN, or --model"),
        ({"model": "m"}, "--model needs --data and --output"),
        ({"run": Path("nowhere")}, "nowhere: no run directory"),
        ({"run": Path("r"), "adapter": ("a",)}, "leave out --adapter"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UsageError, match=message):
        purity(Purity(**options))


def test_wrong_data(policy, data, tmp_path):
    with pytest.raises(UsageError, match="--round 7: no pairs of that round"):
        purity(Purity(model=str(policy), data=(data,), output=tmp_path, round=(7,)))
    with pytest.raises(UsageError, match="no pairs in"):
        purity(Purity(model=str(policy), data=(tmp_path / "none",), output=tmp_path))
    other = Store(tmp_path / "other")
    other.commit("pairs", 0, "00000-0123456789ab", table("pairs", [{"y_ids": [99_999]}]), {})
    with pytest.raises(UsageError, match="query 'q0' of round 0: y_ids holds token 99999"):
        purity(Purity(model=str(policy), data=(other.root,), output=tmp_path))


def test_a_damaged_kept_file_is_named(policy, data, tmp_path):
    purity(Purity(model=str(policy), data=(data,), output=tmp_path))
    kept = next((tmp_path / "logps").rglob("*.parquet"))
    kept.write_bytes(kept.read_bytes()[:-9])
    with pytest.raises(DamagedError, match=kept.name):
        purity(Purity(model=str(policy), data=(data,), output=tmp_path))
