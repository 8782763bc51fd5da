"""Small models of real architecture and the files that commands need, written to a folder: nothing is downloaded.

A world is a policy, a reward model, queries with references, and rows for SFT and for reward models. Runs nothing.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.tiny import corpus, tiny_reward, tiny_tokenizer

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
SMALL_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}
PIECE = 1 << 24


@dataclass(frozen=True)
class World:
    """A folder with all that is needed; `queries` of them are in its file.

    steps: at least so many of a training that is killed after its first checkpoint: enough to be alive then.
    """

    name: str
    folder: Path
    queries: int
    new_tokens: int
    steps: int

    @property
    def model(self) -> str:
        return str(self.folder / "model")

    @property
    def reward(self) -> str:
        return str(self.folder / "judge")

    @property
    def data(self) -> str:
        return str(self.folder / "data")

    def file(self, name: str) -> str:
        return str(self.folder / f"{name}.jsonl")


def make_world(name: str, folder: Path, *, small: bool, given: Path | None = None) -> World:
    """A `llama` with grouped heads, a `qwen2` with tied embeddings, or the `given` model."""
    sizes = {"queries": 12, "new_tokens": 6, "steps": 12} if small else {"queries": 48, "new_tokens": 32, "steps": 30}
    world = World(name, folder, **sizes)
    folder.mkdir(parents=True)
    if given is None:
        write_random(name, Path(world.model), SMALL_SIZES if small else SIZES)
    else:
        bring(given, Path(world.model))
    tiny_reward(world.reward)
    write_rows(world)
    return world


def write_random(name: str, directory: Path, sizes: dict[str, int]) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    tokenizer = tiny_tokenizer(chat=name == "qwen2")
    kinds: dict[str, tuple[Any, bool]] = {"llama": (LlamaConfig, False), "qwen2": (Qwen2Config, True)}
    kind, tied = kinds[name]
    config = kind(
        **sizes, **HEADS, vocab_size=len(tokenizer), tie_word_embeddings=tied, max_position_embeddings=2048,
        initializer_range=0.05, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_rows(world: World) -> None:
    """Plain sentences, halved: the first half asks, the second answers."""
    texts = [text.rsplit(" ", 1) for text in corpus()[:: len(corpus()) // world.queries][: world.queries]]
    asked = [(f"Say it: {first}", f" {last}") for first, last in texts]
    rows: dict[str, list[dict[str, Any]]] = {
        "queries": [{"id": f"q{n}", "x": x, "reference": y} for n, (x, y) in enumerate(asked)],
        "sft": [{"x": x, "y": y} for x, y in asked],
        "preferences": [{"prompt": x, "chosen": y, "rejected": " no."} for x, y in asked],
        "labels": [{"text": x + y, "label": n % 2} for n, (x, y) in enumerate(asked)],
    }
    for name, lines in rows.items():
        Path(world.file(name)).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def bring(given: Path, directory: Path) -> None:
    """A model folder as it is, or a .gguf file (or a folder with its pieces, joined in the order of their names)."""
    if (given / "config.json").exists():
        shutil.copytree(given, directory)
        return
    directory.mkdir()
    joined = directory / "model.gguf"
    with joined.open("wb") as whole:
        for piece in pieces(given):
            with piece.open("rb") as part:
                shutil.copyfileobj(part, whole, PIECE)
    unpack(joined, directory)
    joined.unlink()


def pieces(given: Path) -> Iterator[Path]:
    """Raises FileNotFoundError where there are none."""
    if given.is_file():
        yield given
        return
    found = sorted(file for file in given.glob("*.gguf*") if file.is_file())
    if not found:
        raise FileNotFoundError(f"{given}: neither a model folder (config.json), nor a .gguf file or its pieces")
    yield from found


def unpack(gguf: Path, directory: Path) -> None:
    """Quantised weights as plain ones, which every command can load. Needs the package gguf."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)
