"""Do sampling and training agree about a model? Every causal language model of transformers, tiny and random, is asked.

`python -m tests.architectures` asks all of them and writes docs/models.md; tests/ple_train/model/test_architectures.py
asks some in every run.
"""

import sys
import tempfile
from pathlib import Path

import torch

from schemas.errors import PleError
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
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
BART = {
    "d_model": 64,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
}
OWN: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    "bart": BART,
    "blenderbot-small": BART,
    "codegen": {"n_positions": 256, "rotary_dim": 8},
    "deepseek_v3": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, **MLA},
    "dots1": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, **EXPERTS},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "gptj": {"rotary_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "minicpm3": MLA,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "glm4_moe": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, **EXPERTS},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, **EXPERTS},
    "minimax_m2": {"num_local_experts": 4, **EXPERTS},
    "mbart": BART,
    "marian": BART,
    "pegasus": BART,
    "youtu": MLA,
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    "mistral": {"sliding_window": 8},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
}
"""What an architecture needs beside the common sizes, by its own names; windows are shorter than the sequences. None:
left out."""
PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
HEAD = """# Models

What holds for every model directory and hub id, in every command. Each rule ends in one sentence, before the first
step.

- **No weight is made up, and none is left out.** A weight that the files lack, or have in another shape, is named and
  refused; so is one of a layer that the configuration has no place for. For adapters the same holds, biases included,
  before `--engine vllm` starts too. The head that `ple reward` and PPO's critic add is new, and one that a command has
  no use for may be there.
- **Safetensors alone.** An index that names a pickle or a file elsewhere is refused before anything is opened. Code of
  a model's repository is never run. GGUF is for `ple convert`, quantized weights (GPTQ, AWQ) for `--engine vllm` alone.
- **One attention.** Sampling with `hf`, scoring and training run with the same one. Where attention has a cap (Gemma 2)
  that is `eager`: `sdpa` leaves the cap out.
- **One count of positions**, in sampling, scoring and training. RoBERTa's two rows that are no positions are not
  counted. With YaRN the limit is the original length times the factor, where `max_position_embeddings` is not larger;
  with linear scaling too, where the configuration names the original length, and else `max_position_embeddings`. With
  longrope or dynamic NTK the limit is the original length: beyond it the numbers of a row would depend on the longest
  row of its batch.
- **Sampling is tried** when the `hf` engine starts: its log-probabilities against those that the model gives to the
  whole sequence. Where rows of a batch disturb one another, they are sampled one by one, which is said. Where that is
  not enough, the model is refused.
- **Padding is masked**, so a pad token without a row in the embedding does no harm.
- **vLLM has no adapters for some kinds of models**, GPT-2 among them. `--engine vllm` says so when it starts with one;
  use `--engine hf`.
- **Adapters** are plain LoRA (rsLoRA and DoRA too): a setting of `adapter_config.json` that is not known to be
  harmless, such as `kasa_config` or `layer_replication`, is refused. One that trained biases, or whose
  `init_lora_weights` rewrote the base (PiSSA, OLoRA, LoftQ), samples with `hf`, but training does not go on from it:
  with it off, the model is not the start policy. `--full` merges it. Where the base cannot be made again
  (`pissa_niter`, CorDA, LoRA-GA), it is refused. An adapter on an embedding that is the output layer too is merged into
  the embedding alone.

## Which architectures

Every causal language model of transformers {version} of which there is a tiny random form is asked (float32, CPU): are
the log-probabilities of `hf` in a batch those of `hf` one by one, and those of training, to 1e-5 nats? Of {tried} that
were tried {agree} agree. `python -m tests.architectures` makes this page.

| architecture | |
| --- | --- |
"""
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

    sizes = {name: size for name, size in (SMALL | OWN.get(kind, {})).items() if size is not None}
    config = AutoConfig.for_model(kind, **sizes)
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


def difference(directory: Path) -> float:
    """The largest difference in nats between sampling in a batch, alone, and training. Raises what they raise."""
    together, alone = sampled(directory, 8), sampled(directory, 1)
    if any(together[at][1] != alone[at][1] for at in together):
        return float("inf")
    rows = [together[at] for at in range(len(PROMPTS))]
    ways = [[logps for *_, logps in rows], [alone[at][2] for at in range(len(PROMPTS))]]
    ways.append(trained(directory, [(x, y) for x, y, _ in rows]))
    flat = [torch.tensor([value for logps in way for value in logps]) for way in ways]
    return max((flat[0] - other).abs().max().item() for other in flat[1:])


def verdict(kind: str) -> str:
    """agrees, differs by how much, or in which sentence the kind is refused; `untried` without a tiny model of it."""
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        try:
            make(kind, model)
        except Exception as error:  # the code of any architecture runs here
            return f"untried ({type(error).__name__})"
        try:
            apart = difference(model)
        except PleError as error:
            return "refused: " + str(error).replace(str(model), "MODEL")
        return "agrees" if apart <= TOLERANCE else f"differs by {apart:.1g} nats"


def main() -> None:
    from transformers import __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as kinds

    rows = []
    for kind in sys.argv[1:] or sorted(kinds):
        said = verdict(kind)
        print(kind, said, file=sys.stderr, flush=True)
        rows.append((kind, said.replace("|", "/")))
    if not sys.argv[1:]:
        tried = [f"| {kind} | {said} |\n" for kind, said in rows if not said.startswith("untried")]
        agree = sum(said == "agrees" for _, said in rows)
        PAGE.write_text(HEAD.format(version=__version__, agree=agree, tried=len(tried)) + "".join(tried))


if __name__ == "__main__":
    main()
