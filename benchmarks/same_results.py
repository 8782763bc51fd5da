"""Does another version of the code give the same rows, weights and metrics, bit by bit, and in the same time?

    git worktree add /tmp/before v0.1.0
    python -m benchmarks.same_results /tmp/before --repeats 3

A fixed small run (every command that samples, scores or trains) is made by both versions
in turns, each command a process of its own, on the same small models. Exit code 1 where anything differs.
"""

import argparse
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import polars as pl

from benchmarks.side_by_side import made_with
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
CLOCKS = ("seconds", "tokens_per_second")
"""Columns of metrics that no two runs share."""
RECIPE = """\
model: policy
queries: queries.jsonl
principles: imdb
reward_model: judge
run_dir: run
rounds: 2
queries_per_round: 24
gen: {engine: hf, max_new_tokens: 8, unit_size: 8}
train: {batch_size: 4, learning_rate: 1e-3, trust_region: 0.3}
"""
TRAINED = "--model policy --data data --round 0 --learning-rate 1e-3 --batch-size 8"
COMMANDS = {
    "gen": "gen --model policy --queries queries.jsonl --principles imdb --data data --round 0 --engine hf "
    "--max-new-tokens 24",
    "score": "score --data data --reward-model judge",
    "train": f"train {TRAINED} --epochs 4 --output trained",
    "train, safeguards": f"train {TRAINED} --trust-region 0.3 --normalize-wsft --sft-anchor 0.1 --output safe",
    "train, all weights": f"train {TRAINED} --full --max-length 40 --output whole",
    "sft": "sft --model policy --data rows.jsonl --warmup-steps 3 --schedule cosine --output tuned",
    "reward": "reward --model policy --data labels.jsonl --epochs 2 --output labels",
    "raft": f"baseline raft {TRAINED} --output best",
    "eval": "eval --policy start=policy --policy ple=policy,trained --queries queries.jsonl --limit 16 --engine hf "
    "--max-new-tokens 8 --reward-model judge --output eval",
    "run": "run recipe.yaml",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, metavar="TREE", help="a checkout of the other version")
    parser.add_argument("--repeats", type=int, default=1, help="turns; %(default)s")
    options = parser.parse_args()
    trees = {"before": options.other.resolve(), "now": ROOT}
    seconds: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in trees}
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.repeats):
            for name in list(trees)[:: 1 if turn % 2 == 0 else -1]:
                world = make_world(Path(folder) / f"{turn}-{name}")
                for command, words in COMMANDS.items():
                    seconds[name][command].append(run(trees[name], world, words))
                found[name] = digests(world)
    differ = sorted(
        file for file in found["before"] | found["now"] if found["before"].get(file) != found["now"].get(file)
    )
    print(made_with("torch", "transformers", "peft"))
    print(f"{len(found['now'])} files and tables compared, {len(differ)} differ", *differ, sep="\n  ")
    for command in COMMANDS:
        before, now = seconds["before"][command], seconds["now"][command]
        print(f"{command:20} {statistics.median(now):6.1f} s, {ratio(now, before)} x the time before")
    return 1 if differ else 0


def make_world(folder: Path) -> Path:
    """Models and files; the same bytes each time."""
    folder.mkdir(parents=True)
    tiny.tiny_policy(folder / "policy")
    tiny.tiny_reward(folder / "judge")
    halves = [text.rsplit(" ", 1) for text in tiny.corpus()[:96]]
    rows = {
        "queries": [{"id": f"q{n}", "x": x, "reference": y} for n, (x, y) in enumerate(halves)],
        "rows": [{"x": x, "y": f" {y}"} for x, y in halves],
        "labels": [{"text": f"{x} {y}", "label": n % 2} for n, (x, y) in enumerate(halves)],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def run(tree: Path, world: Path, words: str) -> float:
    """Seconds of one command."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from cli import ple; ple(prog_name='ple')", *words.split()]
    began = time.perf_counter()
    ended = subprocess.run(command, cwd=world, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{tree}: ple {words}\n{ended.stderr}")
    return time.perf_counter() - began


def digests(world: Path) -> dict[str, str]:
    """Of all weights by their bytes; of tables and metrics by their values, without clocks and names of policies; of
    the intervals of an evaluation twelve digits.

    The digest of an adapter is over its record too, which holds the seconds that its training took: it is another one
    each time, and with it the name of the policy and of the units that it sampled.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(world.rglob("*")):
        name = re.sub(r"[0-9a-f]{12,}", "*", str(path.relative_to(world)))
        if path.suffix == ".safetensors":
            found[name].append(hashlib.sha256(path.read_bytes()).hexdigest())
        elif path.suffix == ".parquet":
            frame = pl.read_parquet(path, hive_partitioning=False)
            kept = frame.drop([column for column in (*CLOCKS, "policy") if column in frame.columns])
            found[name].append(hashlib.sha256(kept.write_json().encode()).hexdigest())
        elif path.name == "eval.json":
            report = json.loads(path.read_text(), parse_float=lambda text: f"{float(text):.12g}")
            kept = [[policy["metrics"] for policy in report["policies"]], report["comparisons"]]
            found[name].append(hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest())
    return {name: " ".join(sorted(each)) for name, each in found.items()}


def ratio(now: list[float], before: list[float]) -> str:
    """The median of the turns' ratios with its interval, where there are turns enough."""
    each = [new / old for new, old in zip(now, before, strict=True)]
    return f"{statistics.median(each):.2f} [{min(each):.2f}, {max(each):.2f}]"


if __name__ == "__main__":
    raise SystemExit(main())
