"""The methods of the paper's tables as commands on one start policy: same queries, model, LoRA and sampled tokens.

Each run is a recipe of `ple run`, or a `ple baseline` command (SFT, PPO). What bounds a method's distance from the
start policy, its brake, is moved in the frontier and stands still in the tables of one point. Nothing is started here.
Names are relative to the task's directory.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.paper.tasks import Task
from ple_train.run.rounds import plan
from schemas.files import write_atomic
from schemas.recipe import load_recipe
from schemas.records import TRAINED

START = "start"
"""The start policy of every run."""
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
"""The tuning budget of every method: these, with the first seed, chosen by the reward on the validation queries."""
TAU0, ALPHA = 0.2, 0.9
RATE = "learning_rate"
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
WARM = ["-S", "-m", "benchmarks.paper.warm"]
"""Words after python that are `ple`, at once where a server runs."""


@dataclass(frozen=True, eq=False)
class Method:
    """One row of a table, one curve of the frontier.

    `guided`: y_prompt is sampled under the principle, else it is a second plain response. `responses` to a query are
    learned from or chosen among: where they are more than PLE's two there are fewer queries, and the other way round.
    `brake`: the option that bounds the distance; `brakes`: its values, tightest first; `usual`: its value in the tables
    of one point, None for the learning rate. `ablates`: the method that this one is without something; it has that
    one's learning rate. `newest`: each round trains on its own rows alone, as round 0 of a store of its own;
    `restart`: from the start policy, on all rows so far. `again`: with it, a round trains on its own rows alone, in
    as many passes as PLE makes over a round's pairs in all by the number of rounds, times this.
    """

    name: str
    title: str
    brake: str = RATE
    brakes: tuple[float, ...] = RATES
    usual: float | None = None
    train: dict[str, Any] = field(default_factory=dict)
    baseline: str | None = None
    guided: bool = True
    responses: int = 2
    alpha: float = ALPHA
    newest: bool = False
    again: int = 0
    restart: bool = False
    ablates: str | None = None

    @property
    def tuned(self) -> bool:
        """Whether it has a learning rate to choose beside its brake."""
        return self.brake != RATE and self.ablates is None


PRINTED = {"brakes": (1e-4, 2e-4, 3e-4, 1e-3)}
STABLE = {"brake": "trust_region", "brakes": (0.15, 0.3, 0.6, 1.0), "usual": 0.3}
BY_LENGTH = {"normalize_wsft": True}
"""With a trust region, what keeps PLE's loss in bounds and its two terms of one size; not in the paper."""
RESIDUAL = {"objective": "ple-residual", "form": "means"}
BY_RESPONSE = {"objective": "ple-residual", "form": "sums", "without": "rank"}
"""The residual form that real models took best (docs/results/real-one-round.md)."""
WITHOUT_RANK, WITHOUT_WSFT = {"without": "rank"}, {"without": "wsft"}
MAIN = (
    Method("sft", "SFT", baseline="sft", again=2),
    Method("context-distillation", "context distillation", responses=1, baseline="context-distillation"),
    Method(
        "on-policy-distillation",
        "context distillation, on-policy",
        responses=1,
        baseline="context-distillation",
        train={"on_policy": True},
        again=1,
    ),
    Method("dpo", "DPO", "beta", (0.3, 0.1, 0.03, 0.01), 0.1, train={"objective": "dpo"}),
    Method("dpo-means", "DPO by length", "beta", (10, 5, 3, 1.5), train={"objective": "dpo", "form": "means"}),
    Method("ppo", "PPO", "kl_coef", (0.2, 0.05, 0.01, 0.003), 0.05, baseline="ppo"),
    Method("raft", "RAFT-4", guided=False, responses=4, baseline="raft", again=2),
    Method("ple", "PLE (printed loss)", **PRINTED),
    Method("stable-ple", "PLE, stabilised", train=BY_LENGTH, **STABLE),
    Method("ple-residual", "PLE, residual", "beta", (6, 3, 1.5, 1), train=RESIDUAL),
    Method(
        "ple-residual-sums", "PLE, residual, sums w/o rank set", "beta", (0.1, 0.05, 0.03, 0.015), train=BY_RESPONSE
    ),
)
TABLES = (
    Method("without-rank", "w/o rank and principle", guided=False, train=WITHOUT_RANK, ablates="ple", brakes=(3e-4,)),
    Method("without-wsft", "w/o weighted SFT", train=WITHOUT_WSFT, ablates="ple", brakes=(3e-4,)),
    Method(
        "stable-without-rank",
        "stabilised w/o rank and principle",
        guided=False,
        train=BY_LENGTH | WITHOUT_RANK,
        ablates="stable-ple",
        **STABLE | {"brakes": (0.3, 0.6)},
    ),
    Method(
        "stable-without-wsft",
        "stabilised w/o weighted SFT",
        train=BY_LENGTH | WITHOUT_WSFT,
        ablates="stable-ple",
        **STABLE | {"brakes": (0.3, 0.6)},
    ),
)
"""The paper's ablations."""


def _parts(of: str, title: str, brake: str, at: float, train: dict[str, Any]) -> tuple[Method, ...]:
    """A method without each of its parts in turn, with one value of its brake."""
    one: dict[str, Any] = {"brake": brake, "brakes": (at,), "ablates": of}
    return (
        Method(f"{of}-no-rank", f"{title} w/o rank set", train=train | WITHOUT_RANK, **one),
        Method(f"{of}-no-principle", f"{title} w/o principle", train=train, guided=False, **one),
        Method(f"{of}-no-decay", f"{title}, alpha 0.999", train=train, alpha=0.999, **one),
        Method(f"{of}-newest", f"{title} w/o old rows", train=train, newest=True, again=1, **one),
        Method(f"{of}-restart", f"{title}, rounds from the start", train=train, restart=True, **one),
    )


OF_SUMS: dict[str, Any] = {"brake": "beta", "brakes": (0.05,), "ablates": "ple-residual-sums"}
"""What is tried on the recommended form, at its usual brake."""
PARTS = (
    *_parts("ple-residual", "residual", "beta", 1.5, RESIDUAL),
    Method(
        "ple-residual-no-wsft",
        "residual w/o weighted SFT",
        "beta",
        (1.5,),
        train=RESIDUAL | WITHOUT_WSFT,
        ablates="ple-residual",
    ),
    Method(
        "ple-residual-by-response",
        "residual, sums for means",
        "beta",
        (0.03,),
        train=RESIDUAL | {"form": "sums"},
        ablates="ple-residual",
    ),
    *_parts("stable-ple", "stabilised", "trust_region", 0.6, BY_LENGTH),
    Method("stable-ple-sums", "stabilised, sums in weighted SFT", "trust_region", (0.6,), ablates="stable-ple"),
    Method("ple-residual-sums-no-principle", "sums w/o principle", guided=False, train=BY_RESPONSE, **OF_SUMS),
    Method("ple-residual-sums-rank", "sums with the rank set", train=RESIDUAL | {"form": "sums"}, **OF_SUMS),
    Method("ple-residual-sums-restart", "sums, rounds from the start", train=BY_RESPONSE, restart=True, **OF_SUMS),
)
FRONTIER = (*MAIN, *TABLES, *PARTS)


def frontier(task: Task) -> tuple[Method, ...]:
    """The methods of a task's frontier, with the values that their brakes have there; the same ones at each call."""
    return _braked(tuple(task.brakes.items())) if task.brakes else FRONTIER


@cache
def _braked(brakes: tuple[tuple[str, tuple[float, ...]], ...]) -> tuple[Method, ...]:
    own = {method.name: method for method in MAIN}
    return tuple(replace(own[name], brakes=values) for name, values in brakes)


NEW = ("on-policy-distillation", "dpo-means", "ple-residual", "ple-residual-sums")
"""In the frontier alone."""
METHODS = tuple(m for m in (*MAIN, *TABLES) if m.name not in NEW)
"""Those of the tables of one point."""
PPO_BATCH = 16
"""Responses of a PPO update; their advantages are whitened together."""


def passes(task: Task) -> int:
    """PLE trains on all rows so far: as many passes over the pairs of one round."""
    return sum(range(1, task.rounds + 1))


def batch_size(task: Task) -> int:
    """Pairs of an update; sequences where a method has no pairs."""
    return task.queries_per_round * passes(task) // task.updates


def sampling(task: Task, queries: int) -> dict[str, Any]:
    """Options of `ple gen` for a round of so many queries."""
    return {
        "engine": "hf",
        "engine_arg": {"batch_size": task.queries_per_round},
        "unit_size": queries,
        "max_new_tokens": task.max_new_tokens,
        "dtype": task.dtype,
        **task.asked,
    }


@dataclass(frozen=True)
class Run:
    """One training: a method with a learning rate, a seed and, where its brake is another option, its value; in a
    directory of its own.
    """

    method: Method
    learning_rate: float
    seed: int
    brake: float | None = None

    @property
    def braked(self) -> float:
        """The brake's value, whichever option it is."""
        return self.learning_rate if self.brake is None else self.brake

    @property
    def label(self) -> str:
        brake = "" if self.brake is None else f"{self.brake:g}-"
        return f"{self.method.name}-{brake}{self.learning_rate:g}"

    @property
    def directory(self) -> Path:
        brake = [] if self.brake is None else [f"{self.method.brake}={self.brake:g}"]
        return Path("runs", self.method.name, *brake, f"lr={self.learning_rate:g}", f"seed={self.seed}")

    def epochs(self, task: Task) -> int:
        """Of a method that trains on the newest rows alone, in a round."""
        return -(-self.method.again * passes(task) // task.rounds)

    def adapter(self, task: Task) -> Path:
        """The policy that the tables measure."""
        if self.method.name in ("sft", "ppo"):
            return self.directory / "policy"
        return self.directory / "policy" / f"round={task.rounds - 1:03d}"

    @property
    def common(self) -> Path:
        """The store of responses of the start policy that every run with this seed and principle begins with."""
        return Path("round0", "guided" if self.method.guided else "plain", f"seed={self.seed}")

    def costs(self) -> dict[str, int]:
        """What the finished trainings say that they took, in all: tokens sampled and trained on, updates."""
        told = [json.loads(path.read_text()) for path in self._records() if path.exists()]
        return {
            "tokens_sampled": sum(record["cost"]["tokens_sampled"] for record in told),
            "tokens_trained": sum(record["cost"]["tokens_trained"] for record in told),
            "updates": sum(record["steps"] * record["settings"].get("ppo_epochs", 1) for record in told),
        }

    def _records(self) -> list[Path]:
        policy = self.directory / "policy"
        return [policy / TRAINED, *policy.glob(f"round=*/{TRAINED}")]

    def seconds(self) -> float:
        """Wall time of its commands."""
        stages_file = self.directory / "stages.json"
        if not stages_file.exists():
            return float(json.loads((self.directory / "policy" / TRAINED).read_text())["cost"]["seconds"])
        stages = json.loads(stages_file.read_text())["stages"]
        return float(sum(stage["seconds"] for stage in stages))

    def commands(self, task: Task) -> list[list[str]]:
        """The `ple` words that do it, one command after another; the same words again do nothing twice."""
        given = ["--model", START, "--output", str(self.adapter(task)), "--seed", str(self.seed)]
        given += ["--learning-rate", str(self.learning_rate), "--precision", task.precision]
        given += ["--batch-size", str(PPO_BATCH if self.method.name == "ppo" else batch_size(task))]
        if self.method.name == "sft":
            data = f"references/seed={self.seed}.jsonl"
            words = ["--data", data, "--epochs", str(self.epochs(task)), *task.asked_words("prompt_format")]
            return [["baseline", "sft", *given, *words]]
        if self.method.name == "ppo":
            tokens = 2 * task.queries_per_round * task.rounds * task.max_new_tokens  # what PLE samples at most
            words = ["--queries", "queries.parquet", "--reward-model", task.reward, "--sampled-tokens", str(tokens)]
            words += ["--kl-coef", f"{self.brake}", "--max-new-tokens", str(task.max_new_tokens)]
            return [["baseline", "ppo", *given, *words]]
        recipe = self.write_recipe(task)
        if not self.method.newest:
            return [["run", str(recipe)]]
        commands = []
        for stage in plan(load_recipe(recipe)):
            t = stage.round or 0
            own = {"--data": str(self.directory / "data" / f"round={t}"), "--round": "0"}
            own |= {"--tau0": str(TAU0 * self.method.alpha**t)}
            words = stage.command[len(WARM) :]
            commands.append([own.get(option, word) for option, word in pairwise(words)])
        return commands

    def write_recipe(self, task: Task) -> Path:
        """The recipe of a method that alternates."""
        queries = 2 * task.queries_per_round // self.method.responses
        stage = {RATE: self.learning_rate, "batch_size": batch_size(task), "precision": task.precision}
        stage |= self.method.train
        if self.method.again:
            stage["epochs"] = self.epochs(task)
        if self.brake is not None:
            stage[self.method.brake] = self.brake
        ple = [sys.executable, *WARM]
        recipe: dict[str, Any] = {
            "model": START,
            "queries": "queries.parquet",
            "principles": task.principle if self.method.guided else "none",
            "reward_model": task.reward,
            "run_dir": str(self.directory),
            "rounds": task.rounds,
            "queries_per_round": queries,
            "seed": self.seed,
            "alpha": self.method.alpha,
            "reuse": [str(self.common)],
            "restart": self.method.restart,
            "gen": {"command": [*ple, "gen"], "samples": max(1, self.method.responses // 2), **sampling(task, queries)},
            "score": {"command": [*ple, "score"]},
        }
        if self.method.baseline:
            recipe["baseline"] = {"command": [*ple, "baseline"], "method": self.method.baseline, **stage}
        else:
            recipe["train"] = {"command": [*ple, "train"], **stage}
        path = Path(f"{self.directory}.yaml")
        write_atomic(path, json.dumps(recipe, indent=1) + "\n")  # JSON is YAML
        return path
