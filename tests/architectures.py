"""Do sampling and training agree about a model? Every causal language model of transformers, tiny and random, is asked.

`python -m tests.architectures` asks all of them and writes docs/models.md; tests/ple_train/model/test_architectures.py
asks some in every run.
"""

import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

from tests import tiny

SMALL = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
OWN: dict[str, dict] = {
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    "mistral": {"sliding_window": 8},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
}
"""What an architecture needs beside the common sizes: its own names for them, windows shorter than the sequences."""
LARGEST = 5_000_000
"""Parameters of what is tried: the common sizes make no tiny model of some architectures."""
TOLERANCE = 1e-5
"""Nats, in float32."""
PROMPTS = ["the film", "this story was", "a good actor needs the answer", "my friend is not kind of sad."]
NEW = 12


class Untried(Exception):
    """There is no tiny model of this kind here."""


def make(kind: str, directory: Path) -> None:
    """A tiny random model of a kind with a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **SMALL | OWN.get(kind, {}))
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > LARGEST:
        raise Untried(f"{size:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4.0)  # else a context would hardly matter
    model.save_pretrained(directory)
    tiny.tiny_tokenizer(vocab=384).save_pretrained(directory)


def sampled(directory: Path, batch_size: int) -> dict[int, tuple[list[int], list[int], list[float]]]:
    """Prompt, response and log-probabilities as `hf` samples them, that many rows at a time."""
    from ple_data.common.models import load_tokenizer
    from ple_data.engines import EngineSpec, Request, Sampling, make_engine

    tokenizer = load_tokenizer(directory)
    spec = EngineSpec(str(directory), None, None, tokenizer, (1,), 64, dtype="float32")
    unit = [Request(at, tuple(tokenizer(text).input_ids), at) for at, text in enumerate(PROMPTS)]
    engine = make_engine("hf", spec, {"batch_size": batch_size})
    found = engine.sample(iter([unit]), Sampling(max_new_tokens=NEW))
    return {request.key: (list(request.prompt_ids), done.ids, done.logps) for request, done in found}


def trained(directory: Path, rows: list[tuple[list[int], list[int]]]) -> list[list[float]]:
    """Log-probabilities of responses as training computes them."""
    import numpy as np

    from ple_train.model.batches import Sequence
    from ple_train.model.policy import load_policy
    from schemas.options import Trainable

    policy = load_policy(str(directory), Trainable(full=True), precision="float32")
    sequences = [Sequence(np.array([*x, *y], dtype=np.int32), len(x)) for x, y in rows]
    tokens = policy.collate(sequences)
    with torch.no_grad():
        return [part.tolist() for part in policy(tokens).split(tokens.lengths.tolist())]


def difference(kind: str, directory: Path) -> float:
    """The largest difference in nats between sampling in a batch, alone, and training. Raises what they raise."""
    make(kind, directory)
    together, alone = sampled(directory, 8), sampled(directory, 1)
    if any(together[at][1] != alone[at][1] for at in together):
        return float("inf")
    rows = [together[at] for at in range(len(PROMPTS))]
    ways = [[logps for *_, logps in rows], [alone[at][2] for at in range(len(PROMPTS))]]
    ways.append(trained(directory, [(x, y) for x, y, _ in rows]))
    flat = [torch.tensor([value for logps in way for value in logps]) for way in ways]
    return max((flat[0] - other).abs().max().item() for other in flat[1:])


def main(names: list[str]) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    found = defaultdict(list)
    for kind in names or sorted(known):
        with tempfile.TemporaryDirectory() as directory:
            try:
                apart = difference(kind, Path(directory) / "model")
                verdict = "agrees" if apart <= TOLERANCE else f"differs by {apart:.2g}"
            except Exception as error:
                verdict = f"{type(error).__name__}: {str(error).replace(directory, '')[:300]}"
        found[verdict].append(kind)
        print(kind, verdict, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
