"""The stages that a disk may fail: small, each from what an uninterrupted run of those before it left."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.torch import load_file

from tests import tiny

QUERIES = 6
TIMINGS = {"seconds", "tokens_per_second"}
"""Metrics that differ from run to run."""
FIRST = "the first run"
"""A stage's place in its own uninterrupted run."""


@dataclass(frozen=True)
class Stage:
    """argv: the command line for a place; watched: what it writes there; needs: what it finds there, by name."""

    name: str
    argv: Callable[[Path], list[str]]
    watched: str
    needs: tuple[str, ...] = ()


class World:
    """Models, queries and data that the stages start from, and what each leaves when nothing fails."""

    def __init__(self, base: Path) -> None:
        self.base, self.left = base, base / "left"
        self.policy = tiny.tiny_policy(base / "policy", hidden=32, layers=1)
        self.reward = tiny.tiny_reward(base / "reward", hidden=32, layers=1)
        texts = tiny.corpus()[:QUERIES]
        self.queries = _rows(base / "queries.jsonl", [{"id": f"q{n}", "x": text[:9]} for n, text in enumerate(texts)])
        self.demonstrations = _rows(base / "sft.jsonl", [{"x": text[:9], "y": text[9:]} for text in texts])
        self.labelled = _rows(base / "labelled.jsonl", [{"text": t, "label": n % 2} for n, t in enumerate(texts)])

    def stages(self) -> list[Stage]:
        training = _words(precision="float32", checkpoint_every=1, batch_size=3)
        sampling = _words(engine="hf", max_new_tokens=3, queries=self.queries)
        return [
            Stage("sft", lambda at: ["sft", *_words(model=self.policy, data=self.demonstrations, output=at / "sft"),
                                     *training], "sft"),
            Stage("reward", lambda at: ["reward", *_words(model=self.reward, data=self.labelled, output=at / "rm"),
                                        *training], "rm"),
            Stage("gen", lambda at: ["gen", *_words(model=self.policy, principles="hh", data=at / "data", round=0,
                                                    unit_size=3), *sampling], "data"),
            Stage("score", lambda at: ["score", *_words(data=at / "data", reward_model=self.reward)], "data",
                  ("gen/data",)),
            Stage("train", lambda at: ["train", *_words(model=self.policy, data=self.left / "score/data", round=0,
                                                        output=at / "adapter"), *training], "adapter"),
            Stage("objective", lambda at: ["train", *_words(model=self.policy, data=at / "data", round=0,
                                                            objective="ple-residual", output=at / "adapter"),
                                           *training], ".", ("score/data",)),
            Stage("raft", lambda at: ["baseline", "raft", *_words(model=self.policy, data=self.left / "score/data",
                                                                  round=0, output=at / "raft"), *training], "raft"),
            Stage("eval", lambda at: ["eval", *_words(policy=f"base={self.policy}", output=at / "eval",
                                                      reward_model=self.reward), *sampling], "eval"),
            Stage("judge", lambda at: ["judge", f"{self.left}/score/data", f"{self.left}/score/data#arm=y_prompt",
                                       *_words(judge=f"reward:{self.reward}", output=at / "judge")], "judge"),
            Stage("purity", lambda at: ["purity", *_words(model=self.policy, adapter=self.left / "train/adapter",
                                                          data=self.left / "score/data", output=at / "purity")],
                  "purity"),
            Stage("export", lambda at: ["export", f"{self.left}/score/data",
                                        *_words(format="sft", output=at / "out/rows.jsonl")], "out"),
            Stage("report", lambda at: ["report", f"{self.left}/score/data", *_words(output=at / "page/report.html")],
                  "page"),
        ]  # fmt: skip

    def prepare(self, stage: Stage, place: Path) -> None:
        """Put into a new `place` what the stage finds there."""
        place.mkdir(parents=True)
        for need in stage.needs:
            shutil.copytree(self.left / need, place / Path(need).name)


def _rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _words(**options: Any) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def differences(directory: Path, whole: Path) -> Iterator[tuple[str, str]]:
    """('lost', 'doubled' or 'different', name) of the files that a stage left otherwise than in `whole`."""
    left, expected = contents(directory), contents(whole)
    for name in sorted({*left, *expected}):
        if left.get(name) == expected.get(name):
            continue
        if name not in left or name not in expected:
            yield "lost" if name in expected else "doubled", name
        elif name.endswith(".parquet") and reads(directory / name):
            yield _rows_differ(directory / name, whole / name), name
        else:
            yield "different", name


def left_over(directory: Path, whole: Path) -> list[str]:
    """Files of ours beside the results that an uninterrupted run does not leave, such as half a write. No locks."""
    left, expected = ({str(p.relative_to(at)) for p in at.rglob("*") if p.is_file()} for at in (directory, whole))
    return sorted(name for name in left - expected if hidden(name) and not name.endswith("lock"))


def hidden(name: str) -> bool:
    """Whether a path has a part that begins with a dot."""
    return any(part.startswith(".") for part in Path(name).parts)


def _rows_differ(found: Path, expected: Path) -> str:
    rows, wanted = (Counter(map(repr, pq.read_table(path).to_pylist())) for path in (found, expected))
    if wanted - rows and not rows - wanted:
        return "lost"
    return "doubled" if rows - wanted and set(rows) <= set(wanted) else "different"


def reads(path: Path) -> bool:
    """Whether who reads a file takes it, damaged or not."""
    try:
        if path.suffix == ".parquet":
            pq.read_table(path)
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_bytes())
    except (ValueError, SafetensorError, pa.ArrowException):
        return False
    return True


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(directory: Path) -> dict[str, Any]:
    """What a stage left: the digest of every file that its users read, records and metrics without their timings."""
    found: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        inside = path.relative_to(directory)
        if path.is_dir() or path.name.endswith("lock") or (".ple" in inside.parts and "commits" not in inside.parts):
            continue
        found[str(inside)] = digest(path)
        if path.name == "README.md":
            found[str(inside)] = path.read_text().replace(str(directory), "")
        elif reads(path) and path.name == "ple.json":
            record = json.loads(path.read_text().replace(str(directory), ""))
            record["cost"].pop("seconds", None)
            record["files"].pop("README.md", None)  # it names the place
            record["files"] = {name: digest(path.parent / name) == held for name, held in record["files"].items()}
            found[str(inside)] = record
        elif reads(path) and path.name == "metrics.parquet":
            table = pq.read_table(path)
            kept = [name for name in table.column_names if name not in TIMINGS]
            found[str(inside)] = table.select(kept).to_pylist()
    return found
