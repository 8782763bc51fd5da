"""Training in parts: 2 and 3 processes that share every weight give the weights of one process that has all."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from ple_train.model import shard
from ple_train.model.policy import load_causal_lm, load_policy, load_trainable
from schemas.errors import UsageError
from schemas.options import Sft, Trainable
from tests import tiny
from tests.conftest import ROOT
from tests.ple_train.baselines.test_on_policy import TEXTS, sampled
from tests.ple_train.sharded import train
from tests.ple_train.small_training import write_pairs

SHARED: dict[str, Any] = {"round": 1, "learning_rate": 1e-3, "batch_size": 8, "microbatch_tokens": 150}
CASES: dict[str, dict[str, Any]] = {
    "gated": {"stable": True, "gradient_checkpointing": True},
    "residual": {"objective": "ple-residual", "epochs": 2, "checkpoint_every": 3},
    "full": {"full": True},
    "bf16": {"precision": "bf16"},
    "distilled": {"method": "context-distillation", "on_policy": True, "round": 0},
    "raft": {"method": "raft", "round": 0},
    "fine-tuned": {"method": "ple sft", "round": None, "merge": False},
}
METHOD = ("distilled", "raft", "fine-tuned")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model, pairs, and the trainings of one process."""
    place = tmp_path_factory.mktemp("shard")
    tiny.tiny_policy(place / "policy", tie_word_embeddings=True)
    write_pairs(place / "pairs")
    (place / "rows.jsonl").write_text(
        "".join(json.dumps({"x": x[:20], "y": x[20:]}) + "\n" for x in tiny.corpus()[:24])
    )
    sampled(place, place / "policy", TEXTS)
    for name, more in CASES.items():
        train(options(place, f"one-{name}", **more))
    shutil.rmtree(place / "pairs" / "logps")  # the others compute theirs
    return place


def options(place: Path, output: str, **more: Any) -> dict[str, Any]:
    data = {"context-distillation": "data", "raft": "data", "ple sft": "rows.jsonl"}
    found = {"data": [place / data.get(more.get("method", ""), "pairs")], "output": place / output, **SHARED, **more}
    return {"model": str(place / "policy"), **{name: value for name, value in found.items() if value is not None}}


def launch(place: Path, processes: int, cases: list[dict[str, Any]]) -> str:
    """Train all cases in one torchrun → what it printed."""
    file = place / f"cases-{processes}.json"
    file.write_text(json.dumps(cases, default=str))
    words = ["torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={29530 + processes}"]
    done = subprocess.run(
        [sys.executable, "-m", *words, "-m", "tests.ple_train.sharded", str(file)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_parts_give_the_weights_of_the_whole(place: Path) -> None:
    cases = [{"options": options(place, f"two-{name}", shard=True, **more)} for name, more in CASES.items()]
    stopped = options(place, "three-residual", shard=True, **CASES["residual"])
    said = launch(place, 2, [*cases, {"options": stopped, "stop": 5}])
    assert "three-residual stopped" in said
    gated = options(place, "three-gated", shard=True, **CASES["gated"])
    launch(place, 3, [{"options": gated}, {"options": stopped}])  # the latter from where two processes were stopped
    for name in CASES:
        for processes in ("two", "three") if name in ("gated", "residual") else ("two",):
            assert_same(place, name, processes, atol=2e-2 if name == "bf16" else 1e-5)
    held = {name: int(count) for name, count in re.findall(r"(\S+): (\d+) numbers", said)}
    whole = sum(tensor.numel() for tensor in load_file(place / "policy" / "model.safetensors").values())
    assert held["two-full"] < 0.51 * whole


def assert_same(place: Path, name: str, processes: str, atol: float) -> None:
    file = "model.safetensors" if name == "full" else "adapter_model.safetensors"
    found, expected = (load_file(place / f"{who}-{name}" / file) for who in (processes, "one"))
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    near = {"rel": 5e-2, "abs": 5e-3} if name == "bf16" else {"rel": 1e-4, "abs": 1e-5}
    found, expected = (pl.read_parquet(place / f"{who}-{name}" / "metrics.parquet") for who in (processes, "one"))
    of_pairs = ("entropy", "drift_wsft_y_age0", "gated_share")
    of_method = ("kl_start",) if name == "distilled" else ()
    for column in ("loss", "grad_norm", *(of_method if name in METHOD else of_pairs)):
        numbers = (frame[column].drop_nulls().to_list() for frame in (found, expected))
        assert next(numbers) == pytest.approx(next(numbers), **near)


def test_what_cannot_be_held_in_parts_is_said(place: Path, tmp_path: Path) -> None:
    from ple_train.sft import sft

    causal = load_causal_lm(str(place / "policy"))
    with pytest.raises(UsageError, match=r"--shard does not support LlamaForCausalLM: .* have no lm_head\.weight"):
        shard._in_file(
            "model.lm_head.weight", SimpleNamespace(_base=[causal], named_modules=lambda: [("model", causal)]), {}
        )
    causal._no_split_modules = None
    with pytest.raises(UsageError, match="--shard does not know what the layers of LlamaForCausalLM are: leave it out"):
        shard.layers_of(causal)
    whole = Trainable(full=True, shard=True)
    with pytest.raises(UsageError, match="--shard --full goes on from a whole model: give that as --model"):
        load_trainable(str(place / "policy"), whole, adapter=str(place / "one-gated"), in_parts=True)
    with pytest.raises(UsageError, match="--shard keeps the adapter apart: add --no-merge, or --full"):
        sft(Sft(model=str(place / "policy"), data=tmp_path / "rows.jsonl", output=tmp_path / "sft", shard=True))


def test_one_process_that_shares_with_none_says_so(place: Path, capfd: pytest.CaptureFixture) -> None:
    load_policy(str(place / "policy"), Trainable(shard=True))
    assert capfd.readouterr().err.count("note: --shard shares a model among processes, and this is one") == 1
