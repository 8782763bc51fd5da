"""What a CPU and a GPU must agree on in float32: the commands, run on either, and the comparison of what they left.

`python -m benchmarks.on_gpu.reference WORLD` (as JSON) runs the CPU's side of a world. Judges nothing but the numbers.
"""

import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.on_gpu.sections import no_progress_bars
from benchmarks.on_gpu.worlds import World

TOLERANCE = 1e-4
"""Of weights, losses, rewards and log-probabilities, relative where they are above 1."""
ALL_BUT_FEW = 0.9999
"""Share of the weights that must be within it. AdamW moves a weight whose gradient is near 0 by its sign, which
rounding turns: with another --microbatch-tokens on one CPU, the furthest weight of an adapter was 1.3e-4 apart."""
TRAINED = ("train", "train with trust region", "sft", "reward")
COLUMNS = {
    "score": ("pairs/**/*.parquet", ["round", "query_id", "sample"], ["s", "s_prompt"]),
    "eval": ("eval.parquet", ["label", "query_id", "sample"], ["rewards", "reference_nll"]),
    "purity": ("purity.parquet", ["policy_number", "query_id", "sample"], None),
}
"""Tables: where, sorted by what, and the columns that are compared (None: all of the log-probabilities)."""


def training(world: World) -> list[str]:
    """The training that is compared, killed and resumed, without its --output."""
    words = f"train --model {world.model} --data {world.data} --round 0 --batch-size 4 --precision float32"
    return [*words.split(), "--epochs", str(-(-world.steps * 4 // world.queries))]


def commands(world: World, side: str) -> dict[str, list[str]]:
    """The words of each command; `side` is gpu or cpu, and the folder that it writes to."""
    out = str(world.folder / side)
    exact = ["--precision", "float32"]
    sft = ["--model", world.model, "--data", world.file("sft"), "--batch-size", "4", "--no-merge"]
    reward = ["--model", world.model, "--data", world.file("preferences"), "--batch-size", "4"]
    evaluation = [
        "--policy", f"start={world.model}", "--data", world.data, "--round", "0", "--references", world.file("queries"),
        "--reward-model", world.reward,
    ]  # fmt: skip
    first_round = ["--data", world.data, "--round", "0"]  # of a store to which the GPU's side adds another
    purity = ["--model", world.model, "--adapter", f"{out}/train", *first_round]
    return {
        "score": ["score", *first_round, "--reward-model", world.reward, "--output", f"{out}/score"],
        "train": [*training(world), "--output", f"{out}/train"],
        "train with trust region": [
            *training(world), "--output", f"{out}/train with trust region", "--trust-region", "0.001",
            "--normalize-wsft",
        ],
        "sft": ["sft", *sft, *exact, "--output", f"{out}/sft"],
        "reward": ["reward", *reward, *exact, "--output", f"{out}/reward"],
        "eval": ["eval", *evaluation, *exact, "--output", f"{out}/eval"],
        "purity": ["purity", *purity, *exact, "--output", f"{out}/purity"],
    }  # fmt: skip


def call(words: list[str]) -> None:
    """A command of ours in this process. Raises what it raises."""
    import cli

    print("$ ple", *words, flush=True)
    cli.ple.main([words[0], *words[1:], "--debug"], prog_name="ple", standalone_mode=False)


def compare(name: str, world: World) -> dict[str, Any]:
    """Differences of what the two sides left. Raises AssertionError where they are above the tolerance."""
    gpu, cpu = (world.folder / side / name for side in ("gpu", "cpu"))
    failed = world.folder / "cpu" / f"{name}.traceback"
    if failed.exists():
        raise RuntimeError(f"the CPU's own run failed:\n{failed.read_text()}")
    found = trained(gpu, cpu) if name in TRAINED else table(name, gpu, cpu)
    judged = {part: value for part, value in found.items() if part != "largest"}
    assert max(judged.values()) <= TOLERANCE, found
    return found


def trained(one: Path, other: Path) -> dict[str, float]:
    """Of the loss of every step, of the weights but for the few that are furthest apart, and the largest of these."""
    apart = weights_apart(one, other)
    few = float(np.quantile(apart, ALL_BUT_FEW))
    return {"losses": distance(losses(one), losses(other)), "weights": few, "largest": float(apart.max())}


def weights_apart(one: Path, other: Path) -> np.ndarray:
    """The difference of each weight."""
    from safetensors.numpy import load_file

    files = [file.relative_to(one) for file in one.glob("*.safetensors")]
    assert files, f"no weights in {one}"
    pairs = [(load_file(one / file), load_file(other / file)) for file in files]
    apart = [np.abs(part - theirs[name]).ravel() for ours, theirs in pairs for name, part in ours.items()]
    return np.nan_to_num(np.concatenate(apart), nan=np.inf)


def losses(output: Path) -> np.ndarray:
    """Of every step."""
    import polars as pl

    return pl.read_parquet(output / "metrics.parquet")["loss"].to_numpy()


def table(name: str, one: Path, other: Path) -> dict[str, float]:
    pattern, keys, columns = COLUMNS[name]
    ours, theirs = (read(folder, pattern, keys) for folder in (one, other))
    assert len(ours) == len(theirs) > 0, (len(ours), len(theirs))
    compared = columns or [column for column in ours.columns if "logp" in column]
    return {column: distance(*(flat(rows[column]) for rows in (ours, theirs))) for column in compared}


def read(folder: Path, pattern: str, keys: list[str]) -> Any:
    import polars as pl

    rows = pl.concat(pl.read_parquet(file, hive_partitioning=False) for file in sorted(folder.glob(pattern)))
    if "policy" in rows.columns:  # an adapter is named by its digest, which rounding changes: its place tells it
        rows = rows.with_columns(policy_number=pl.col("policy").rle_id())
    return rows.sort([key for key in keys if key in rows.columns])


def flat(column: Any) -> np.ndarray:
    return np.array(list(numbers(column.to_list())), dtype=np.float64)


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, list):
        for part in value:
            yield from numbers(part)
    elif value is not None:
        yield value


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, over the largest expected value where that is above 1; NaN counts as infinite."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    if not found.size:
        return 0.0
    apart = float(np.abs(found.astype(np.float64) - expected).max()) / max(1.0, float(np.abs(expected).max()))
    return apart if np.isfinite(apart) else float("inf")


def main(text: str) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    no_progress_bars()
    world = World(**json.loads(text) | {"folder": Path(json.loads(text)["folder"])})
    for name, words in commands(world, "cpu").items():
        try:
            call(words)
        except BaseException:
            traceback.print_exc()
            failed = world.folder / "cpu" / f"{name}.traceback"
            failed.parent.mkdir(exist_ok=True)
            failed.write_text(traceback.format_exc(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
