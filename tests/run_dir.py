"""A run directory as `ple run`, `ple purity`, `ple eval`, `ple judge` and `ple cases` leave it, made by hand."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from ple_data.storage.store import Store
from schemas.reports import (
    Comparison,
    Estimate,
    EvalReport,
    JudgePart,
    JudgeReport,
    PolicyResult,
    PureSet,
    PurityBin,
    PurityBound,
    PurityCounts,
    PurityPolicy,
    PurityReport,
    RewardModelUse,
)
from schemas.tables import CASES, metadata_bytes
from tests.tables import table

TAU0, ALPHA = 0.4, 0.5


def add_pairs(root: Path, rounds: list[list[dict[str, Any]]]) -> None:
    """Commit the rows of each round to the store at `root`."""
    for t, rows in enumerate(rounds):
        Store(root).commit("pairs", t, f"00000-{t:012x}", table("pairs", rows, round=t), {})


def plain_rows(count: int, t: int = 0) -> list[dict[str, Any]]:
    """Rows with margins -1, ... in steps, and texts that name them."""
    return [
        {
            "query_id": f"q{t}-{index}",
            "x": f"question {index} of round {t}",
            "y": f"plain answer {index}",
            "y_prompt": f"guided answer {index}",
            "y_ids": [7] * (1 + index % 5),
            "y_prompt_ids": [7] * (2 + index % 7),
            "s": 0.0,
            "s_prompt": -1.0 + 2.0 * index / max(1, count - 1),
        }
        for index in range(count)
    ]


def make_run(root: Path, rounds: list[list[dict[str, Any]]], label: str = "policy", **keys: Any) -> Path:
    """RUN with recipe, data, stages, metrics and purity; `label` names models and policies, `keys` go to the recipe."""
    (root / "data").mkdir(parents=True)
    add_pairs(root / "data", rounds)
    recipe = {"model": label, "queries": "q.jsonl", "principles": "hh", "reward_model": "r", "run_dir": str(root)}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"tau0": TAU0, "alpha": ALPHA} | keys))
    stages = [{"stage": "sft", "round": None, "command": [], "start": "", "end": None, "seconds": 61.5, "exit_code": 0}]
    for t in range(len(rounds)):
        for stage, code in (("gen", 1), ("gen", 0), ("score", 0), ("train", None)):
            stages.append({**stages[0], "stage": stage, "round": t, "seconds": 30.0, "exit_code": code})
    (root / "stages.json").write_text(json.dumps({"stages": stages}))
    (root / "metrics").mkdir()
    for t in range(len(rounds)):
        steps = [
            {"step": n + 1, "loss": -float(n), "loss_rank": 0.5, "loss_wsft": -n - 0.5,
             "drift_pushed_down": None if n % 2 else -0.1 * n, "mean_logps_rank_y": None}
            for n in range(10)
        ]  # fmt: skip
        pl.DataFrame(steps, infer_schema_length=None).write_parquet(root / "metrics" / f"round={t:03d}.parquet")
    (root / "purity").mkdir()
    (root / "purity" / "purity.json").write_text(purity_report(label).to_json())
    return root


def purity_report(label: str) -> PurityReport:
    policies = []
    for place, agree in enumerate((3, 4)):
        pure = [
            PureSet(percent=p, e=None if p == 100 else 0.5 - 0.1 * place, pairs=0 if p == 100 else 4)
            for p in (100, 95, 90)
        ]
        counts = PurityCounts(round=None, pairs=10, ranked=9, agree=agree, positive=5, pure_sets=pure)
        bins = [PurityBin(low=-1, high=0, pairs=4, agree=1), PurityBin(low=0, high=1, pairs=5, agree=agree - 1)]
        policies.append(
            PurityPolicy(
                label=label if place else "start", policy=label, after_round=place - 1 if place else None, left_out=0,
                all_pairs=counts, by_round=[], bins=bins
            )
        )  # fmt: skip
    bound = PurityBound(says=f"nothing of {label}")
    return PurityReport(data=["d"], rounds=[0], normalized=False, precision="bf16", policies=policies, bound=bound)


def judge_report(label: str) -> JudgeReport:
    part = JudgePart(by="kind", name="harmful", wins=3, ties=1, losses=0, unparsed=0, win_rate=None)
    return JudgeReport(
        a=label, b="base", judge=label, wins=7, ties=2, losses=1, unparsed=1, orders_disagree=1,
        win_rate=Estimate(mean=1.25, low=1.0, high=1.5, count=40), prompt_tokens=90, completion_tokens=9, annotators=3,
        kappa=0.5, parts=[part]
    )  # fmt: skip


def make_results(folder: Path, label: str = "policy") -> dict[str, tuple[Path, ...] | Path]:
    """Folders of ple eval, ple judge and ple cases, as the options of `report`."""
    value = Estimate(mean=1.25, low=1.0, high=1.5, count=40)
    evaluation = EvalReport(
        queries=f"{label}.jsonl",
        seed=0,
        reward_models=[RewardModelUse(name=label, trained=True), RewardModelUse(name="second", trained=False)],
        bleu_signature="nrefs:1",
        policies=[
            PolicyResult(label="base", policy="b@0", metrics={"perplexity": value, f"reward:{label}": value}),
            PolicyResult(label=label, policy="p@1", metrics={"perplexity": value}),
        ],
        comparisons=[Comparison(label=label, baseline="base", metric=f"reward:{label}", difference=value)],
    )
    rows = [
        {"label": name, "policy": name, "query_id": "1", "sample": 0, "x": f"case {label}", "y": f"{name} says no",
         "tokens": 3, "finish": "stop", "rewards": [0.5, -1.25], "kind": label}
        for name in ("base", label)
    ]  # fmt: skip
    for name, text in (("eval", evaluation), ("judge", judge_report(label))):
        (folder / name).mkdir(parents=True)
        (folder / name / f"{name}.json").write_text(text.to_json())
    (folder / "cases").mkdir()
    cases = pa.Table.from_pylist(rows, schema=CASES).replace_schema_metadata(
        metadata_bytes("cases", {"reward_models": ["second", "third"], "trained_with": ["third"]})
    )
    pq.write_table(cases, folder / "cases" / "cases.parquet")
    return {"evals": (folder / "eval",), "judges": (folder / "judge",), "cases": folder / "cases"}
