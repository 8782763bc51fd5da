"""Section b: training of random weights of real shapes: tokens a second, peak memory and utilisation.

On each shape and length ours, then TRL's DPO and packed SFT where TRL is installed; 8 of its 28 layers stand for the
whole 7B model, which is tried once too. Useful tokens are those of benchmarks/train.py.
"""

import importlib.util
import statistics
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import train
from benchmarks.on_gpu.sections import NotHere, Results, Setting, room_for
from benchmarks.on_gpu.timing import on_gpu
from benchmarks.side_by_side import most_memory

LAYERS_OF_7B = 8
DEFAULT_AT_ONCE = 8192
WHOLE_7B_SECONDS = 75


@dataclass(frozen=True)
class Case:
    """Pairs of one length to train a shape on; layers: fewer than the shape's."""

    shape: str
    response: int
    pairs: int
    layers: int | None = None
    prompt: int = 256
    more: str = ""

    @property
    def name(self) -> str:
        layers = f" ({self.layers} of {train.SHAPES[self.shape]['num_hidden_layers']} layers)" if self.layers else ""
        return f"{self.shape}{layers}, {self.prompt + self.response:,} tokens"

    def bench(self, folder: Path) -> train.Bench:
        words = f"--shape {self.shape} --prompt {self.prompt} --response {self.response - 1} --spread 0 --longest 4096"
        layers = f"--layers {self.layers}" if self.layers else ""
        options = f"{words} {layers} --pairs {self.pairs} --peer-batch 1 {self.more}"
        return train.Bench(folder, train.parse_options(options.split()), in_memory=True)


WAYS: dict[str, dict[str, Any]] = {
    "": {},
    "transformers' norms": {"norms": "transformers"},
    "Liger's norms, rotation and gate": {"norms": "liger"},
    "32,768 tokens at once": {"at_once": 32_768},
    "gradient checkpointing": {"checkpointing": True},
    "trust region": {"delta": 0.3},
    "prompts repeated": {"shared": False},
}
CASES = {
    Case("qwen2.5-7b", 1024, 48, LAYERS_OF_7B): [*list(WAYS)[:3], "gradient checkpointing"],
    Case("qwen2.5-7b", 3840, 48, LAYERS_OF_7B): [""],
    Case("qwen2.5-0.5b", 1024, 80): list(WAYS),
    Case("qwen2.5-0.5b", 3840, 48): [""],
}
"""With the ways of each. At least three steps of 16 pairs: the first warms up."""
WHOLE = Case("qwen2.5-7b", 1024, 48)
SMALL = {Case("small", 12, 48, 1, 4, "--vocabulary 512 --hidden 64"): list(WAYS)}
PEERS, SLOWER_PEERS = ("dpo", "sft-packed"), ("sft",)


def measure(results: Results, setting: Setting) -> None:
    kind = torch.bfloat16 if on_gpu() else torch.float32
    rate = train.product_rate(kind, 8192 if on_gpu() else 256)
    results.keep("product", kind=str(kind).removeprefix("torch."), tflops=rate / 1e12)
    cases = SMALL if setting.cpu else CASES
    with room_for(1) as folder:

        def bench(case: Case) -> train.Bench:
            return case.bench(folder / f"{case.shape}-{case.layers}")

        def attempt_peers(case: Case, names: tuple[str, ...]) -> None:
            for name in names:
                work = partial(peer, bench(case), name, rate, case, setting)
                results.attempt(f"{case.name}: TRL {name}", work)

        for number, (case, ways) in enumerate(cases.items()):
            for way in ways:
                name = f"{case.name}: ours" + (f", {way}" if way else "")
                output = folder / f"ours-{number}-{way}"
                results.attempt(name, partial(ours, bench(case), output, rate, case, **WAYS[way]))
            attempt_peers(case, PEERS)
            if not (setting.cpu or number):
                results.attempt(f"{WHOLE.name}: ours", partial(whole, folder / "whole", rate, setting))
        attempt_peers(next(iter(cases)), SLOWER_PEERS)


def ours(
    bench: train.Bench,
    output: Path,
    rate: float,
    case: Case,
    *,
    shared: bool = True,
    delta: float | None = None,
    checkpointing: bool = False,
    norms: str = "",
    at_once: int | None = None,
) -> dict[str, Any]:
    if bench.options.microbatch_tokens == DEFAULT_AT_ONCE and at_once:
        bench.options.microbatch_tokens = at_once
    bench.clear()
    bench.step_ends = []
    with mock.patch("ple_train.model.policy.fuse_norms") if norms else nullcontext():
        policy = train.our_policy(bench, gradient_checkpointing=checkpointing)
    if norms == "liger":
        apply_liger(policy)
    found = {"attention": policy.attention, "layout": policy.layout if shared else "packed"}
    if not shared:
        policy.layout = "packed"
    train.train_ours(bench, policy, output, delta, saved=False)
    del policy
    return numbers(bench, rate, case) | found


def apply_liger(policy: Any) -> None:
    """Its output layer and loss stay ours. Raises NotHere."""
    if not (on_gpu() and importlib.util.find_spec("liger_kernel")):
        raise NotHere("liger_kernel is not installed, or no GPU")
    from liger_kernel.transformers import _apply_liger_kernel_to_instance as apply

    apply(policy.model.get_base_model(), fused_linear_cross_entropy=False, cross_entropy=False)


def whole(folder: Path, rate: float, setting: Setting) -> dict[str, Any]:
    """All layers, as much at once as the memory holds."""
    if setting.seconds_left() < WHOLE_7B_SECONDS:
        raise NotHere(f"{setting.seconds_left():.0f} s left, {WHOLE_7B_SECONDS} needed")
    bench = WHOLE.bench(folder)
    for tokens, checkpointing in ((8192, False), (4096, False), (8192, True)):
        bench.options.microbatch_tokens = tokens
        try:
            found = ours(bench, folder / f"{tokens}-{checkpointing}", rate, WHOLE, checkpointing=checkpointing)
        except torch.OutOfMemoryError:
            continue
        return found | {"microbatch_tokens": tokens, "gradient_checkpointing": checkpointing}
    raise NotHere("it does not fit, with gradient checkpointing either")


def peer(bench: train.Bench, name: str, rate: float, case: Case, setting: Setting) -> dict[str, Any]:
    if not importlib.util.find_spec("trl"):
        raise NotHere("trl is not installed")
    if setting.seconds_left() < 15:
        raise NotHere("no time left")
    bench.run(name)
    return numbers(bench, rate, case)


def numbers(bench: train.Bench, rate: float, case: Case) -> dict[str, Any]:
    """Of the steps after the first, which warms up; of that one where there is no other."""
    every = [after - before for before, after in pairwise(bench.step_ends)]
    steps, count = every[1:] or every, len(every)
    seconds = statistics.median(steps)
    peak = most_memory() / 2**30
    values: dict[str, Any] = {
        "tokens_per_second": bench.useful / count / seconds,
        "seconds_a_step": seconds,
        "fastest": min(steps),
        "slowest": max(steps),
        "steps": len(steps),
        "peak_gib": peak,
        "utilisation": train.operations(bench) / count / seconds / rate,
    }
    if case.layers:
        values["scaled_tokens_per_second"] = scaled(bench, case, seconds)
    bench.clear()
    return values


def scaled(bench: train.Bench, case: Case, seconds: float) -> float:
    """What all layers would give, if a step's time went by the operations of layers and head: no measurement."""
    assert bench.weights
    layers, head = bench.weights
    all_layers = layers * train.SHAPES[case.shape]["num_hidden_layers"] / (case.layers or 1)
    return bench.useful / (len(bench.step_ends) - 1) / (seconds * (all_layers + head) / (layers + head))
