"""Measures the IMDb run: the check before the rounds, and the table after them.

    python recipes/imdb/measure.py check   runs/imdb     reward model on unseen reviews, margin of round 0
    python recipes/imdb/measure.py table   runs/imdb     rewards by round, reward on 512 unseen prefixes, perplexity

Prints Markdown; `table` also draws runs/imdb/RUN/learning-curve.png. Responses are sampled once and kept in
runs/imdb/measured/*.json, so that a rerun measures only what is new.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import polars as pl

from ple_data.common.digests import policy_name, text_digest
from ple_data.evaluation.intervals import bootstrap_mean
from ple_data.partition import round_statistics
from ple_data.rewards import load_reward_model
from ple_data.store import Store
from ple_train.measure.perplexity import perplexity
from ple_train.measure.sample import sample_responses
from schemas.files import write_atomic
from schemas.options import Rewards
from schemas.recipe import load_recipe

sys.path.insert(0, str(Path(__file__).parent))
import judge


def check(root: Path, run: Path) -> None:
    """Accuracy of both judges on unseen whole reviews; mean margin of round 0 with its interval."""
    reviews = pl.read_parquet(root / "reward-test.parquet")
    texts, labels = reviews["text"].to_list(), reviews["label"].to_numpy()
    pairs = [("", text) for text in texts]
    negative, positive = (load_reward_model(str(root / "reward"), Rewards(output_index=i)).score(pairs) for i in (0, 1))
    margins = np.array(positive) - np.array(negative)
    print(f"reward model: {accuracy(margins, labels)} of {len(labels)} unseen whole reviews right")
    second = np.array(judge.score([""] * len(texts), texts))
    print(f"second judge: {accuracy(second, labels)} right")
    rows = Store(run / "data").scan("pairs", round=0).select(pl.col("s_prompt") - pl.col("s")).collect()
    print(f"mean s_prompt - s at round 0: {bootstrap_mean(rows.to_series().to_list())}, {rows.height} pairs")


def accuracy(scores: np.ndarray, labels: np.ndarray) -> str:
    return f"{100 * float(((scores > 0) == labels).mean()):.1f} %"


def table(root: Path, run: Path) -> None:
    """One line a round: its pairs, and the policy that they trained, measured on unseen prefixes."""
    recipe = load_recipe(run / "recipe.yaml")
    rounds = round_statistics(Store(run / "data").scan("pairs"), recipe.tau0, recipe.alpha)
    start = str(run / "sft") if recipe.sft else recipe.model
    adapters = [None, *(str(run / "policy" / f"round={t:03d}") for t in range(rounds.height))]
    measured = [measure(root, start, adapter, recipe.gen.max_new_tokens) for adapter in adapters]
    print("| round | s | s_prompt | gap | tau_t | rank share | unseen prefixes | second judge | PPL | words |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    print(f"| start | | | | | | {cells(measured[0])} |")
    for row, found in zip(rounds.iter_rows(named=True), measured[1:], strict=True):
        print(
            f"| {row['round']} | {row['mean_s']:.2f} | {row['mean_s_prompt']:.2f} | {row['mean_margin']:.2f} "
            f"| {row['tau']:.3f} | {100 * row['rank_share']:.0f} % | {cells(found)} |"
        )
    gain = np.array(measured[-1]["rewards"]) - np.array(measured[0]["rewards"])
    print(f"\nreward, last policy less start policy on the same prefixes: {bootstrap_mean(gain.tolist())}")
    draw(rounds, measured, run / "learning-curve.png")


def measure(root: Path, start: str, adapter: str | None, max_new_tokens: int) -> dict:
    """Rewards on the unseen prefixes, and perplexity, of the start policy with an adapter; kept by their digests."""
    kept = root / "measured" / f"{text_digest(policy_name(start, adapter))}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    xs = pl.read_parquet(root / "unseen.parquet")["x"].to_list()
    ys = sample_responses(start, xs, adapter=adapter, engine="hf", max_new_tokens=max_new_tokens)
    found = {
        "rewards": load_reward_model(str(root / "reward"), Rewards(output_index=1)).score(
            list(zip(xs, ys, strict=True))
        ),
        "second": judge.score(xs, ys),
        "perplexity": perplexity(start, root / "perplexity.parquet", adapter=adapter),
        "responses": ys,
    }
    kept.parent.mkdir(exist_ok=True)
    write_atomic(kept, json.dumps(found))
    return found


def cells(found: dict) -> str:
    words = np.mean([len(y.split()) for y in found["responses"]])
    reward, second = bootstrap_mean(found["rewards"]), bootstrap_mean(found["second"])
    return f"{reward} | {second} | {found['perplexity']:.1f} | {words:.0f}"


def draw(rounds: pl.DataFrame, measured: list[dict], path: Path) -> None:
    """s, s_prompt and the reward on unseen prefixes by round."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(rounds["round"], rounds["mean_s_prompt"], "o-", label="s_prompt, sampled in the round")
    axes.plot(rounds["round"], rounds["mean_s"], "o-", label="s, sampled in the round")
    means = [bootstrap_mean(found["rewards"]) for found in measured]
    spread = [[m.mean - m.low for m in means], [m.high - m.mean for m in means]]
    axes.errorbar(
        range(len(means)), [m.mean for m in means], spread, fmt="s--", capsize=3, label="unseen prefixes, 95 %"
    )
    axes.set(xlabel="rounds of training before", ylabel="reward (logit of positive)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "table"])
    parser.add_argument("root", type=Path, help="what prepare.py wrote")
    parser.add_argument("--run", default="ple", help="the run's name below root")
    arguments = parser.parse_args()
    {"check": check, "table": table}[arguments.what](arguments.root, arguments.root / arguments.run)


if __name__ == "__main__":
    main()
