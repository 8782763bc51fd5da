"""How fast and how large is ple-train? Our loop against TRL on CPU or GPU: same pairs, model, LoRA and threads.

Every contender trains one epoch over the same random pairs (lengths log-normal, as in real data), in turns, after a
run that warms it up. Useful tokens are those of x + y and x + y_prompt, whatever a contender computes for them;
time is from the first step to the last, so that start-up and tokenising do not count. `--memory` measures instead the
peak of memory (resident, or the GPU's) of one contender a process, less what the loaded model alone takes there.

    pip install 'trl==1.16.0'                       # the peer; TRL 1.12, which PPO needs, is close
    python -m benchmarks.train --vocabulary 8192
    python -m benchmarks.train --vocabulary 151936 --pairs 32 --repeats 5
    python -m benchmarks.train --vocabulary 151936 --pairs 32 --memory
    python -m benchmarks.train --prompt 250 --response 40 --contenders ours,ours-unshared
    python -m benchmarks.train --vocabulary 8192 --contenders ours --profile       # where the time goes

Where there is a GPU all contenders run on it in bf16, frozen weights held in bf16, and `--shape` has random weights of
real shapes; utilisation is then against a product of two bf16 matrices that is measured in the same process:

    python -m benchmarks.train --shape qwen2.5-0.5b --prompt 256 --response 1024 --spread 0 --peer-batch 4
    python -m benchmarks.train --shape qwen2.5-7b --prompt 256 --response 1024 --spread 0 --peer-batch 1 --pairs 32
"""

import argparse
import contextlib
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.side_by_side import (
    clear_memory,
    forget_peak,
    made_with,
    most_memory,
    peak_bytes,
    ratio_table,
    seconds_of,
    timed_in_turns,
)
from schemas.options import Loop, ObjectiveName, Trainable

RESPONSE_SPREAD, PROMPT_SPREAD = 0.7, 0.6
"""Standard deviations of the logarithm of a length."""
SHAPES = {
    "small": {"vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 4},
    "qwen2.5-0.5b": {
        "vocab_size": 151_936, "hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864,
        "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "vocab_size": 152_064, "hidden_size": 3584, "num_hidden_layers": 28, "intermediate_size": 18_944,
        "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
}  # fmt: skip
KINDS = {
    "attention kernels": ("scaled_dot_product",),
    "matrix products": ("::mm", "::addmm", "::bmm"),
    "softmax, exponential and sign of the loss": ("log_softmax", "::exp_", "::neg_", "scatter", "gather"),
    "products, sums and powers of elements": ("::mul", "::add", "::pow", "::div", "::mean", "::sum", "rsqrt", "::neg"),
    "gate of the MLP": ("silu",),
    "copies, mostly between precisions": ("::copy_", "::cat", "::fill_", "::index", "::zero"),
}
"""Kinds of operations in a profile, by parts of their names: the first that fits."""
BATCH = 16
PACKAGES = ("torch", "transformers", "peft", "trl")
RANK, ALPHA, RATE = 8, 16, 1e-4


def parse_options(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--vocabulary", type=int, help="instead of the shape's")
    parser.add_argument("--hidden", type=int, help="instead of the shape's (small only)")
    parser.add_argument("--layers", type=int, help="instead of the shape's")
    parser.add_argument("--prompt", type=int, default=33, help="median tokens of x")
    parser.add_argument("--response", type=int, default=66, help="median tokens of y and of y_prompt")
    parser.add_argument("--spread", type=float, default=1.0, help="0: all lengths are the medians")
    parser.add_argument("--longest", type=int, default=2048, help="tokens; longer ones are cut")
    parser.add_argument("--pairs", type=int, default=128, help="%(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="%(default)s")
    parser.add_argument("--threads", type=int, default=2, help="%(default)s")
    parser.add_argument("--precision", choices=("auto", "bf16", "float32"), default="auto", help="of all contenders")
    parser.add_argument("--microbatch-tokens", type=int, default=8192, help="of ours: the most it holds")
    parser.add_argument(
        "--peer-batch", type=int, default=BATCH, choices=(1, 2, 4, 8, 16), help="pairs it holds at once"
    )
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="some of %(default)s")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--profile", action="store_true", help="where the time of the first contender goes, instead")
    parser.add_argument("--only", nargs=2, metavar=("CONTENDER", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> None:
    options = parse_options()
    names = options.contenders.split(",")
    import torch

    torch.set_num_threads(options.threads)
    if options.only:
        name, folder = options.only
        print_measured(name, Bench(Path(folder), options))
        return
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options)
        if options.memory:
            print_memory(names, options.repeats, folder)
            return
        if options.profile:
            print_profile(names[0], bench)
            return
        seconds = timed_in_turns({name: partial(bench.run, name) for name in names}, options.repeats)
        print(f"{len(bench.pairs)} pairs, {bench.useful} useful tokens; {made_with(*PACKAGES)}")
        print(ratio_table(seconds, bench.useful, "useful tokens"))
        print(utilisation(bench, statistics.median(seconds[names[0]]), names[0]))


class Bench:
    """The pairs, the model, and a training of each contender on them.

    in_memory: a model too large to write is made anew, where it computes, for each contender.
    """

    def __init__(self, folder: Path, options: argparse.Namespace, *, in_memory: bool = False) -> None:
        import torch

        from ple_train.model.policy import resolve_precision

        self.folder, self.options = folder, options
        self.model = folder / "model"
        self.gpu = torch.cuda.is_available()
        self.precision = resolve_precision(options.precision)
        self.dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        shape: dict[str, Any] = SHAPES[options.shape] | {
            name: value
            for name, value in (
                ("vocab_size", options.vocabulary),
                ("hidden_size", options.hidden),
                ("num_hidden_layers", options.layers),
            )
            if value
        }
        self.shape, self.in_memory = shape, in_memory
        self.weights: tuple[int, int] | None = None
        if in_memory and not self.model.exists():
            write_tokenizer(self.model, shape["vocab_size"])
        elif not self.model.exists():
            self.weights = write_model(self.model, shape, self.dtype)
        self.pairs = random_pairs(options, shape["vocab_size"])
        self.useful = sum(len(x) * 2 + len(y) + len(y_prompt) for x, y, y_prompt in self.pairs)
        self.number = 0
        self.step_ends: list[float] = []

    def load(self) -> Any:
        """The model, not wrapped."""
        from transformers import AutoModelForCausalLM

        if not self.in_memory:
            return AutoModelForCausalLM.from_pretrained(self.model, dtype=self.dtype)
        model = random_model(self.shape, self.dtype)
        self.weights = weights_of(model)
        return model

    def note_step_end(self) -> None:
        """To be called as the first step begins and as each one ends."""
        import torch

        if self.gpu:
            torch.cuda.synchronize()
        self.step_ends.append(time.perf_counter())

    def run(self, name: str) -> float:
        """Seconds of the steps of one epoch."""
        self.clear()
        self.number += 1
        self.step_ends = []
        output = self.folder / f"{name}-{self.number}"
        with contextlib.redirect_stdout(sys.stderr):
            return CONTENDERS[name](self, output)

    def loaded_alone(self) -> int:
        """What this process holds with nothing but the model loaded; `most_memory` counts from here."""
        import torch

        device = "cuda" if self.gpu else "cpu"
        self.clear()
        model = self.load().to(device)
        forget_peak()
        held = torch.cuda.memory_allocated() if self.gpu else peak_bytes()
        del model
        self.clear()
        return held

    def clear(self) -> None:
        """Give back what finished contenders held, their precision too; `most_memory` counts from here."""
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        clear_memory()


def write_model(directory: Path, shape: dict[str, Any], dtype: Any) -> tuple[int, int]:
    """A random model and its tokenizer → weights in its layers, and in its output layer."""
    write_tokenizer(directory, shape["vocab_size"])
    model = random_model(shape, dtype)
    model.save_pretrained(directory)
    return weights_of(model)


def write_tokenizer(directory: Path, vocabulary: int) -> None:
    """A tokenizer that has a word for every id, so that text and ids are the same thing."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<end>": 1, **{f"w{at}": at for at in range(2, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>").save_pretrained(directory)


def random_model(shape: dict[str, Any], dtype: Any) -> Any:
    """A Llama, or a Qwen2 where the shape has all its sizes; on a GPU where there is one."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    hidden = shape["hidden_size"]
    small = {
        "intermediate_size": 4 * hidden,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "tie_word_embeddings": True,
    }
    kind = Qwen2Config if "intermediate_size" in shape else LlamaConfig
    config = kind(**(small | shape), max_position_embeddings=2 * 4096, pad_token_id=0, eos_token_id=1)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def weights_of(model: Any) -> tuple[int, int]:
    """Weights in its layers, and in its output layer."""
    layers = sum(weight.numel() for name, weight in model.model.named_parameters() if "embed" not in name)
    return layers, model.get_output_embeddings().weight.numel()


def random_pairs(options: argparse.Namespace, vocabulary: int) -> list[tuple[list[int], list[int], list[int]]]:
    """(x, y, y_prompt) as ids."""
    numbers = np.random.default_rng(0)

    def ids(median: int, spread: float) -> list[int]:
        length = round(np.clip(numbers.lognormal(np.log(median), spread * options.spread), 2, options.longest))
        return numbers.integers(2, vocabulary, length).tolist()

    def response() -> list[int]:
        return [*ids(options.response, RESPONSE_SPREAD), 1]

    return [(ids(options.prompt, PROMPT_SPREAD), response(), response()) for _ in range(options.pairs)]


def operations(bench: Bench) -> float:
    """The fewest that one epoch needs: two for each weight and token forward and two backward (frozen weights have no
    gradient); each x once, the output layer for responses alone; attention and the adapter left out."""
    assert bench.weights
    layers, head = bench.weights
    responses = sum(len(y) + len(y_prompt) for _, y, y_prompt in bench.pairs)
    return 4 * (layers * (responses + sum(len(x) for x, _, _ in bench.pairs)) + head * responses)


def product_rate(dtype: Any, size: int) -> float:
    """Operations a second of a product of two square matrices, on a GPU where there is one."""
    import torch

    gpu = torch.cuda.is_available()
    left, right = (torch.randn(size, size, device="cuda" if gpu else "cpu", dtype=dtype) for _ in range(2))

    def product() -> None:
        for _ in range(10):
            left @ right
        if gpu:
            torch.cuda.synchronize()

    return 10 * 2 * size**3 / min(seconds_of(product) for _ in range(5))


def utilisation(bench: Bench, seconds: float, name: str) -> str:
    """The fewest operations that this training needs, over those that a product of two matrices does in that time."""
    size = 8192 if bench.gpu else 1024
    measured, needed = product_rate(bench.dtype, size), operations(bench) / seconds
    return (
        f"{name}: {needed / 1e9:,.0f} GFLOP/s of {measured / 1e9:,.0f} in a product of matrices of {size} "
        f"({str(bench.dtype).removeprefix('torch.')}): utilisation {100 * needed / measured:.0f} %"
    )


def print_profile(name: str, bench: Bench) -> None:
    """Shares of the time by kind of operation, and the share that the products would need at their measured rate."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    bench.run(name)
    seconds = statistics.median(bench.run(name) for _ in range(bench.options.repeats))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.gpu else [])]
    with profile(activities=activities) as profiled:
        bench.run(name)
    spent: dict[str, float] = {}
    for event in profiled.key_averages():
        if event.device_type != DeviceType.CPU:
            continue  # a kernel: its time is that of the operation that launched it, too
        kind = next((kind for kind, names in KINDS.items() if any(part in event.key for part in names)), "other")
        own = event.self_device_time_total if bench.gpu else event.self_cpu_time_total
        spent[kind] = spent.get(kind, 0.0) + own
    total = sum(spent.values())
    print(f"{name}, one epoch of {bench.useful} useful tokens in {seconds:.2f} s; {made_with(*PACKAGES)}")
    for kind, own in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"{100 * own / total:5.1f} %  {kind}")
    print(utilisation(bench, seconds, name))


def ours(bench: Bench, output: Path, *, shared: bool = True) -> float:
    policy = our_policy(bench)
    if not shared:
        policy.layout = "packed"
    return train_ours(bench, policy, output)


def our_policy(bench: Bench, *, gradient_checkpointing: bool = False) -> Any:
    """What `ple-train` trains, with a fresh adapter."""
    from ple_train.model import policy as policies

    def load(*_: Any, **__: Any) -> Any:
        return bench.load()

    with mock.patch.object(policies, "load_causal_lm", load) if bench.in_memory else contextlib.nullcontext():
        return policies.load_policy(
            str(bench.model),
            Trainable(lora_rank=RANK, lora_alpha=ALPHA, gradient_checkpointing=gradient_checkpointing),
            precision=bench.precision,
        )


def residual(bench: Bench, output: Path, *, kept: bool) -> float:
    """Ours by `ple-residual`, the start policy's log-probabilities kept, or computed in every step."""
    return train_ours(bench, our_policy(bench), output, objective="ple-residual", kept=kept)


def trusted(bench: Bench, output: Path, *, kept: bool) -> float:
    """Ours as printed with a trust region, the start policy's log-probabilities kept, or computed in every step."""
    from ple_train.train import STABLE_DELTA

    return train_ours(bench, our_policy(bench), output, delta=STABLE_DELTA, kept=kept)


def asked_once(bench: Bench, output: Path) -> float:
    """The pass over all rows with which a training begins where nothing is kept yet → its seconds."""
    from ple_train.measure.perplexity import negative_log_likelihoods
    from ple_train.model.batches import Sequence

    policy = our_policy(bench)
    rows = [(x, y) for x, *both in bench.pairs for y in both]
    sequences = [Sequence(np.array(x + y, dtype=np.int32), len(x), query=at // 2) for at, (x, y) in enumerate(rows)]
    began = time.perf_counter()
    with policy.as_start_policy():
        for _ in negative_log_likelihoods(policy, sequences, bench.options.microbatch_tokens):
            pass
    return time.perf_counter() - began


def train_ours(
    bench: Bench,
    policy: Any,
    output: Path,
    delta: float | None = None,
    *,
    saved: bool = True,
    objective: ObjectiveName = "ple",
    kept: bool = False,
) -> float:
    """One epoch of our loop, with a trust region where `delta` is given → its seconds. saved: the last step writes a
    checkpoint, as `ple-train` does. kept: the start policy's log-probabilities are there (any numbers will do)."""
    from ple_data.common.settings import Settings
    from ple_train.engine.checkpoint import Checkpoints
    from ple_train.engine.loop import make_accelerator, train_loop
    from ple_train.model.batches import Sequence
    from ple_train.objectives.pairs import PairObjective
    from ple_train.stream import Response

    margins = np.random.default_rng(1).normal(size=len(bench.pairs))
    steps = -(-len(bench.pairs) // BATCH)

    class Stream:
        steps_per_epoch = steps

        def batches(self, epoch: int, start: int) -> Any:
            for first in range(0, len(bench.pairs), BATCH):
                sequences = []
                for at, (x, *both) in list(enumerate(bench.pairs))[first : first + BATCH]:
                    for arm, y in zip(("y", "y_prompt"), both, strict=True):
                        sign = 1.0 if (arm == "y_prompt") == (margins[at] > 0) else -1.0
                        known = (margins[at], -3.0 * len(y) if kept else None)
                        tag = Response(arm, "rank" if abs(margins[at]) > 1 else "wsft", 0, sign / len(y), *known)
                        sequences.append(Sequence(np.array(x + y, dtype=np.int32), len(x), tag, query=at))
                bench.note_step_end()
                yield sequences, BATCH
            bench.note_step_end()

    settings = Loop(
        learning_rate=RATE, epochs=1, seed=0, precision=bench.precision,
        microbatch_tokens=bench.options.microbatch_tokens, max_grad_norm=1.0,
        checkpoint_every=10**9,
    )  # fmt: skip
    how = PairObjective(policy, delta, objective)
    checkpoints = Checkpoints(output, Settings(Loop, {}))
    accelerator = make_accelerator(None, output)
    began = time.perf_counter()
    with contextlib.nullcontext() if saved else mock.patch.object(Checkpoints, "save"):
        train_loop(accelerator, policy, policy.trainable(), Stream(), how, settings, checkpoints)
    return time.perf_counter() - began


def text(ids: list[int]) -> str:
    return " ".join("<end>" if at == 1 else f"w{at}" for at in ids)


def peer(bench: Bench, trainer_name: str, output: Path, rows: dict[str, list[str]], **arguments: Any) -> float:
    """A TRL trainer on rows of text; seconds from its first step to its last."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerFast, TrainerCallback

    class Clock(TrainerCallback):
        began = ended = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()
            bench.note_step_end()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            bench.note_step_end()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.ended = time.perf_counter()

    clock = Clock()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bench.model)  # AutoTokenizer takes a Qwen2's own rules
    assert tokenizer(text([2, 3])).input_ids == [2, 3]
    settings = getattr(trl, f"{trainer_name}Config")(
        output_dir=str(output), num_train_epochs=1, learning_rate=RATE, logging_steps=1000, save_strategy="no",
        report_to=[], use_cpu=not bench.gpu, bf16=bench.precision == "bf16", disable_tqdm=True,
        gradient_checkpointing=False, lr_scheduler_type="constant", dataloader_pin_memory=bench.gpu,
        **{"max_length": 2 * 4096, **arguments},
    )  # fmt: skip
    trainer = getattr(trl, f"{trainer_name}Trainer")(
        model=bench.load(),
        args=settings,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[clock],
    )
    trainer.train()
    return clock.ended - clock.began


def dpo(bench: Bench, output: Path) -> float:
    rows = {
        "prompt": [text(x) for x, _, _ in bench.pairs],
        "chosen": [" " + text(y[:-1]) for _, y, _ in bench.pairs],
        "rejected": [" " + text(y[:-1]) for _, _, y in bench.pairs],
    }
    return peer(bench, "DPO", output, rows, **batches(bench, 1))


def sft(bench: Bench, output: Path, **arguments: Any) -> float:
    sequences = [(x, y) for x, *both in bench.pairs for y in both]
    rows = {"prompt": [text(x) for x, _ in sequences], "completion": [" " + text(y[:-1]) for _, y in sequences]}
    return peer(bench, "SFT", output, rows, **(batches(bench, 2) | arguments))


def batches(bench: Bench, rows_a_pair: int) -> dict[str, int]:
    """A step of as many pairs as one of ours, held in parts."""
    held = bench.options.peer_batch
    return {"per_device_train_batch_size": rows_a_pair * held, "gradient_accumulation_steps": BATCH // held}


def sft_packed(bench: Bench, output: Path) -> float:
    """Rows as long as the longest sequence, at least 1,024 tokens; as many tokens at once and a step as the others."""
    longest = max(len(x) + len(y) for x, *both in bench.pairs for y in both)
    width = max(1024, longest)
    held = bench.options.peer_batch
    rows = max(1, round(bench.useful / len(bench.pairs) * held / width))
    packed = {"packing": True, "max_length": width, "per_device_train_batch_size": rows}
    return sft(bench, output, **packed, gradient_accumulation_steps=BATCH // held)


CONTENDERS: dict[str, Callable[[Bench, Path], float]] = {
    "ours": ours,
    "ours-unshared": lambda bench, output: ours(bench, output, shared=False),
    "residual": partial(residual, kept=False),
    "residual-kept": partial(residual, kept=True),
    "trusted": partial(trusted, kept=False),
    "trusted-kept": partial(trusted, kept=True),
    "asked-once": asked_once,
    "dpo": dpo,
    "sft": sft,
    "sft-packed": sft_packed,
}


def print_measured(name: str, bench: Bench) -> None:
    """One contender in this process: its seconds, its peak, and what is held with all imported and the model loaded."""
    if importlib.util.find_spec("trl"):
        importlib.import_module("trl.trainer.dpo_trainer")
        importlib.import_module("trl.trainer.sft_trainer")
    loaded = bench.loaded_alone()
    answer = {"seconds": bench.run(name), "tokens": bench.useful, "loaded": loaded, "peak": most_memory()}
    sys.stdout.write(json.dumps(answer) + "\n")  # in one piece: processes share the stream


def print_memory(names: list[str], repeats: int, folder: str) -> None:
    """Peak memory of each contender in a process of its own, less what the loaded model alone takes there."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            command = [sys.executable, "-m", "benchmarks.train", *sys.argv[1:], "--only", name, folder]
            answer = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
            found[name].append((answer["peak"] - answer["loaded"]) / 2**20)
    print(f"peak memory over a process that has loaded the model, median [least, most] of {repeats} processes")
    print(made_with(*PACKAGES))
    for name, peaks in found.items():
        ratios = sorted(own / other for own, other in zip(found[names[0]], peaks, strict=True))
        spread = f"{statistics.median(ratios):.3f} [{ratios[0]:.3f}, {ratios[-1]:.3f}]"
        print(f"{name:14} {statistics.median(peaks):8.0f} MiB   {names[0]} takes {spread} of it")


if __name__ == "__main__":
    main()
