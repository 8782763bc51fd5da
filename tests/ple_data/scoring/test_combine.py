"""Several rewards put together: the rules against an oracle, resumed, shared, refused where they differ."""

import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ple_data.exchange.export import export
from ple_data.inspection import inspect
from ple_data.rewards import RewardModel
from ple_data.scoring.combine import Load, combined, score_together
from ple_data.scoring.score import score
from ple_data.storage.store import Store
from ple_data.storage.verify import verify
from ple_train.stream import plain_rewards
from schemas.errors import PleError, UsageError
from schemas.options import Combination, Score, combination
from schemas.recipe import load_recipe
from schemas.records import RoundManifest
from tests import oracle
from tests.ple_data.scoring.test_score import Words, commit_unit, contents

MODELS = {
    "words@1": lambda x, y: float(len(y.split())),
    "odd@2": lambda x, y: float(len(y.split()) % 3) * 10,
    "same@3": lambda x, y: 0.1,
}


class Loads:
    """Loads of tests' models, each once, with what each was asked."""

    def __init__(self, *names: str, stop_after: int | None = None) -> None:
        self.names, self.stop_after = names or tuple(MODELS), stop_after
        self.asked: list[tuple[str, str, str]] = []
        self.loaded = 0

    def all(self) -> list[Load]:
        return [lambda name=name: self._load(name) for name in self.names]

    @contextmanager
    def _load(self, name: str) -> Iterator[RewardModel]:
        def reward(x: str, y: str) -> float:
            if self.stop_after is not None and len(self.asked) >= self.stop_after:
                raise PleError("stopped")
            self.asked.append((name, x, y))
            return MODELS[name](x, y)

        assert not self.loaded, "two models at once"
        self.loaded += 1
        yield Words(name, reward)
        self.loaded -= 1


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Three units of four rows in round 0, one in round 1, both sampled to their end."""
    store = Store(tmp_path / "data")
    for unit in range(3):
        commit_unit(store, unit)
    commit_unit(store, 3, round=1)
    store.finish("responses", 0)
    store.finish("responses", 1)
    return store


NUMBERS = st.floats(-100, 100, width=32)


@given(
    st.lists(st.tuples(st.tuples(*[NUMBERS] * 3), st.tuples(*[NUMBERS] * 3)), min_size=1, max_size=9),
    st.sampled_from(["mean", "min", "weighted:1,-0.5,2", "lexicographic", "lexicographic:3.5"]),
)
def test_each_rule_is_that_of_the_oracle(pairs: list, text: str):
    how = combination(text, 3, False)
    s, s_prompt = (np.array([pair[arm] for pair in pairs], dtype=np.float64) for arm in (0, 1))
    numbers = list(how.weights) or [how.tolerance]
    wanted = [oracle.together(how.rule, numbers, *map(list, pair)) for pair in pairs]
    np.testing.assert_allclose(np.stack(combined(how, s, s_prompt), axis=1), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("text", ["mean", "min", "weighted:1,0.5,-2", "lexicographic:0.25"])
@pytest.mark.parametrize("normalized", [False, True])
def test_pairs_hold_what_the_oracle_makes_of_each_models_rewards(store: Store, text: str, normalized: bool):
    how = combination(text, 3, normalized)
    assert score_together(store, Loads().all(), how).rows == 16
    rows = store.scan("pairs").collect()
    assert store.reward_models() == list(MODELS)
    assert set(rows["reward_model"]) == {how.name(list(MODELS))}
    for number in (0, 1):
        of_round = rows.filter(pl.col("round") == number).to_dicts()
        own = {}  # by model: of y, then of y_prompt
        for place, (name, reward) in enumerate(MODELS.items()):
            own[name] = [[float(np.float32(reward("", row[arm]))) for row in of_round] for arm in ("y", "y_prompt")]
            stored = [[row[arm][place] for row in of_round] for arm in ("rewards", "rewards_prompt")]
            assert stored == own[name]
        if normalized:
            count = len(of_round)
            scaled = {name: oracle.normalized(arms[0] + arms[1]) for name, arms in own.items()}
            own = {name: [both[:count], both[count:]] for name, both in scaled.items()}
        for at, row in enumerate(of_round):
            s, s_prompt = ([own[name][arm][at] for name in MODELS] for arm in (0, 1))
            wanted = oracle.together(how.rule, list(how.weights) or [how.tolerance], s, s_prompt)
            assert (row["s"], row["s_prompt"]) == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    assert list(verify(store)) == []


def test_one_reward_alone_is_taken_as_it_is(store: Store):
    assert combination("mean", 1, False) is None
    score(store, Words())
    rows = store.scan("pairs").collect()
    assert rows["rewards"].null_count() == rows["rewards_prompt"].null_count() == len(rows)
    assert store.reward_models() == []


def test_one_reward_may_be_normalized(store: Store, tmp_path: Path):
    how = combination("mean", 1, True)
    score_together(store, Loads("words@1").all(), how)
    rows = store.scan("pairs", round=0).collect()
    assert set(rows["reward_model"]) == {"normalized(words@1)"}
    both = np.concatenate([rows["s"], rows["s_prompt"]]).astype(np.float64)
    assert both.mean() == pytest.approx(0, abs=1e-6)
    assert both.std() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("normalized", [False, True])
def test_stopped_anywhere_it_goes_on_and_nothing_is_scored_twice(store: Store, tmp_path: Path, normalized: bool):
    how = combination("weighted:1,2,3", 3, normalized)
    whole = Store(tmp_path / "whole")
    score_together(store, (all_of_it := Loads()).all(), how, output=whole)
    for stop_after in (0, 5, 17, 40, 57, 95):
        target, first, second = Store(tmp_path / f"stop-{stop_after}"), Loads(stop_after=stop_after), Loads()
        with pytest.raises(PleError, match="stopped"):
            score_together(store, first.all(), how, output=target)
        assert not target.shards("pairs")
        score_together(store, second.all(), how, output=target)
        assert contents(target) == contents(whole)
        assert len(first.asked) + len(second.asked) <= len(all_of_it.asked) + 8  # the unit in work
        assert score_together(store, (third := Loads()).all(), how, output=target).rows_done_before == 16
        assert third.asked == []


def test_processes_share_the_units(store: Store, tmp_path: Path):
    how, found = combination("min", 3, True), []
    one = Store(tmp_path / "one")
    score_together(store, Loads().all(), how, output=one)

    def work() -> None:
        found.append(score_together(Store(store.root), Loads().all(), how, output=Store(tmp_path / "two")).rows)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(found) == 16
    assert contents(Store(tmp_path / "two")) == contents(one)


def test_another_combination_is_refused_before_the_next_model_is_asked(store: Store):
    score_together(store, Loads("words@1", "odd@2").all(), combination("mean", 2, False), round=0)
    for names, how in (
        (("words@1", "odd@2"), combination("min", 2, False)),
        (("words@1", "odd@2"), combination("mean", 2, True)),
        (("words@1", "same@3"), combination("mean", 2, False)),
        (("odd@2", "words@1"), combination("mean", 2, False)),
        (("words@1", "odd@2", "same@3"), combination("mean", 3, False)),
    ):
        loads = Loads(*names)
        with pytest.raises(UsageError, match=r"scored by mean\(words@1, odd@2\), not by .*--output"):
            score_together(store, loads.all(), how)
        assert not {name for name, _, _ in loads.asked} - {"words@1", "odd@2"}
    with pytest.raises(UsageError, match=r"scored by mean\(words@1, odd@2\), not by words@1:"):
        score(store, Words())
    with pytest.raises(UsageError, match="words@1 is given twice"):
        score_together(store, Loads("words@1", "words@1").all(), combination("mean", 2, False))


def test_a_round_that_is_still_sampled_waits_where_its_mean_is_needed(store: Store, tmp_path: Path, capfd):
    other = Store(tmp_path / "other")
    store.manifest_path(0).unlink()
    store.save_manifest(RoundManifest(round=0, settings={"samples": 1}, counts={"queries_taken": 16}))
    assert score_together(store, Loads().all(), combination("mean", 3, False), output=other).rows == 16
    how = combination("mean", 3, True)
    assert score_together(store, Loads().all(), how).rows == 4
    assert {shard.round for shard in store.shards("pairs")} == {1}
    assert "round 0 becomes pairs when all of its responses are there" in capfd.readouterr().err
    commit_unit(store, 8)
    assert score_together(store, (more := Loads()).all(), how).rows == 16
    assert len(more.asked) == 3 * 8  # the new unit alone


def test_units_that_came_after_the_first_model_are_said_to_wait(store: Store, capfd):
    how, loads = combination("mean", 2, False), Loads("words@1", "odd@2").all()

    def later():
        commit_unit(store, 9, round=1)
        return loads[1]()

    assert score_together(store, [loads[0], later], how).rows == 16
    said = capfd.readouterr().err
    assert "round 1 becomes pairs where all models have scored it: rewards are kept; run ple-gen to its end" in said
    assert score_together(store, Loads("words@1", "odd@2").all(), how).rows == 4
    assert "becomes pairs" not in capfd.readouterr().err


def test_rewards_that_are_lost_before_they_are_put_together_are_found(store: Store):
    loads = Loads("words@1", "odd@2")
    how = combination("weighted:1e38,1e38", 2, False)
    with pytest.raises(PleError, match="not finite float32 numbers"):
        score_together(store, loads.all(), how)
    [own, _] = sorted((store.root / ".ple" / "rewards").iterdir())
    shard = Store(own).shards("rewards")[0]
    shard.path.write_bytes(shard.path.read_bytes()[:-9])
    [problem] = [problem for problem in verify(store) if problem.severity == "error"]
    assert problem.path == shard.path
    assert "run the same ple-score command again" in str(problem)


@pytest.mark.parametrize(
    ("text", "models", "message"),
    [
        ("max", 2, "--combine must be mean, min, weighted:W1,W2,... or lexicographic"),
        ("mean:2", 2, "--combine must be"),
        ("min", 1, "--combine min puts several rewards together: give --reward-model for each"),
        ("weighted:1", 2, "give a weight for each of the 2 rewards"),
        ("weighted:0,0", 2, "give a weight for each of the 2 rewards, not all of them 0"),
        ("weighted:1,x", 2, "1,x is not what it takes"),
        ("weighted:1,inf", 2, "1,inf is not what it takes"),
        ("weighted", 2, "nothing is not what it takes"),
        ("lexicographic:-1", 2, "the tolerance is at least 0"),
        ("lexicographic:1,2", 2, "1,2 is not what it takes"),
    ],
)
def test_a_rule_that_is_none_is_refused(text: str, models: int, message: str, tmp_path: Path):
    with pytest.raises(UsageError, match=message):
        Score(data=tmp_path, reward_model=["r"] * models, combine=text)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: m\nqueries: q\nprinciples: p\nreward_model: {['r'] * models}\nrun_dir: run\n")
    with pytest.raises(UsageError, match=f"score.combine: .*{message}"):
        load_recipe(recipe, [f"score.combine={text}"])


def test_a_combination_is_named_with_all_that_it_is_of():
    assert Combination("weighted", (1.0, 0.1), 0.0, True).name(["a", "b"]) == "normalized weighted:1,0.1(a, b)"
    assert Combination("lexicographic", tolerance=0.5).name(["a", "b"]) == "lexicographic:0.5(a, b)"
    assert Combination("mean").name(["a", "b"]) == "mean(a, b)"


REWARDS = """
import time
def {name}(xs, ys):
    time.sleep(0.02)
    return [{value} for y in ys]
"""


def test_killed_again_and_again_it_leaves_what_an_uninterrupted_run_does(store: Store, tmp_path: Path, forks):
    specs = []
    for name, value in (("words", "float(len(y.split()))"), ("odd", "float(len(y.split()) % 3)")):
        (tmp_path / f"{name}.py").write_text(REWARDS.format(name=name, value=value))
        specs += ["--reward-model", f"{tmp_path / name}.py:{name}"]
    for unit in range(10, 20):
        commit_unit(store, unit, round=2)
    store.finish("responses", 2)
    argv = ["score", "--data", str(store.root), *specs, "--normalize-rewards", "--combine", "min"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    draw = random.Random(3)
    kills = 0
    assert forks.run([*argv, "--output", str(whole)], tmp_path / "log")[0] == 0
    for _ in range(12):
        code, _ = forks.run([*argv, "--output", str(killed)], tmp_path / "log", kill_after=draw.uniform(0.05, 0.8))
        kills += code != 0
    assert kills
    assert forks.run([*argv, "--output", str(killed)], tmp_path / "log")[0] == 0
    assert contents(Store(killed)) == contents(Store(whole))
    assert [problem for problem in verify(Store(killed)) if problem.severity == "error"] == []


def test_rewards_of_a_pair_do_not_choose_among_pairs(store: Store, tmp_path: Path):
    score_together(store, Loads().all(), combination("lexicographic:1", 3, True))
    for wanted in (lambda: export(store.root, format="sft", output=str(tmp_path / "o.jsonl")),
                   lambda: plain_rewards(snapshot_of(store))):  # fmt: skip
        with pytest.raises(UsageError, match=r"rewards by normalized lexicographic:1\(words@1, .* compare"):
            wanted()


def snapshot_of(store: Store) -> list:
    return [SimpleNamespace(shard=shard) for shard in store.shards("pairs")]


def test_inspection_names_the_rewards_with_their_means_and_correlations(store: Store):
    score_together(store, Loads().all(), combination("mean", 3, False))
    found = json.loads(inspect(store.root, as_json=True))["rewards"]
    rows = store.scan("pairs").collect()
    own = {arm: np.array(rows[arm].to_list(), dtype=np.float64) for arm in ("rewards", "rewards_prompt")}
    both = np.concatenate(list(own.values()))
    assert [each["model"] for each in found] == list(MODELS)
    for at, each in enumerate(found):
        assert each["mean_y"] == pytest.approx(own["rewards"][:, at].mean())
        assert each["mean_y_prompt"] == pytest.approx(own["rewards_prompt"][:, at].mean())
    assert found[0]["correlations"][1] == pytest.approx(np.corrcoef(both[:, 0], both[:, 1])[0, 1])
    assert found[2]["correlations"] == [None, None, None]
    text = inspect(store.root)
    assert "Rewards that were put together: means, and correlations over all responses" in text
    assert "2  odd@2" in text
