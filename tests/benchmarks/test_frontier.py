"""The frontier (benchmarks/paper): rewards at equal KL, areas, intervals, learning rates, pages. Trains nothing."""

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from statistics import stdev

import numpy as np
import pytest
from scipy.stats import t as student

from benchmarks.paper import pages
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


def test_rates_are_chosen_at_one_kl() -> None:
    """1e-3 has the higher reward at a KL of 10, though 3e-3 ends higher; 3e-4 does not go so far."""
    start = (0.0, 0.0)
    tried = {3e-4: [start, (5.0, 9.0)], 1e-3: [start, (20.0, 2.0)], 3e-3: [start, (100.0, 5.0), (50.0, 4.0)]}
    assert best_rate(tried) == 1e-3
    assert best_rate({3e-4: [start, (5.0, 9.0)], 1e-3: [start, (6.0, 1.0)]}) == 1e-3  # the only one at 6
    assert best_rate({3e-4: [start, (12.0, 9.0)], 1e-3: [start]}) == 3e-4  # the other diverged


def test_points_are_named() -> None:
    dpo = NAMED["dpo"]
    assert select(TASKS["imdb"], ["dpo:0.1", "stable-ple-sums"]) == [(dpo, 0.1), (NAMED["stable-ple-sums"], 0.6)]
    assert len(select(TASKS["imdb"], None)) == sum(len(method.brakes) for method in FRONTIER)
    with pytest.raises(SystemExit, match="--only dpo:7: no such point; there are sft"):
        select(TASKS["imdb"], ["dpo:7"])
    real = select(TASKS["imdb-real"], ["stable-ple"])
    assert [(method.name, brake) for method, brake in real] == [("stable-ple", brake) for brake in (0.15, 0.3, 0.6)]
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
        record.add(seed, BASE, folder("unseen", seed), "digest")
        for method in (NAMED[name] for name in height):
            for at, brake in enumerate(method.brakes):
                run = Run(
                    method, brake if method.brake == RATE else 1e-3, seed, None if method.brake == RATE else brake
                )
                kl = 6.0 * (at + 1)
                place = folder("unseen", seed, run.label)
                write_evaluation(place, run.label, kl, height[method.name] * kl + 0.1 * seed, seed)
                record.add(seed, run.label, place, "digest")
                runs.append(run)
    return runs, record


HEIGHT = {"dpo": 0.1, "stable-ple": 0.15, "dpo-means": 0.1, "ple-residual": 0.2, "ple-residual-no-rank": 0.1, "sft": 0}


def test_the_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs, record = write_points(HEIGHT)
    missing = Run(NAMED["raft"], 1e-3, 0)
    assert evaluated(missing, "unseen") is None
    tried = {"dpo": {3e-4: [(0.0, 0.2), (5.0, 0.4)], 1e-3: [(0.0, 0.2)]}}
    pages.write_pages(TASKS["imdb"], tmp_path / "results", [*runs, missing], {"dpo": 3e-4}, tried, record)
    found = json.loads((tmp_path / "results" / "imdb-frontier.json").read_text())
    at_14 = found["equal_kl"]["14.0"]
    assert at_14["dpo"]["judge"]["by_seed"] == pytest.approx([1.4, 1.5])
    assert at_14["ple-residual"]["judge_less_dpo"]["mean"] == pytest.approx(1.4)
    assert at_14["ple-residual"]["reward_less_stable-ple"]["by_seed"] == pytest.approx([0.35, 0.35])
    rising = [0.0, *(0.2 * kl + 0.1 for kl in (6, 12, 18))]
    heights = [(a + b) / 2 * 6 for a, b in pairwise(rising)]
    last = (rising[3] + 0.2 * 20 + 0.1) / 2 * 2
    assert found["area"]["ple-residual"]["judge"]["by_seed"][1] == pytest.approx((sum(heights) + last) / 20)
    assert len(found["points"]) == len(runs)
    residual = next(own for own in found["points"] if own["method"] == "ple-residual" and own["seed"] == 1)
    assert (residual["brake"], residual["value"], residual["kl"]["mean"]) == ("beta", 6, 6.0)
    parts = {own["method"]: own for own in found["ablations"]}
    assert parts["ple-residual-no-rank"]["judge"]["mean"] == pytest.approx(-0.6)
    assert parts["dpo-means"]["judge"]["mean"] == pytest.approx(-0.1 * (6 + 12 + 18 + 24) / 4)
    text = (tmp_path / "results" / "imdb-frontier.md").read_text()
    assert "| DPO | 1.45 [" in text
    assert "0.40 at 5.0" in text
    shown = (tmp_path / "results" / "imdb-answers.md").read_text()
    assert shown.count(r"| PLE, residual | 12.0 | ") == 10
    assert r"> A \*film\*" in shown
    assert r"is \| good |" in shown
    assert (tmp_path / "results" / "imdb-frontier.png").stat().st_size > 10_000


def test_a_curve_that_ends_early_has_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    curves = read_curves(*write_points({"sft": 0.1, "dpo": 0.1}))
    assert pages.at_equal_kl(curves, 24.5) == {}
    assert "| SFT | ends at 24.0 " in "\n".join(pages.table("T", {}, curves, 24.5))


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
