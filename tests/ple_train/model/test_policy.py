"""The policy's log-probabilities, on real architectures, against the model's own logits; LoRA, drift, loading."""

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from ple_train.model import policy as policies
from ple_train.model import probe
from ple_train.model.batches import Sequence, collate_padded
from ple_train.model.policy import Policy, load_causal_lm, load_policy
from schemas.errors import UsageError
from schemas.options import Trainable
from tests import tiny

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "mistral, sliding window": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)),
    "gemma2, softcaps": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **SMALL,
            sliding_window=4,
            final_logit_softcapping=5.0,
            attn_logit_softcapping=0.5,
            attn_implementation="eager",
        )
    ),
    "cohere, logit scale": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
    "granite, logits scaling": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=3.0)),
}


def own_logps(model, sequence: Sequence) -> torch.Tensor:
    """Response log-probabilities from the model's own logits, one sequence alone."""
    ids = torch.from_numpy(sequence.ids).long()
    with torch.no_grad():
        logps = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    targets = ids[sequence.prompt :]
    return logps[sequence.prompt - 1 : -1].gather(1, targets[:, None]).squeeze(1)


def sequences(vocabulary: int) -> list[Sequence]:
    """Three responses to one query, and one to each of two others."""
    numbers = np.random.default_rng(0)

    def ids(size: int) -> np.ndarray:
        return numbers.integers(3, vocabulary, size).astype(np.int32)

    x = ids(6)
    siblings = [Sequence(np.concatenate([x, ids(size)]), 6, query=0) for size in (13, 3, 9)]
    return [*siblings, Sequence(ids(5), 1, query=1), Sequence(ids(11), 9, query=2)]


@pytest.mark.parametrize("name", MODELS)
def test_logps_of_shared_and_of_padded_rows_equal_the_models_own_one_by_one(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    expected = torch.cat([own_logps(model, s) for s in sequences(97)])
    policy = Policy(model).eval()
    policy.prepare("auto")
    assert policy.layout == ("padded" if name == "gemma2, softcaps" else "shared")
    with torch.no_grad():
        found = policy(policy.collate(sequences(97)))
        padded = policy(collate_padded(sequences(97), policy.device))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(padded.double(), expected, rtol=1e-4, atol=1e-4)


def test_llama_is_packed(policy):
    assert load_policy(str(policy)).layout == "shared"


FLAT = SMALL | {"initializer_range": 0.02}
"""Fresh weights: logits so flat that a leak hardly shows in log-probabilities."""
LEAKING = {
    "bloom, positions by place": lambda: BloomForCausalLM(BloomConfig(**FLAT, n_layer=2, n_head=4)),
    "lfm2, convolution": lambda: Lfm2ForCausalLM(Lfm2Config(**FLAT, layer_types=["conv", "full_attention"])),
    "qwen2-moe, window in the mask": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **FLAT,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            use_sliding_window=True,
            sliding_window=32,
            max_window_layers=1,
        )
    ),
}


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", LEAKING)
def test_models_whose_sequences_see_one_another_are_padded(name, precision, monkeypatch):
    answers, autocast = probe.answers, set()
    monkeypatch.setattr(probe, "answers", lambda *a: (autocast.add(torch.is_autocast_enabled("cpu")), answers(*a))[1])
    policy = Policy(LEAKING[name]().eval())
    policy.prepare("auto", precision)
    assert policy.layout == "padded"
    assert autocast == {precision == "bf16"}, "asked in the precision that it trains in"


def test_gpt_neo_separates_sequences_by_position_so_prompts_are_not_shared():
    """It takes positions that start again for a new sequence: a second response would not see its prompt."""
    settings = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 32}
    model = GPTNeoForCausalLM(GPTNeoConfig(**FLAT, **settings)).eval()
    policy = Policy(model)
    policy.prepare("auto", "bf16")
    assert policy.layout == "packed"


def test_an_unusable_first_choice_leaves_our_packed_attention(policy, monkeypatch):
    """flash-attention is installed, but not for this model: what comes next is not padding."""
    candidates = policies._candidates
    monkeypatch.setattr(policies, "_candidates", lambda *a: [("flash_attention_2", "packed"), *candidates(*a)])
    loaded = load_policy(str(policy))
    assert loaded.layout == "shared"
    assert loaded.model.config._attn_implementation == "ple_packed"


@pytest.mark.parametrize(("attention", "layout"), [("ple_packed", "shared"), ("eager", "packed"), ("sdpa", "packed")])
def test_an_attention_that_is_asked_for_is_taken(policy, attention, layout):
    """transformers' own keep sequences apart by a mask, which it makes from positions that start again."""
    loaded = load_policy(str(policy), Trainable(attention=attention))
    assert (loaded.model.config._attn_implementation, loaded.layout) == (attention, layout)


def test_bf16_stays_near_float32_and_runs_in_bf16(policy, adapter, monkeypatch):
    seen = []
    original = policies.token_logps

    def token_logps(hidden, *rest, **more):
        seen.append(hidden.dtype)
        return original(hidden, *rest, **more)

    monkeypatch.setattr(policies, "token_logps", token_logps)
    found = {}
    for precision in ("float32", "bf16"):
        loaded = load_policy(str(policy), adapter=str(adapter), precision=precision)
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            found[precision] = loaded(loaded.collate(sequences(300)))
        assert loaded.layout == "shared"
        assert seen[0] == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert 0 < (found["bf16"] - found["float32"]).abs().mean() < 0.05


def test_rounding_of_sure_models_is_no_reason_to_pad(policy):
    """bfloat16 moves log-probabilities of -38 by more than 0.1 nats on average: real models have as large ones."""
    model = LlamaForCausalLM.from_pretrained(policy, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    sure = Policy(model)
    with torch.no_grad():
        own = probe.answers(sure._one_by_one, sure.vocabulary)
    sure.prepare("auto", "bf16")
    with torch.no_grad():
        found = probe.answers(lambda sequences: sure(sure.collate(sequences)), sure.vocabulary)
    assert sure.layout == "shared"
    assert (found - own).abs().mean() > 0.1
    assert not probe.agree(found, own.roll(1, 0), "bf16")  # the answers to other prompts


def test_an_output_layer_that_hidden_states_do_not_explain_is_refused(policy):
    class Shifted(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            found.logits = found.logits.cumsum(-1)
            return found

    with pytest.raises(UsageError, match="not supported"):
        Policy(Shifted.from_pretrained(policy)).prepare("auto")


def test_a_fresh_adapter_changes_nothing_and_trains_all_linear_modules_alone(policy):
    model = LlamaForCausalLM.from_pretrained(policy)
    expected = torch.cat([own_logps(model, s) for s in sequences(300)])
    fresh = load_policy(str(policy))
    with torch.no_grad():
        found = fresh(fresh.collate(sequences(300)))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    trained = {name.split(".")[-4] for name in fresh.trainable() if "lora_A" in name}
    assert trained == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all("lora_" in name for name in fresh.trainable())


def test_the_start_policy_is_the_model_with_its_adapter_off(policy, adapter):
    plain, adapted = load_policy(str(policy)), load_policy(str(policy), adapter=str(adapter))
    tokens = plain.collate(sequences(300))
    with torch.no_grad():
        start, moved = plain(tokens), adapted(tokens)
    with adapted.as_start_policy():
        off = adapted(tokens)
    torch.testing.assert_close(off, start)
    assert (moved - start).abs().max() > 1e-3


def test_gradient_checkpointing_gives_the_same_gradients(policy, adapter):
    grads = []
    for checkpointing in (False, True):
        loaded = load_policy(str(policy), Trainable(gradient_checkpointing=checkpointing), adapter=str(adapter)).train()
        (-loaded(loaded.collate(sequences(300))).sum()).backward()
        grads.append({name: p.grad for name, p in loaded.trainable().items()})
    torch.testing.assert_close(grads[0], grads[1])


def test_an_adapter_of_another_base_is_refused(tmp_path, policy):
    other = tiny.tiny_policy(tmp_path / "other", hidden=96)
    foreign = tiny.tiny_adapter(other, tmp_path / "foreign")
    with pytest.raises(UsageError, match="foreign"):
        load_policy(str(policy), adapter=str(foreign))


DROPPING = {
    "gpt2, modules": MODELS["gpt2"],
    "opt, numbers": lambda: OPTForCausalLM(
        OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, dropout=0.5, attention_dropout=0.5)
    ),
    "falcon, config": lambda: FalconForCausalLM(
        FalconConfig(
            vocab_size=97,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_dropout=0.5,
            attention_dropout=0.5,
        )
    ),
    "mixtral, jitter": lambda: MixtralForCausalLM(
        MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1, router_jitter_noise=0.5)
    ),
}


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_is_off_so_that_a_fresh_adapter_has_no_drift(tmp_path, name):
    """With it, the start policy would seem to drift from itself, and batching would change what is learned."""
    DROPPING[name]().save_pretrained(tmp_path / "model")
    loaded = load_policy(str(tmp_path / "model")).train()
    tokens = loaded.collate(sequences(97))
    now = loaded(tokens).detach()
    with loaded.as_start_policy():
        torch.testing.assert_close(loaded(tokens), now, rtol=0, atol=0)


def test_an_unknown_attention_is_refused(policy):
    with pytest.raises(UsageError, match="--attention no_such_attention"):
        load_policy(str(policy), Trainable(attention="no_such_attention"))


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(UsageError, match="config"):
        load_policy(str(tmp_path))


# Adapters and the start policy


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
def test_merging_on_a_tied_embedding_leaves_the_output_layer_as_it_was(tmp_path):
    tied = tiny.tiny_policy(tmp_path / "tied", tie_word_embeddings=True)
    adapter = tiny.tiny_adapter(tied, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    ids = torch.tensor([[5, 6, 7, 8]])
    apart = load_policy(str(tied), adapter=str(adapter)).model(ids).logits
    whole = load_policy(str(tied), Trainable(full=True), adapter=str(adapter)).model
    torch.testing.assert_close(whole(ids).logits, apart, rtol=1e-4, atol=1e-4)
    whole.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(load_causal_lm(str(tmp_path / "merged"))(ids).logits, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("more", [{"modules_to_save": ["lm_head"]}, {"init_lora_weights": "orthogonal"}])
def test_with_its_adapter_off_a_policy_is_its_start_policy(policy, tmp_path, more):
    adapter = tiny.tiny_adapter(policy, tmp_path / "adapter", **more)
    found, start = load_policy(str(policy), adapter=str(adapter)), load_policy(str(policy), Trainable(full=True))
    tokens = found.collate([Sequence(np.arange(5, 15, dtype=np.int32), 4)])
    with found.as_start_policy():
        off = found(tokens)
    torch.testing.assert_close(off, start(tokens).detach())
    assert (found(tokens) - off).abs().max() > 0.01
