"""The frontier (benchmarks/paper): rewards at equal KL, areas, intervals, learning rates, pages. Trains nothing."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import stdev
from typing import Any
from unittest.mock import Mock

import numpy as np
import polars as pl
import pytest
from scipy.stats import t as student

from benchmarks.paper import comparisons, pages, pairs, sweep
from benchmarks.paper.frontier import STUDENT, along, area, estimate, reaches, weights
from benchmarks.paper.methods import FRONTIER, RATE, Run
from benchmarks.paper.points import BASE, Record, evaluated, folder, read_curves
from benchmarks.paper.sweep import begin_with, best_rate, known_rates, point, select
from benchmarks.paper.tasks import TASKS
from ple_data.storage.parquet import save_rows

NAMED = {method.name: method for method in FRONTIER}


def one(values: list[float]) -> np.ndarray:
    return np.array(values)[:, None]


def test_between_two_points_a_curve_is_straight() -> None:
    """Points come in any order: (0, 1), (10, 3), (4, 2). At 7, halfway from 4 to 10: 2.5."""
    x, y = one([0, 10, 4]), one([1, 3, 2])
    assert along(x, y, 7.0) == [2.5]
    assert along(x, y, 0.0) == [1.0]
    assert reaches(x, 10.0)
    assert not reaches(x, 10.1)


def test_each_draw_has_its_own_curve_and_level() -> None:
    x, y = np.array([[0.0, 0.0], [10.0, 20.0]]), np.array([[0.0, 1.0], [10.0, 5.0]])
    assert along(x, y, np.array([5.0, 10.0])).tolist() == [5.0, 3.0]


def test_the_area_is_a_mean_height() -> None:
    """(0, 0), (4, 2), (10, 5): up to 4 a triangle of mean height 1; up to 7 its height ends at 3.5. Then a drop."""
    x, y = one([0, 10, 4]), one([0, 5, 2])
    assert area(x, y, 4.0) == [1.0]
    assert area(x, y, 7.0) == [1.75]
    bent = one([0, 0, 2])  # 0 up to 2 of 4, then up to 2: a triangle of area 2
    assert area(one([0, 2, 4]), bent, 4.0) == [0.5]


def test_draws_are_means_of_queries_drawn_again() -> None:
    found = weights(40, 500, 0)
    assert found.shape == (501, 40)
    assert np.allclose(found.sum(axis=1), 1)
    assert np.allclose(found[0], 1 / 40)
    values = np.random.default_rng(1).normal(size=40)
    assert np.std(found[1:] @ values) == pytest.approx(values.std() / math.sqrt(40), rel=0.15)


def test_student() -> None:
    assert pytest.approx(student.ppf(0.975, range(1, 10)), abs=6e-4) == STUDENT


def test_the_interval_has_queries_and_seeds() -> None:
    """Draws -1 to 1 in every seed, around the seeds' 0, 1, 2: half widths 0.95 and t * 1 / sqrt(3)."""
    steps = np.linspace(-1, 1, 1001)
    seeds = [np.concatenate([[own], own + steps]) for own in (0.0, 1.0, 2.0)]
    found = estimate(seeds)
    half = math.hypot(0.95, STUDENT[1] * stdev([0, 1, 2]) / math.sqrt(3))
    assert (found.mean, found.low, found.high) == pytest.approx((1.0, 1.0 - half, 1.0 + half))
    alone = estimate(seeds[:1])
    assert (alone.low, alone.high) == pytest.approx((-0.95, 0.95))


START = (0.0, 0.0)


def test_rates_are_chosen_at_one_kl() -> None:
    """Along the root of KL: a reward of 2 at a KL of 20 is 1.41 at 10."""
    far = {1e-3: [START, (20.0, 2.0)], 3e-3: [START, (100.0, 3.0), (50.0, 2.0)]}
    assert best_rate("m", {3e-4: [START, (10.0, 1.5)], **far}) == 3e-4
    assert best_rate("m", {3e-4: [START, (10.0, 1.4)], **far}) == 1e-3
    assert best_rate("m", {3e-4: [START, (40.0, 2.9)], **far}) == 3e-4
    assert best_rate("m", {3e-4: [START, (9.9, 9.0)], **far}) == 1e-3, "a rate that does not go so far is left out"
    assert best_rate("m", {3e-4: [START, (2.0, 1.0)], 1e-3: [START, (3.0, 1.1)]}) == 3e-4, "unless none does"
    assert best_rate("m", {3e-4: [START], 1e-3: [START, (12.0, 0.1)]}) == 1e-3, "the other diverged"
    with pytest.raises(SystemExit, match="every learning rate of m diverged"):
        best_rate("m", {3e-4: [START], 1e-3: [START]})


def test_beyond_an_end_that_is_best_one_more_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    best = {"dpo": {3e-4: 1.0, 1e-4: 2.0}, "stable-ple": {1e-3: 1.0}, "ple-residual": {3e-3: 1.0}}
    asked = []

    def tries(task: Any, rates: dict[Any, tuple[float, ...]], seed: int, workers: int) -> Any:
        asked.append({method.name: own for method, own in rates.items()})
        return {m.name: {r: [START, (10.0, best[m.name].get(r, 0.5))] for r in own} for m, own in rates.items()}

    monkeypatch.setattr(sweep, "try_rates", tries)
    methods = [NAMED[name] for name in (*best, "sft")]
    chosen, tried = sweep.choose_rates(TASKS["imdb"], methods, 0, 1)
    assert asked == [dict.fromkeys(best, (3e-4, 1e-3, 3e-3)), {"dpo": (1e-4,), "ple-residual": (1e-2,)}]
    assert chosen == {"dpo": 1e-4, "stable-ple": 1e-3, "ple-residual": 3e-3}
    assert list(tried["dpo"]) == [1e-4, 3e-4, 1e-3, 3e-3]


def test_the_choice_of_rates_is_kept_before_any_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = {"dpo": 1e-4}, {"dpo": {1e-4: [START, (10.0, 1.0)]}}
    monkeypatch.setattr(sweep, "choose_rates", lambda *_: chosen)
    monkeypatch.setattr(sweep, "all_points", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(TASKS["imdb"], tmp_path / "results", [0], 1, None)
    assert known_rates(TASKS["imdb"], tmp_path / "results") == chosen


def test_a_run_that_fails_or_diverges_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four: one is there, one diverges, one fails, one is made. The second time only the failed one is tried."""
    monkeypatch.chdir(tmp_path)
    runs, record = write_points({"dpo": 0.1})
    there, *missing = [run for run in runs if run.seed == 0]
    record.path(0).unlink()
    ends = dict(zip([run.label for run in missing], ["diverges", "fails", "is made"], strict=True))
    tried = []

    def trains(task: Any, run: Run) -> bool:
        tried.append(ends[run.label])
        if ends[run.label] == "fails":
            raise SystemExit("disk full")
        return ends[run.label] == "is made"

    monkeypatch.setattr(sweep, "train", trains)
    monkeypatch.setattr(sweep, "evaluate", lambda *_, **__: None)
    monkeypatch.setattr(sweep, "model_digest", lambda _: "digest")
    record.add(0, BASE, folder("unseen", 0), "digest", {})
    record.add(0, there.label, folder("unseen", 0, there.label), "digest", COSTS)
    for again in (False, True):
        failed = sweep.finish(TASKS["imdb"], [there, *missing], "unseen", 1, record)
        assert failed == [f"{missing[1].directory}: disk full"]
        assert tried == (["fails"] if again else ["diverges", "fails", "is made"])
        tried.clear()
    assert record.diverged(0) == [missing[0].label]
    assert record.labels(0) == {BASE, there.label, missing[0].label, missing[2].label}
    assert record.read(0)[there.label].costs == COSTS
    with pytest.raises(SystemExit, match="disk full"):
        sweep.end_with(failed)


def test_points_are_named() -> None:
    dpo = NAMED["dpo"]
    assert select(TASKS["imdb"], ["dpo:0.1", "stable-ple-sums"]) == [(dpo, 0.1), (NAMED["stable-ple-sums"], 0.6)]
    assert len(select(TASKS["imdb"], None)) == sum(len(method.brakes) for method in FRONTIER)
    with pytest.raises(SystemExit, match="--only dpo:7: no such point; there are sft"):
        select(TASKS["imdb"], ["dpo:7"])
    real = select(TASKS["imdb-smollm2"], ["stable-ple"])
    assert [(method.name, brake) for method, brake in real] == [("stable-ple", brake) for brake in (0.3, 0.6, 1.0)]
    assert point(dpo, 0.1, 2, {"dpo": 3e-4}) == Run(dpo, 3e-4, 2, 0.1)
    assert point(NAMED["stable-ple-sums"], 0.6, 0, {"stable-ple": 3e-3}).learning_rate == 3e-3
    assert point(NAMED["sft"], 0.01, 0, {}) == Run(NAMED["sft"], 0.01, 0)
    with pytest.raises(SystemExit, match="--rates has no learning rate of dpo"):
        point(dpo, 0.1, 0, {})


def write_evaluation(place: Path, label: str, kl: float, judge: float, seed: int) -> None:
    """Of the start policy, and of a policy at `kl` with the mean reward `judge`; its training reward is half of that.
    Twelve queries, which differ in both."""
    policies = {BASE: (0.0, 0.0), label: (kl, judge)}
    queries = np.random.default_rng(seed).normal(size=(12, 2))
    queries -= queries.mean(axis=0)
    rows = [
        {
            "label": name, "policy": name, "query_id": f"q{n:02d}", "sample": 0, "x": "A *film*", "y": "is | good\n",
            "tokens": 4, "finish": "stop", "rewards": [at_judge + own, (at_judge + own) / 2], "reference": "r",
            "reference_nll": 2.0, "reference_tokens": 2, "own_logps": -4.0, "first_logps": -4.0 - at_kl - at_kl * other,
        }
        for name, (at_kl, at_judge) in policies.items()
        for n, (own, other) in enumerate(queries.tolist())
    ]  # fmt: skip
    models = [{"name": "unseen", "trained": False}, {"name": "seen", "trained": True}]
    save_rows(place / "eval.parquet", "evaluation", rows, {"reward_models": models})

    def told(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean, "high": mean, "count": 12}

    metrics = {name: told(1.0) for name in ("perplexity", "entropy", "distinct_1", "length", "truncated")}
    reports = [
        {"label": name, "metrics": metrics | {"kl": told(k), "reward:unseen": told(j), "reward:seen": told(j / 2)}}
        for name, (k, j) in policies.items()
    ]
    (place / "eval.json").write_text(json.dumps({"reward_models": models, "policies": reports}))


def write_points(height: dict[str, float]) -> tuple[list[Run], Record]:
    """Every point of two seeds; a method's reward is its height a KL, and 0.1 more with the second seed."""
    texts = tuple(pages.sample_queries([f"q{n:02d}" for n in range(12)]))
    runs, record = [], Record(Path("results", "imdb-frontier").absolute(), texts)
    for seed in (0, 1):
        write_evaluation(folder("unseen", seed), BASE, 0.0, 0.0, seed)
        record.add(seed, BASE, folder("unseen", seed), "digest", {})
        for method in (NAMED[name] for name in height):
            for at, brake in enumerate(method.brakes):
                run = Run(
                    method, brake if method.brake == RATE else 1e-3, seed, None if method.brake == RATE else brake
                )
                kl = 6.0 * (at + 1)
                place = folder("unseen", seed, run.label)
                write_evaluation(place, run.label, kl, height[method.name] * kl + 0.1 * seed, seed)
                record.add(seed, run.label, place, "digest", COSTS)
                runs.append(run)
    return runs, record


COSTS = {"tokens_sampled": 3, "tokens_trained": 5, "updates": 7}
HEIGHT = {"dpo": 0.1, "stable-ple": 0.15, "dpo-means": 0.1, "ple-residual": 0.2, "ple-residual-no-rank": 0.1, "sft": 0}


def at(level: float, height: float, seed: int = 0) -> float:
    """The reward at a KL between two points of `write_points`."""
    kls = np.array([6.0, 12.0, 18.0, 24.0])
    return float(np.interp(math.sqrt(level), np.sqrt(kls), height * kls + 0.1 * seed))


def test_the_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs, record = write_points(HEIGHT)
    missing = Run(NAMED["raft"], 1e-3, 0)
    assert evaluated(missing, "unseen") is None
    tried = {"dpo": {3e-4: [(0.0, 0.2), (5.0, 0.4)], 1e-3: [(0.0, 0.2)]}}
    pages.write_pages(TASKS["imdb"], tmp_path / "results", [*runs, missing], {"dpo": 3e-4}, tried, record)
    found = json.loads((tmp_path / "results" / "imdb-frontier.json").read_text())
    at_14 = found["equal_kl"]["14.0"]
    assert at_14["dpo"]["judge"]["by_seed"] == pytest.approx([at(14, 0.1), at(14, 0.1, seed=1)])
    assert at_14["ple-residual"]["between"] == pytest.approx([12.0, 18.0])
    assert at_14["ple-residual"]["judge_less"]["dpo"]["mean"] == pytest.approx(at(14, 0.1))
    assert at_14["ple-residual"]["reward_less"]["sft"]["by_seed"] == pytest.approx([at(14, 0.1)] * 2)
    assert "judge_less" not in at_14["dpo"]
    own = found["at_own_kl"]["stable-ple"]["dpo"]
    assert own["judge"]["mean"] == pytest.approx(-0.05 * (6 + 12 + 18 + 24) / 4)
    assert (own["brakes"], own["kl"], own["from_start"]) == ([0.01, 0.03, 0.1, 0.3], 15.0, False)
    far = np.linspace(0, math.sqrt(20), 100_001)
    height = np.interp(far, np.sqrt([0, 6, 12, 18, 24]), [0.0, *(0.2 * kl + 0.1 for kl in (6, 12, 18, 24))])
    assert found["area"]["ple-residual"]["judge"]["by_seed"][1] == pytest.approx(height.mean(), abs=1e-4)
    assert len(found["points"]) == len(runs)
    residual = next(own for own in found["points"] if own["method"] == "ple-residual" and own["seed"] == 1)
    assert (residual["brake"], residual["value"], residual["kl"]["mean"]) == ("beta", 6, 6.0)
    parts = {own["method"]: own for own in found["ablations"]}
    assert parts["ple-residual-no-rank"]["judge"]["mean"] == pytest.approx(-0.6)
    assert parts["dpo-means"]["judge"]["mean"] == pytest.approx(-0.1 * (6 + 12 + 18 + 24) / 4)
    text = (tmp_path / "results" / "imdb-frontier.md").read_text()
    assert f"| DPO | 12.0 and 18.0 | {at(14, 0.1) + 0.05:.2f} [" in text
    [less_dpo] = re.findall(r"### PLE, stabilised, unseen judge.*?\n(\| DPO \|[^\n]*)", text, re.DOTALL)
    less = [f"{at(level, 0.05):.2f}" for level in (8, 14, 20)]
    assert [cell.split(" [")[0].strip() for cell in less_dpo.split("|")[2:6]] == [*less, "0.75"]
    assert text.count("| 7 | 0k tokens |") == 5 * 4 + 1
    assert "0.40 at 5.0" in text
    assert f"- **Not whole yet**: {len(runs)} of {len(runs) + 1} points are made" in text
    shown = (tmp_path / "results" / "imdb-answers.md").read_text()
    assert shown.count(r"| PLE, residual | 12.0 | ") == 10
    assert "*" not in shown.split("## Query 1")[1].replace(r"\*", "")
    at_12 = next(run for run in runs if run.method.name == "ple-residual" and run.braked == 3 and run.seed == 0)
    answered = record.read(0)[at_12.label].rows.drop_nulls("y")
    judged = re.findall(r"\| PLE, residual \| 12\.0 \| (\S+) \|", shown)
    assert sorted(judged) == sorted(f"{judge:.2f}" for judge in answered["judge"])
    assert r"> A \*film\*" in shown
    assert r"is \| good |" in shown
    assert (tmp_path / "results" / "imdb-frontier.png").stat().st_size > 10_000


def test_the_page_of_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_evaluation(place := tmp_path / "dpo-0.1", "dpo-0.1", kl=3.0, judge=2.0, seed=0)
    monkeypatch.setattr("sys.argv", ["pairs", str(place), "--output", "pairs.md"])
    pairs.main()
    text = Path("pairs.md").read_text()
    rows = pl.read_parquet(place / "eval.parquet").filter(label="dpo-0.1")["rewards"].to_list()
    assert "`dpo-0.1` is at a KL of 3.0 nats a response" in text
    assert sorted(re.findall(r"\| trained \| (\S+) \| (\S+) \|", text)) == sorted(
        (f"{judge:.2f}", f"{reward:.2f}") for judge, reward in rows
    )


@pytest.mark.parametrize("level", [5.5, 24.5])
def test_a_curve_without_points_on_both_sides_has_no_number(level, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    curves = read_curves(*write_points({"sft": 0.1, "dpo": 0.1}))
    assert comparisons.at_equal_kl(curves, level) == {}
    assert comparisons.areas(curves, level).keys() == ({"sft", "dpo"} if level < 6 else set())
    assert "| SFT | has 6.0 to 24.0 | |" in "\n".join(pages.table("T", {}, curves))


def test_a_number_on_a_line_to_a_far_point_is_marked() -> None:
    assert pages.ends_of((6.0, 16.0), 8) == "6.0 and 16.0"
    assert pages.ends_of((6.0, 16.1), 8) == "6.0 and 16.1 †"


def test_an_ablation_that_goes_further_than_the_whole_is_named(tmp_path: Path, monkeypatch) -> None:
    """And points before the whole's first one, where its curve is the line from the start, are marked."""
    monkeypatch.chdir(tmp_path)
    curves = read_curves(*write_points({"ple-residual": 0.1, "ple-residual-no-rank": 0.2}))
    whole = curves["ple-residual"]
    near = [replace(c, points={r: p for r, p in c.points.items() if p.metrics["kl"]["mean"] < 5}) for c in whole]
    [part] = comparisons.ablations(curves | {"ple-residual": near})
    assert "kl" not in part
    assert "beyond the whole's curve" in pages.ablation_row(part)
    [part] = comparisons.ablations(curves | {"ple-residual": [near[0], whole[1]]})
    assert (part["only_seeds"], len(part["judge"]["by_seed"])) == ([1], 1)
    assert "| 6.0 (of seed 1 only) |" in pages.ablation_row(part)
    far = [replace(c, points={r: p for r, p in c.points.items() if p.metrics["kl"]["mean"] > 7}) for c in whole]
    [part] = comparisons.ablations(curves | {"ple-residual": far})
    assert part["from_start"]
    at_6 = math.sqrt(6 / 12)  # of what the whole has at 12: as much as the ablation has at 6
    assert part["judge"]["mean"] == pytest.approx((1.2 + 1.3) / 2 * (1 - at_6))


def test_another_machine_goes_on_from_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no folder of an evaluation left: the same pages; points of another start policy are refused."""
    monkeypatch.chdir(tmp_path)
    runs, record = write_points({"dpo": 0.1})
    tried = {"dpo": {3e-4: [(0.0, 0.2), (5.0, 0.4)]}}
    pages.write_pages(TASKS["imdb"], tmp_path / "results", runs, {"dpo": 3e-4}, tried, record)
    written = {path: path.read_bytes() for path in record.folder.parent.glob("*.md")}
    size = record.path(0).stat().st_size
    shutil.rmtree("eval")
    rates, again = known_rates(TASKS["imdb"], tmp_path / "results") or ({}, {})
    pages.write_pages(TASKS["imdb"], tmp_path / "results", runs, rates, again, Record(record.folder))
    assert {path: path.read_bytes() for path in record.folder.parent.glob("*.md")} == written
    assert record.labels(0, "digest") == {BASE, *(run.label for run in runs)}
    assert record.labels(7, "another") == set()
    assert size == record.path(0).stat().st_size
    with pytest.raises(SystemExit, match="points of another start policy"):
        record.labels(0, "another")


def test_an_evaluation_begins_with_the_start_policys(tmp_path: Path) -> None:
    start = tmp_path / "base"
    (start / "answers").mkdir(parents=True)
    for name in ("answers/rows", "eval.json", "eval.parquet"):
        (start / name).write_text("x")
    (tmp_path / ".point" / "answers").mkdir(parents=True)  # a copy that was cut short
    begin_with(start, tmp_path / "point")
    assert [path.name for path in (tmp_path / "point").rglob("*")] == ["answers", "rows"]
    (tmp_path / "point" / "answers" / "more").write_text("x")
    begin_with(start, tmp_path / "point")
    assert (tmp_path / "point" / "answers" / "more").exists()
