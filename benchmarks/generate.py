"""How much slower is ple-gen than vLLM itself? One bare `LLM.generate` against a whole `generate` call, side by side.

Both sample the same prompts (x and [p, x] of every query) with the same parameters on one running engine; engine start
is excluded, everything else of ple-gen is counted: reading queries, rendering, digests, commits with fsync. The two
alternate (which one is first, too), and the prefix cache is emptied before each. Run it in the environment with vLLM:

    python -m benchmarks.generate --queries 2048 --repeats 3
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.side_by_side import made_with
from schemas.options import Gen

WORDS = ["the", "a", "film", "story", "actor", "scene", "was", "is", "seems", "great", "bad", "funny", "slow", "never"]


def write_model(directory: Path, hidden: int, layers: int, vocab: int) -> None:
    """A random Llama with a byte-level tokenizer: speed does not depend on what it says."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, head_dim=64, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    fast.save_pretrained(directory)


def write_queries(path: Path, count: int) -> None:
    """Queries of 8 to 39 words, all different."""
    import random

    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=8 + index % 32)) for index in range(count)]
    path.write_text("".join(json.dumps({"id": str(i), "x": line}) + "\n" for i, line in enumerate(lines)))


def main() -> None:
    """Print one line of JSON: seconds of both, the ratio of each repeat, and their median."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model directory; by default a random Llama is written")
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--engine-arg", action="append", default=[])
    options = parser.parse_args()

    import vllm

    from ple_data.engines import Sampling, make_engine
    from ple_data.sampling import generate as stage

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = Path(options.model or work / "model")
        if not options.model:
            write_model(model, options.hidden, options.layers, options.vocab)
        write_queries(work / "queries.jsonl", options.queries)
        sampling = Sampling(max_new_tokens=options.max_new_tokens)
        engine: Any = None
        requests: list[Any] = []

        def shared_engine(name: str, spec: Any, arguments: Any) -> Any:
            nonlocal engine
            if engine is None:
                engine = make_engine(name, spec, arguments)
            return _Recorded(engine, requests)

        stage.make_engine = shared_engine  # the one place where generate() starts an engine

        def ours(repeat: str) -> tuple[float, int]:
            requests.clear()
            begin = time.perf_counter()
            asked = Gen(
                model=str(model), data=work / repeat, queries=str(work / "queries.jsonl"), principles="imdb", round=0,
                **sampling.values(), engine="vllm", engine_arg=options.engine_arg, dtype=options.dtype,
            )  # fmt: skip
            summary = stage.generate(asked)
            return time.perf_counter() - begin, summary.tokens

        def bare() -> float:
            prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
            params = [engine.sampling_params(request.seed, sampling) for request in requests]
            begin = time.perf_counter()
            engine.llm.generate(prompts, params, use_tqdm=False)
            return time.perf_counter() - begin

        ours("warm-up")
        times: list[tuple[float, float]] = []
        tokens = 0
        for repeat in range(options.repeats):
            seconds = {}
            for which in ("bare", "ours") if repeat % 2 == 0 else ("ours", "bare"):
                engine.llm.reset_prefix_cache()
                if which == "bare":
                    seconds[which] = bare()
                else:
                    seconds[which], tokens = ours(str(repeat))
            times.append((seconds["bare"], seconds["ours"]))
        engine.close()
        ratios = [our / bare for bare, our in times]
        print(
            json.dumps(
                {
                    "made_with": f"{made_with('torch', 'transformers')}, vllm {vllm.__version__}",
                    "prompts": len(requests),
                    "tokens": tokens,
                    "bare_seconds": [round(bare, 2) for bare, _ in times],
                    "ple_gen_seconds": [round(our, 2) for _, our in times],
                    "ratios": [round(ratio, 3) for ratio in ratios],
                    "median_ratio": round(statistics.median(ratios), 3),
                }
            )
        )


class _Recorded:
    """The shared engine, kept open, with the requests that went through it written down."""

    def __init__(self, engine: Any, requests: list[Any]) -> None:
        self._engine, self._requests = engine, requests

    def sample(self, units: Any, sampling: Any) -> Any:
        def recorded() -> Any:
            for unit in units:
                self._requests.extend(unit)
                yield unit

        yield from self._engine.sample(recorded(), sampling)

    def close(self) -> None:
        """The benchmark closes the engine."""


if __name__ == "__main__":
    main()
