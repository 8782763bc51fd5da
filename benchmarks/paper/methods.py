"""The methods of the paper's tables as commands on one start policy: same queries, model, LoRA and sampled tokens.

Each run is a recipe of `ple run` (PLE, its ablations, context distillation, RAFT-4, DPO) or one `ple baseline` command
(SFT, PPO). Nothing is started here. Names are relative to the task's directory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.paper.tasks import Task
from schemas.files import write_atomic
from schemas.records import TRAINED

START = "start"
"""The start policy of every run."""
ROUNDS = 4
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
"""The tuning budget of every method: these, with the first seed, chosen by the reward on the validation queries."""
UPDATES = 160
"""Of PLE in all rounds, whatever the queries of a round."""
PASSES = sum(range(1, ROUNDS + 1))
"""PLE trains on all rows so far: as many passes over the pairs of one round. SFT and RAFT make as many updates."""


@dataclass(frozen=True, eq=False)
class Method:
    """One row of a table.

    `guided`: y_prompt is sampled under the principle, else it is a second plain response. `responses` to a query are
    learned from or chosen among: where they are more than PLE's two there are fewer queries, and the other way round.
    """

    name: str
    title: str
    guided: bool = True
    responses: int = 2
    train: dict[str, Any] = field(default_factory=dict)
    baseline: str | None = None


STABILISED = {"normalize_wsft": True, "trust_region": 0.3}
"""What keeps PLE's loss in bounds and its two terms of one size; not in the paper, options of `ple-train`."""
METHODS = (
    Method("sft", "SFT", baseline="sft"),
    Method("context-distillation", "context distillation", responses=1, baseline="context-distillation"),
    Method("dpo", "DPO", baseline="dpo"),
    Method("ppo", "PPO", baseline="ppo"),
    Method("raft", "RAFT-4", guided=False, responses=4, baseline="raft", train={"epochs": 2 * PASSES // ROUNDS}),
    Method("ple", "PLE (printed loss)"),
    Method("without-rank", "w/o rank and principle", guided=False, train={"without": "rank"}),
    Method("without-wsft", "w/o weighted SFT", train={"without": "wsft"}),
    Method("stable-ple", "PLE, stabilised", train=STABILISED),
    Method(
        "stable-without-rank", "stabilised w/o rank and principle", guided=False, train=STABILISED | {"without": "rank"}
    ),
    Method("stable-without-wsft", "stabilised w/o weighted SFT", train=STABILISED | {"without": "wsft"}),
)


PLE = next(method for method in METHODS if method.name == "ple")


PPO_BATCH = 16
"""Responses of a PPO update; their advantages are whitened together."""


def batch_size(task: Task) -> int:
    """Pairs of an update; sequences where a method has no pairs."""
    return task.queries_per_round * PASSES // UPDATES


@dataclass(frozen=True)
class Run:
    """One training: a method with a learning rate and a seed, in a directory of its own."""

    method: Method
    learning_rate: float
    seed: int

    @property
    def label(self) -> str:
        return f"{self.method.name}-{self.learning_rate:g}"

    @property
    def directory(self) -> Path:
        return Path("runs", self.method.name, f"lr={self.learning_rate:g}", f"seed={self.seed}")

    @property
    def adapter(self) -> Path:
        """The policy that the tables measure."""
        if self.method.name in ("sft", "ppo"):
            return self.directory / "policy"
        return self.directory / "policy" / f"round={ROUNDS - 1:03d}"

    def cost(self, what: str) -> int:
        """`tokens_sampled` or `tokens_trained` in all, as the finished trainings say it; 0 where there are none."""
        found = self.adapter.parent.glob("round=*") if self.adapter.name.startswith("round=") else [self.adapter]
        records = [output / TRAINED for output in found]
        return sum(json.loads(path.read_text())["cost"][what] for path in records if path.exists())

    def seconds(self) -> float:
        """Wall time of its commands."""
        if self.adapter.name == "policy":
            return float(json.loads((self.adapter / TRAINED).read_text())["cost"]["seconds"])
        stages = json.loads((self.directory / "stages.json").read_text())["stages"]
        return float(sum(stage["seconds"] for stage in stages))

    def command(self, task: Task) -> list[str]:
        """The `ple` words that do it; the same words again do nothing twice."""
        common = ["--model", START, "--output", str(self.adapter), "--seed", str(self.seed)]
        common += ["--learning-rate", str(self.learning_rate)]
        common += ["--batch-size", str(PPO_BATCH if self.method.name == "ppo" else batch_size(task))]
        if self.method.name == "sft":
            data = f"references/seed={self.seed}.jsonl"
            return ["baseline", "sft", *common, "--data", data, "--epochs", str(2 * PASSES // ROUNDS)]
        if self.method.name == "ppo":
            tokens = max(Run(PLE, rate, self.seed).cost("tokens_sampled") for rate in LEARNING_RATES)
            words = ["--queries", "queries.parquet", "--reward-model", task.reward, "--sampled-tokens", str(tokens)]
            return ["baseline", "ppo", *common, *words, "--max-new-tokens", str(task.max_new_tokens)]
        return ["run", str(self.write_recipe(task))]

    def write_recipe(self, task: Task) -> Path:
        """The recipe of a method that alternates."""
        queries = 2 * task.queries_per_round // self.method.responses
        recipe: dict[str, Any] = {
            "model": START,
            "queries": "queries.parquet",
            "principles": task.principle if self.method.guided else "none",
            "reward_model": task.reward,
            "run_dir": str(self.directory),
            "rounds": ROUNDS,
            "queries_per_round": queries,
            "seed": self.seed,
            "gen": {
                "engine": "hf",
                "engine_arg": {"batch_size": task.queries_per_round},
                "unit_size": queries,
                "max_new_tokens": task.max_new_tokens,
                "samples": max(1, self.method.responses // 2),
            },
        }
        stage = {"learning_rate": self.learning_rate, "batch_size": batch_size(task)}
        if self.method.baseline:
            recipe["baseline"] = {"method": self.method.baseline, **stage, **self.method.train}
        else:
            recipe["train"] = stage | self.method.train
        path = Path(f"{self.directory}.yaml")
        write_atomic(path, json.dumps(recipe, indent=1) + "\n")  # JSON is YAML
        return path
