"""How much reward does each objective buy at which distance? One round of a real model, trained many times at once.

A model samples a pair to each query (under a principle, and two plain responses where a job wants those), a reward
model scores them, and every job of one_round.toml trains on the same rows. `ple eval` then samples unseen queries from
each policy: KL to the start, entropy, perplexity, the reward that trained and a judge that did not. Everything is a
`ple` command in one of several workers, and a finished one does nothing: run the same command again after any stop.
OUTPUT gets one_round.json, a row a policy.

    python -m benchmarks.one_round MODEL --queries queries.parquet --unseen unseen.parquet \\
        --reward-model 'reward[1]' --judge recipes/imdb/judge.py:score --output runs/one-round
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tomllib
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.side_by_side import made_with
from schemas.files import write_atomic

JOBS = Path(__file__).with_suffix(".toml")
START = "start"
TOKENS, AT_ONCE = 48, 512
"""Longest response; how many are sampled at once."""
ASKED = [
    *("--engine", "hf", "--engine-arg", f"batch_size={AT_ONCE}", "--unit-size", AT_ONCE),
    *("--prompt-format", "plain", "--max-new-tokens", TOKENS),
]
FIXED = ["--round", 0, "--microbatch-tokens", 16384, "--learning-rate", "3e-4"]
"""Of every training, unless its words say otherwise."""


@dataclass(frozen=True)
class Job:
    """A training: its curve, words of a command, the trial form that it is done with, the principle of its pairs."""

    name: str
    family: str
    words: str
    trial: str = ""
    principle: str = "imdb"

    def command(self, model: str, output: Path) -> list[object]:
        """The words after `ple`."""
        words = self.words.split()
        method = [words.pop(0), words.pop(0)] if words[0] == "baseline" else ["train"]
        where = ["--data", output / "data" / self.principle, "--output", self.adapter(output)]
        return [*method, "--model", model, *where, *FIXED, *words]

    def adapter(self, output: Path) -> Path:
        return output / "policies" / self.name


def read_jobs(path: Path, only: list[str] | None = None) -> list[Job]:
    """The jobs of a file (one_round.toml says how it is written), or those of them that are named."""
    found = [
        Job(name, family, **({"words": how} if isinstance(how, str) else how))
        for family, own in tomllib.loads(path.read_text()).items()
        for name, how in own.items()
    ]
    if unknown := set(only or ()) - {job.name for job in found}:
        raise SystemExit(f"no job {', '.join(sorted(unknown))} in {path}")
    return [job for job in found if not only or job.name in only]


def ple(log: Path, *words: object) -> bool:
    """One `ple` command in this process, its messages in `log`; whether it ended well."""
    import cli

    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as messages, contextlib.redirect_stderr(messages), contextlib.redirect_stdout(messages):
        print("$ ple", *words)
        code = cli.ple.main([str(word) for word in words], prog_name="ple", standalone_mode=False)
    if code:
        print(f"ple {words[0]} failed with exit code {code}; its messages are in {log}", file=sys.stderr, flush=True)
    return not code


def sample(options: argparse.Namespace, principle: str) -> bool:
    """The pairs under a principle, scored."""
    where = ["--queries", options.queries, "--data", options.output / "data" / principle, "--limit", options.pairs]
    how = ["--model", options.model, "--principles", principle, "--round", 0, "--reward-model", options.reward_model]
    return ple(options.output / "logs" / f"gen-{principle}.log", "gen", *how, *where, *ASKED)


def train(options: argparse.Namespace, job: Job) -> bool:
    from benchmarks.trials import in_place

    with in_place(job.trial, options.output / "data" / job.principle):
        words = job.command(options.model, options.output)
        return ple(options.output / "logs" / f"{job.name}.log", *words, "--epochs", options.epochs)


def evaluate(options: argparse.Namespace, number: int, jobs: list[Job]) -> bool:
    """`ple eval` of the start policy and those of the jobs."""
    adapters = [f"{job.name}={options.model},{job.adapter(options.output)}" for job in jobs]
    words = [word for policy in (f"{START}={options.model}", *adapters) for word in ("--policy", policy)]
    words += ["--reward-model", options.reward_model, "--trained-with", options.reward_model]
    words += ["--reward-model", options.judge, "--microbatch-tokens", "16384"]
    where = ["--queries", options.unseen, "--output", options.output / "eval" / str(number)]
    return ple(options.output / "logs" / f"eval-{number}.log", "eval", *words, *where, *ASKED)


def policy_row(name: str, metrics: Mapping[str, Any], trained: Mapping[str, bool]) -> dict[str, Any]:
    """What `ple eval` measured of a policy. trained: by reward model, whether its rewards trained policies."""
    names = {"length": "tokens", "truncated": "cut"}
    names |= {f"reward:{model}": "reward" if trains else "judge" for model, trains in trained.items()}
    return {"name": name} | {names.get(key, key): value for key, value in metrics.items()}


def steps(metrics: Path) -> list[dict[str, float]]:
    """The steps of a training on which entropy was measured, on the responses of their batches: entropy, and of each
    arm the mean log-probability and how far it has moved from the start policy's. All in nats a token.
    """
    rows = pl.read_parquet(metrics)
    if "entropy" not in rows.columns:
        return []
    share = {"rank": pl.col("rank_share"), "wsft": 1 - pl.col("rank_share")}
    arms = {
        f"{what}_{arm}": pl.sum_horizontal(pl.col(f"{what}_{of}_{arm}{age}") * share[of] for of in share)
        for arm in ("y", "y_prompt")
        for what, age in (("mean_logps", ""), ("drift", "_age0"))
    }
    return rows.filter(pl.col("entropy").is_not_null()).select("step", "entropy", **arms).to_dicts()


def results(options: argparse.Namespace, jobs: list[Job], reports: list[Path]) -> dict[str, Any]:
    """What one_round.json holds: the setting, and a row a policy, the start policy first."""
    found: dict[str, dict[str, Any]] = {}
    for report in [json.loads(path.read_text()) for path in reports]:
        trained = {use["name"]: use["trained"] for use in report["reward_models"]}
        found |= {own["label"]: policy_row(own["label"], own["metrics"], trained) for own in report["policies"]}
    rows = [
        asdict(job) | found[job.name] | {"steps": steps(job.adapter(options.output) / "metrics.parquet")}
        for job in jobs
    ]
    setting = {"model": options.model, "pairs": options.pairs, "epochs": options.epochs, "new_tokens": TOKENS}
    return {"made_with": made_with("torch", "transformers", "peft"), **setting, "policies": [found[START], *rows]}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--queries", required=True, help="to sample the round for")
    parser.add_argument("--unseen", required=True, help="to measure the policies on, with references")
    parser.add_argument("--reward-model", required=True, help="that trains, as of ple score")
    parser.add_argument("--judge", required=True, help="a reward model that trains nothing")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=6, help="commands at once")
    parser.add_argument("--jobs", type=Path, default=JOBS, help="what is trained, in the form of one_round.toml")
    parser.add_argument("--only", nargs="+", help="names of jobs")
    options = parser.parse_args(words)
    jobs = read_jobs(options.jobs, options.only)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        if not all(pool.map(partial(sample, options), dict.fromkeys(job.principle for job in jobs))):
            raise SystemExit(1)
        ended = pool.map(partial(train, options), jobs)
        trained = [job for job, well in zip(jobs, ended, strict=True) if well]
        shares = [trained[at :: options.workers] for at in range(min(options.workers, len(trained)))]
        if not all(pool.map(partial(evaluate, options), range(len(shares)), shares)):
            raise SystemExit(1)
    reports = [options.output / "eval" / str(at) / "eval.json" for at in range(len(shares))]
    write_atomic(options.output / "one_round.json", json.dumps(results(options, trained, reports), indent=1) + "\n")


if __name__ == "__main__":
    main()
