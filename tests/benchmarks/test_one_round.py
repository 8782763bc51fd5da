"""One round of a real model (benchmarks/one_round.py) on a tiny one: what it leaves, that a rerun does nothing twice,
the trial forms' losses, and that every job is a command of ours."""

import json
import math
from pathlib import Path

import polars as pl
import pytest
import torch

import cli
from benchmarks import trials
from benchmarks.one_round import JOBS, main, policy_row, read_jobs
from ple_data.storage.store import Store
from ple_train.model.policy import load_policy
from ple_train.objectives import loss_on_pairs, ple_residual
from ple_train.objectives.pair_loss import Knobs, PairLoss, Pairs
from ple_train.snapshot import freeze
from ple_train.stream import PairStream
from ple_train.train import settled
from schemas.options import Train

FEW = """
["DPO, sums"]
"dpo-b0.1" = "--objective dpo --beta 0.1"
[others]
"importance-b1" = { words = "--objective ple-residual --beta 1", trial = "importance", principle = "none" }
"""


@pytest.mark.parametrize("job", read_jobs(JOBS), ids=lambda job: job.name)
def test_every_job_is_a_command_of_ours(job, tmp_path: Path) -> None:
    first, *words = map(str, job.command("M", tmp_path))
    command = cli.ple.commands[first]
    if first == "baseline":
        command = command.commands[words.pop(0)]
    context = command.make_context(first, words)
    if first == "train":
        settled(Train(**context.params))


@pytest.fixture(scope="module")
def words(policy: Path, reward: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line of a round that has been run; the output is `out` beside the jobs."""
    place = tmp_path_factory.mktemp("round")
    for name, first in (("queries", 0), ("unseen", 50)):
        numbers = range(first, first + 6)
        rows = [{"id": f"q{n}", "x": f"the story of scene {n} was", "reference": " very good."} for n in numbers]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "judge.py").write_text("def score(xs, ys):\n    return [float(len(y)) for y in ys]\n")
    (place / "few.toml").write_text(FEW)
    words = [str(policy), "--queries", str(place / "queries.jsonl"), "--unseen", str(place / "unseen.jsonl")]
    words += ["--reward-model", str(reward), "--judge", f"{place / 'judge.py'}:score", "--output", str(place / "out")]
    words += ["--pairs", "6", "--epochs", "1", "--workers", "2", "--jobs", str(place / "few.toml")]
    main(words)
    return words


@pytest.fixture
def output(words: list[str]) -> Path:
    return Path(words[words.index("--output") + 1])


@pytest.mark.long
def test_a_row_a_policy(output: Path) -> None:
    start, dpo, importance = json.loads((output / "one_round.json").read_text())["policies"]
    assert [row["name"] for row in (start, dpo, importance)] == ["start", "dpo-b0.1", "importance-b1"]
    assert (importance["trial"], importance["principle"], importance["family"]) == ("importance", "none", "others")
    assert start["kl"]["mean"] == 0
    for row in (dpo, importance):
        assert row["kl"]["mean"] != 0
        assert {"reward", "judge", "perplexity", "entropy", "distinct_1", "tokens", "cut"} <= row.keys()
        (only,) = row["steps"]
        assert only["drift_y"] == pytest.approx(0, abs=1e-5)
        assert 0 < only["entropy"] < math.log(384)
        assert only["mean_logps_y_prompt"] < 0


@pytest.mark.long
def test_a_rerun_does_nothing_twice(words: list[str], output: Path) -> None:
    found = (output / "one_round.json").read_text()
    kept = {path: path.stat().st_mtime_ns for place in ("data", "policies", "eval") for path in files(output / place)}
    main(words)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert (output / "one_round.json").read_text() == found


@pytest.mark.long
def test_importance_sees_what_sampled_y_prompt(policy: Path, output: Path) -> None:
    data = output / "data" / "imdb"
    options = Train(model=str(policy), data=(data,), round=0, output=output / "none")
    whole = pl.from_arrow(Store(data).read(Store(data).shards("pairs")[0]))
    expected = sorted(math.fsum(logps) / len(logps) for logps in whole["y_prompt_logps"].to_list())
    limits = load_policy(str(policy))
    with trials.in_place("importance", data):
        ((sequences, _),) = PairStream(freeze((data,), 0, None), options, limits).batches(0, 0)
    assert sorted(s.tag.quantile for s in sequences if s.tag.arm == "y_prompt") == pytest.approx(expected, rel=1e-6)
    assert loss_on_pairs("ple-residual") is ple_residual.loss


def files(folder: Path) -> list[Path]:
    """All but locks and the reports, which are put together anew."""
    return [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock" and path.suffix != ".lock" and path.stem != "eval"
    ]


def pair(margin: float, logps: tuple[float, float], start: tuple[float, float]) -> Pairs:
    """One pair of responses of 2 and 4 tokens, by means."""
    of = {"logps": logps, "start": start, "lengths": (2.0, 4.0), "coefficients": (0, 0), "quantiles": (0.0, -1.5)}
    tensors = {name: torch.tensor([value], dtype=torch.float64) for name, value in of.items()}
    return Pairs(**tensors, margin=torch.tensor([margin], dtype=torch.float64), form="means")


def bowl(m: float, beta: float) -> float:
    return 2 / beta * math.log(math.cosh(m / 2))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # learned: (-2 + 1) / 2 = -0.5 of y and (-4 + 8) / 4 = 1 of y_prompt, so Delta = 1.5
        (trials.center(0.3), bowl(0.9 - 0.3 - 0.5 * 1.5, 0.5)),
        (trials.split, bowl(-0.45 + 0.5 * 0.5, 0.5) + bowl(0.45 - 0.5 * 1, 0.5)),
        # mean log pi_0(y_prompt|x) = -8 / 4 = -2, and -1.5 with the principle
        (trials.importance, math.exp(-0.5) * bowl(0.9 - 0.5 * 1.5, 0.5)),
        (trials.both, bowl(0.9 - 0.5 * 1.5, 0.5) + 0.5**2 + 1),
    ],
    ids=["center", "split", "importance", "both"],
)
def test_the_losses_of_the_trial_forms(loss: PairLoss, expected: float) -> None:
    found = loss(pair(0.9, (-2.0, -4.0), (-1.0, -8.0)), Knobs(math.inf, beta=0.5))
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_rewards_are_told_by_what_they_trained() -> None:
    row = policy_row("a", {"reward:m": 1, "reward:n": 2, "kl": 3, "length": 4}, {"m": False, "n": True})
    assert row == {"name": "a", "judge": 1, "reward": 2, "kl": 3, "tokens": 4}
