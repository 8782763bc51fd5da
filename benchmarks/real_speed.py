"""How fast are sampling and training with a real model's weights? Ours beside TRL and vLLM, in one run.

`MODEL` is a folder with a model's weights; its shape counts, and random ids stand for texts, of HH's and IMDb's
lengths. Each figure has its share of a product of matrices of the model's own shape, measured in the same process: 6
operations for each weight and useful token (x of both responses) in training, 2 in sampling. LoRA can do with 4, as
frozen weights have no gradient, and ours computes x once.

    pip install 'trl==1.16.0'
    python -m benchmarks.real_speed MODEL --vllm-python .venv-vllm/bin/python
    python -m benchmarks.real_speed MODEL --lengths imdb --contenders ours,residual-kept,residual,dpo,sft-packed
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import train
from benchmarks.side_by_side import made_with, ratio_table, seconds_of, timed_in_turns

LENGTHS = {"hh": (100, 51), "imdb": (10, 207)}
"""Median tokens of x and y: HH's prompts and chosen answers, IMDb's first 8 words and the rest of the review."""
MICROBATCH = 4096
"""Rows of the measured product."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder with config.json and safetensors")
    parser.add_argument("--lengths", default=",".join(LENGTHS), help="some of %(default)s")
    parser.add_argument("--contenders", default="ours,residual-kept,residual,dpo,sft-packed", help="of training")
    parser.add_argument("--pairs", type=int, default=64, help="%(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="%(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="%(default)s")
    parser.add_argument("--precision", choices=("auto", "bf16", "float32"), default="auto")
    parser.add_argument("--batch", type=int, default=64, help="of hf sampling: rows at once; %(default)s")
    parser.add_argument("--vllm-python", help="the Python of the environment with vLLM, which then samples too")
    parser.add_argument("--sample-with", help=argparse.SUPPRESS)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    for name in options.lengths.split(","):
        with tempfile.TemporaryDirectory() as folder:
            bench = real_bench(Path(folder), options, name)
            if options.sample_with:
                print(json.dumps(sampling_seconds(bench, options.sample_with, options)))
            else:
                report(name, bench, options)


def real_bench(folder: Path, options: argparse.Namespace, lengths: str) -> train.Bench:
    """The bench of `benchmarks.train` on this model's weights, with a tokenizer that has a word for every id."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = folder / "model"
    vocabulary = AutoConfig.from_pretrained(options.model).get_text_config().vocab_size
    train.write_tokenizer(model, vocabulary)
    for path in options.model.resolve().iterdir():
        if path.name == "config.json" or "safetensors" in path.name:
            (model / path.name).symlink_to(path)
    x, y = LENGTHS[lengths]
    words = f"--vocabulary {vocabulary} --prompt {x} --response {y} --pairs {options.pairs} --longest 900"
    asked = train.parse_options([*words.split(), "--precision", options.precision])
    bench = train.Bench(folder, asked)
    with torch.device("meta"):
        loaded = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.model))
    head = loaded.get_output_embeddings().weight.numel()
    inputs = loaded.get_input_embeddings().weight
    layers = sum(weight.numel() for weight in loaded.base_model.parameters() if weight is not inputs)
    bench.weights = layers, head
    return bench


def report(name: str, bench: train.Bench, options: argparse.Namespace) -> None:
    """Print both tables of these lengths."""
    assert bench.weights
    rate, weights = own_product_rate(bench), sum(bench.weights)
    print(f"\n{name}: x {LENGTHS[name][0]}, y {LENGTHS[name][1]} tokens (medians), {options.pairs} pairs")
    print(
        f"{options.model.name}: {weights / 1e6:,.0f} million weights, {bench.precision}; {made_with(*train.PACKAGES)}"
    )
    print(f"a product of matrices of its own shape: {rate / 1e9:,.0f} GFLOP/s")
    sampled = {"hf": sampling_seconds(bench, "hf", options)}
    if options.vllm_python:
        command = [options.vllm_python, "-m", "benchmarks.real_speed", str(options.model), "--lengths", name]
        command += ["--pairs", str(options.pairs), "--repeats", str(options.repeats), "--threads", str(options.threads)]
        command += ["--precision", options.precision, "--sample-with", "vllm"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        sampled["vllm"] = json.loads(done.stdout.splitlines()[-1])
    for engine, (seconds, tokens, read) in sampled.items():
        middle = statistics.median(seconds)
        share = 2 * weights * (tokens + read) / middle / rate
        print(f"sampling with {engine}: {tokens / middle:,.0f} tokens/s, {100 * share:.1f} % of the product")
    names = options.contenders.split(",")
    trained = timed_in_turns({each: partial(bench.run, each) for each in names}, options.repeats)
    print(ratio_table(trained, bench.useful, "useful tokens"))
    for each in names:
        share = 6 * weights * bench.useful / statistics.median(trained[each]) / rate
        print(f"{each}: {100 * share:.1f} % of the product")


def own_product_rate(bench: train.Bench) -> float:
    """Operations a second of one micro-batch's product with the widest matrix of the model's layers."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(bench.model).get_text_config()
    hidden = config.hidden_size
    wide = getattr(config, "intermediate_size", None) or 4 * hidden
    device = "cuda" if bench.gpu else "cpu"
    left = torch.randn(MICROBATCH, hidden, device=device, dtype=bench.dtype)
    right = torch.randn(hidden, wide, device=device, dtype=bench.dtype)

    def product() -> None:
        for _ in range(10):
            torch.mm(left, right)
        if bench.gpu:
            torch.cuda.synchronize()

    return 10 * 2 * MICROBATCH * hidden * wide / min(seconds_of(product) for _ in range(5))


def sampling_seconds(bench: train.Bench, name: str, options: argparse.Namespace) -> tuple[list[float], int, int]:
    """Seconds of each repeat after a warm-up, tokens sampled in one, and tokens read in one. Responses are as long as
    the bench's; the engine starts before."""
    from ple_data.common.models import load_tokenizer
    from ple_data.engines import EngineSpec, Request, Sampling, make_engine

    new = round(float(np.median([len(y) for _, y, _ in bench.pairs])))
    longest = max(len(x) for x, _, _ in bench.pairs) + new
    tokenizer = load_tokenizer(bench.model)
    dtype = "bfloat16" if bench.precision == "bf16" else "float32"
    spec = EngineSpec(str(bench.model), None, None, tokenizer, (1,), max_length=longest, dtype=dtype)
    arguments = {"batch_size": options.batch} if name == "hf" else {}
    engine: Any = make_engine(name, spec, arguments)
    sampled: list[int] = []

    def sample() -> None:
        unit = [Request(at, tuple(x), at) for at, (x, _, _) in enumerate(bench.pairs)]
        found = [done for _, done in engine.sample(iter([unit]), Sampling(max_new_tokens=new))]
        sampled[:] = [len(done.ids) for done in found]

    sample()
    seconds = [seconds_of(sample) for _ in range(options.repeats)]
    engine.close()
    return seconds, sum(sampled), sum(len(x) for x, _, _ in bench.pairs)


if __name__ == "__main__":
    main()
