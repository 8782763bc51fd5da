"""`ple convert` on the GGUF of a tiny Gemma 3: SentencePiece without merges, norms kept as weight + 1, BOS needed."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, trainers
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from ple_data.common.models import check_model, load_tokenizer
from tests.ple_train.model.test_convert import NAMES, TEXT, convert, write_parts
from tests.tiny import corpus

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
PRINTED = "".join(chr(code) for code in range(ord("!"), ord("~") + 1))
NORMS = {
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def test_a_gemma_computes_the_same_and_begins_with_bos(tmp_path: Path) -> None:
    learned = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=list(PRINTED))
    learned.train_from_iterator([text.replace(" ", "▁") for text in corpus()], trainer)
    merged = sorted(learned.get_vocab(), key=learned.token_to_id)  # in the order of their merges
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *merged]
    config = Gemma3TextConfig(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=6,  # the last one looks at all positions, with its own rope_theta
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=256,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
    )
    torch.manual_seed(0)
    source = Gemma3ForCausalLM(config).eval()
    for name, weight in source.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, std=0.1)
    arrays = {name: (weight + ("norm" in name)).detach().numpy() for name, weight in source.named_parameters()}
    said = {
        "architecture": "gemma3",
        "key_length": config.head_dim,
        "rope_theta": 1e6,
        "model": "llama",
        "tokens": tokens,
        "scores": [float(-at) for at in range(len(tokens))],
        "token_type": [3] * len(SPECIAL) + [6] * 256 + [1] * (len(tokens) - len(SPECIAL) - 256),
        "padding_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "unknown_token_id": 3,
        "add_bos_token": True,
    }
    file = write_parts(tmp_path / "m.gguf", config, arrays, NAMES | NORMS, "F16", **said)
    code, told = convert(file, tmp_path / "model")
    assert code == 0, told
    assert "mended: <bos> stands before each text" in told
    check_model(tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    assert tokenizer.tokenize(TEXT) == learned.encode(TEXT.replace(" ", "▁")).tokens
    ids = tokenizer(f"{TEXT} é", return_tensors="pt").input_ids
    assert tokenizer.convert_ids_to_tokens(ids[0, -2:]) == ["<0xC3>", "<0xA9>"]
    assert ids[0, 0] == tokenizer.bos_token_id
    with torch.no_grad():
        off = (AutoModelForCausalLM.from_pretrained(tmp_path / "model")(ids).logits - source(ids).logits).abs().max()
    assert off < 0.01 < source(ids).logits.std()
