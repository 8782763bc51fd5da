"""The methods of the paper's tables as commands on one start policy: same queries, model, LoRA and sampled tokens.

Each run is a recipe of `ple run` (PLE, its ablations, context distillation, RAFT-4, DPO) or one `ple baseline` command
(SFT, PPO). Nothing is started here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.paper.tasks import Task

ROUNDS, QUERIES_PER_ROUND = 4, 256
"""PLE samples two responses to each: 2,048 in all. Every method that samples gets as many."""
LEARNING_RATES = (3e-4, 1e-3)
"""The tuning budget of every method: these, with the first seed, chosen by the reward on the validation queries."""
TRAINED_RESPONSES = 2 * QUERIES_PER_ROUND * sum(range(1, ROUNDS + 1))
"""What PLE trains on, round by round on all rows so far; SFT gets as many by its epochs."""


@dataclass(frozen=True)
class Method:
    """One row of a table. `guided`: y_prompt is sampled under the principle, else it is a second plain response."""

    name: str
    title: str
    guided: bool = True
    samples: int = 1
    train: dict[str, Any] = field(default_factory=dict)
    baseline: str | None = None


METHODS = (
    Method("sft", "SFT", baseline="sft"),
    Method("context-distillation", "context distillation", baseline="context-distillation"),
    Method("dpo", "DPO", baseline="dpo"),
    Method("ppo", "PPO", baseline="ppo"),
    Method("raft", "RAFT-4", guided=False, samples=2, baseline="raft"),
    Method("ple", "PLE (printed loss)"),
    Method("ple-trust-region", "PLE, trust region 0.3", train={"trust_region": 0.3}),
    Method("without-rank", "w/o rank and principle", guided=False, train={"without": "rank"}),
    Method("without-wsft", "w/o weighted SFT", train={"without": "wsft"}),
)


@dataclass(frozen=True)
class Run:
    """One training: a method with a learning rate and a seed, in a directory of its own."""

    method: Method
    learning_rate: float
    seed: int
    root: Path

    @property
    def directory(self) -> Path:
        return self.root / "runs" / self.method.name / f"lr={self.learning_rate:g}" / f"seed={self.seed}"

    @property
    def adapter(self) -> Path:
        """The policy that the tables measure."""
        if self.method.name in ("sft", "ppo"):
            return self.directory / "policy"
        return self.directory / "policy" / f"round={ROUNDS - 1:03d}"

    @property
    def start(self) -> Path:
        """The start policy of every run."""
        return self.root / "start"

    def command(self, task: Task) -> list[str]:
        """The `ple` words that do it; the same words again do nothing twice."""
        common = ["--model", str(self.start), "--output", str(self.adapter), "--seed", str(self.seed)]
        common += ["--learning-rate", str(self.learning_rate)]
        if self.method.name == "sft":
            rows = ROUNDS * QUERIES_PER_ROUND
            epochs = TRAINED_RESPONSES // rows
            data = self.root / "references" / f"seed={self.seed}.parquet"
            return ["baseline", "sft", *common, "--data", str(data), "--epochs", str(epochs)]
        if self.method.name == "ppo":
            tokens = 2 * QUERIES_PER_ROUND * ROUNDS * task.max_new_tokens
            words = ["baseline", "ppo", *common, "--queries", str(self.root / "queries.parquet"), "--reward-model"]
            words += [str(self.root / "reward"), "--sampled-tokens", str(tokens)]
            words += ["--max-new-tokens", str(task.max_new_tokens)]
            return words + ([] if task.reward_index is None else ["--output-index", str(task.reward_index)])
        return ["run", str(self.write_recipe(task))]

    def write_recipe(self, task: Task) -> Path:
        """The recipe of a method that alternates; RAFT-4 samples four responses to half as many queries."""
        from schemas.files import write_atomic

        stage = {"learning_rate": self.learning_rate, "batch_size": 16}
        recipe: dict[str, Any] = {
            "model": str(self.start),
            "queries": str(self.root / "queries.parquet"),
            "principles": task.principle if self.method.guided else "none",
            "reward_model": str(self.root / "reward"),
            "run_dir": str(self.directory),
            "rounds": ROUNDS,
            "queries_per_round": QUERIES_PER_ROUND // self.method.samples,
            "seed": self.seed,
            "gen": {"engine": "hf", "max_new_tokens": task.max_new_tokens, "samples": self.method.samples},
            "score": {} if task.reward_index is None else {"output_index": task.reward_index},
        }
        if self.method.baseline:
            recipe["baseline"] = {"method": self.method.baseline, **stage}
        else:
            recipe["train"] = stage | self.method.train
        path = self.directory.with_suffix(".yaml") if self.directory.suffix else Path(f"{self.directory}.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(recipe, indent=1))  # JSON is YAML
        return path
