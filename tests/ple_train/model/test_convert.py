"""`ple convert`, on small GGUF files that gguf's own writer makes here of tiny Llamas."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

import cli
from ple_data.common.models import check_model, end_ids, load_tokenizer
from schemas.holders import this_process
from tests.tiny import CHAT_TEMPLATE, policy_of, tiny_tokenizer

TEXT = "this story seems quite useful. The film of 1994 was not very bad"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""What GGUF calls the parts of a Llama's layer."""


def write_gguf(path: Path, model: Path, kind: str = "F16", **said: Any) -> Path:
    """The GGUF of a tiny policy. said: metadata of the tokenizer, None to leave one out; `architecture` another one."""
    causal, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    config, bpe = causal.config, json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = tokenizer.convert_ids_to_tokens(range(config.vocab_size))
    special = set(tokenizer.all_special_tokens)
    values = {
        "architecture": "llama",
        "rope_theta": config.rope_parameters["rope_theta"],
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [3 if token in special else 1 for token in tokens],
        "merges": [" ".join(pair) for pair in bpe["merges"]],
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "padding_token_id": tokenizer.pad_token_id,
    }

    def as_llama_cpp_has_it(name: str, array: np.ndarray) -> np.ndarray:
        if "q_proj" not in name and "k_proj" not in name:
            return array
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        return array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)  # halves to neighbours

    arrays = {name: as_llama_cpp_has_it(name, weight.numpy()) for name, weight in causal.state_dict().items()}
    return write_parts(path, config, arrays, NAMES, kind, **(values | said))


def write_parts(
    path: Path, config: Any, arrays: dict[str, np.ndarray], names: dict[str, str], kind: str, **said: Any
) -> Path:
    """A GGUF of weights by the names that transformers has. names: what GGUF calls the parts of a layer."""
    writer = gguf.GGUFWriter(path, said.pop("architecture"))
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if key_length := said.pop("key_length", None):
        writer.add_key_length(key_length)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(said.pop("rope_theta"))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for key, value in said.items():
        if value is None:
            continue
        if isinstance(value, list):
            writer.add_array(f"tokenizer.ggml.{key}", value)
        elif isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"tokenizer.ggml.{key}", value)
        else:
            writer.add_string("tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}", value)
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, array in arrays.items():
        _, _, inner = name.removesuffix(".weight").partition("layers.")
        layer, _, part = inner.partition(".")
        place = f"blk.{layer}.{names[part]}.weight" if inner else f"{whole[name.removesuffix('.weight')]}.weight"
        if array.ndim == 1:
            writer.add_tensor(place, array)
        elif kind == "F16":
            writer.add_tensor(place, array.astype(np.float16))
        else:
            quantized = getattr(gguf.GGMLQuantizationType, kind)
            writer.add_tensor(place, gguf.quants.quantize(array, quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def convert(*words: object) -> tuple[int, str]:
    found = CliRunner().invoke(cli.ple, ["convert", *map(str, words)])
    return found.exit_code, found.stderr.strip()


def logits(model: Path) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(model)(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(model)(ids).logits


@pytest.mark.parametrize(("kind", "off"), [("F16", 0.01), ("Q8_0", 0.2)])
def test_the_converted_model_computes_the_same(kind: str, off: float, policy: Path, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", policy, kind)
    code, said = convert(file, tmp_path / "new" / "model")
    assert code == 0, said
    assert ("lost: the weights were quantized" in said) == (kind == "Q8_0")
    assert f"responses end with {load_tokenizer(policy).eos_token}" in said
    model = tmp_path / "new" / "model"
    check_model(model)
    assert [path.name for path in model.parent.iterdir()] == ["model"]
    assert (logits(model) - logits(policy)).abs().max() < off
    assert "license: apache-2.0" in (model / "README.md").read_text()
    before = {path.name: path.stat().st_mtime_ns for path in model.iterdir()}
    assert convert(file, model) == (0, f"{model} is this file's already; nothing to do")
    assert {path.name: path.stat().st_mtime_ns for path in model.iterdir()} == before


def test_what_the_file_says_of_its_tokenizer_is_mended(tmp_path: Path) -> None:
    """BOS before each text, digits apart, a second token that ends a turn; the chat template stays."""
    tokenizer = tiny_tokenizer(special=("<|over|>",), vocab=400)
    source = policy_of(tmp_path / "source", tokenizer)
    over = tokenizer.convert_tokens_to_ids("<|over|>")
    said = {"add_bos_token": True, "pre": "smollm", "eot_token_id": over, "chat_template": CHAT_TEMPLATE}
    code, told = convert(write_gguf(tmp_path / "m.gguf", source, **said), tmp_path / "model")
    assert code == 0, told
    for line in (
        f"mended: {tokenizer.bos_token} stands before each text",
        "mended: each digit is a token of its own, as the file says (smollm)",
        "chat template: kept",
    ):
        assert line in told
    found = load_tokenizer(tmp_path / "model")
    assert found("a")["input_ids"][0] == found.bos_token_id
    assert found.tokenize("of 1994") == [*found.tokenize("of"), "Ġ", "1", "9", "9", "4"]
    assert found.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False).endswith("<user>a</user>\n")
    assert end_ids(tmp_path / "model", found) == (found.eos_token_id, over)


def test_what_ends_a_response_is_what_the_file_names(tmp_path: Path) -> None:
    """transformers 5.17 took a default of its own."""
    source = policy_of(tmp_path / "source", tokenizer := tiny_tokenizer(special=("<|over|>",), vocab=400))
    over = tokenizer.convert_tokens_to_ids("<|over|>")
    code, told = convert(write_gguf(tmp_path / "m.gguf", source, eos_token_id=over), tmp_path / "model")
    assert (code, told.splitlines()[-1]) == (0, "responses end with <|over|>")
    assert load_tokenizer(tmp_path / "model").eos_token_id == over


def test_what_is_lost_is_told(policy: Path, tmp_path: Path) -> None:
    said = {"pre": "some-other", "chat_template": "{{ raise_exception('no') }}"}
    code, told = convert(write_gguf(tmp_path / "m.gguf", policy, **said), tmp_path / "model")
    assert code == 0, told
    assert "lost: how texts are cut into words (some-other)" in told
    assert "lost: its chat template, which does not render here" in told
    assert load_tokenizer(tmp_path / "model").chat_template is None


def test_what_is_no_model_is_one_sentence(policy: Path, tmp_path: Path) -> None:
    good = write_gguf(tmp_path / "good.gguf", policy)
    cut, text = tmp_path / "cut.gguf", tmp_path / "text.gguf"
    cut.write_bytes(good.read_bytes()[:-5000])
    text.write_text("hello")
    head = tmp_path / "head.gguf"
    head.write_bytes(good.read_bytes()[:300])
    merges = json.loads(AutoTokenizer.from_pretrained(policy).backend_tokenizer.to_str())["model"]["merges"]
    few = [" ".join(pair) for pair in merges[:5]]
    cases = {
        tmp_path / "none.gguf": "is no file: give a GGUF file",
        text: "is no GGUF file",
        cut: "cut or damaged",
        head: "cut or damaged",
        write_gguf(tmp_path / "strange.gguf", policy, architecture="strange"): "strange",
        write_gguf(tmp_path / "endless.gguf", policy, eos_token_id=None): "names no token that ends a response",
        write_gguf(tmp_path / "merges.gguf", policy, merges=None): "tokenizer",
        write_gguf(tmp_path / "few.gguf", policy, merges=few): "loses some of its merges",
    }
    for file, expected in cases.items():
        code, told = convert(file, tmp_path / "model")
        assert code == 2, told
        assert told.startswith("error: ")
        assert expected in told
        assert str(file) in told
        assert len(told.splitlines()) == 1, told
        assert not (tmp_path / "model").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_folder_of_something_else_is_left_alone(policy: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    code, told = convert(write_gguf(tmp_path / "m.gguf", policy), tmp_path / "model")
    assert code == 2
    assert "exists and was not made of this file" in told
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["mine.txt"]


def test_what_a_killed_conversion_left_is_removed(policy: Path, tmp_path: Path) -> None:
    token = this_process().token
    machine, pid, start = token.split("-")
    dead, live = (tmp_path / f".model.{name}-{'0' * 32}.tmp" for name in (f"{machine}-{pid}-{int(start) + 1}", token))
    for folder in (dead, live):
        (folder / "sub").mkdir(parents=True)
    code, told = convert(write_gguf(tmp_path / "m.gguf", policy), tmp_path / "model")
    assert code == 0, told
    assert live.exists()
    assert not dead.exists()
