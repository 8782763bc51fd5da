"""Tiny real models for the tests: a Llama policy, a reward model and a LoRA adapter, written to a directory.

They are random but real: the same classes, files and tokenizers as a model from the hub, small enough to load
in a second. Nothing is downloaded, and the same arguments always write the same weights.
"""

import itertools
import json
from pathlib import Path

EOS, PAD, BOS = "<|end|>", "<|pad|>", "<|begin|>"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURNS = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] | trim }}<|over|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
"""Ends a turn with a token of its own, as ChatML does; needs the special tokens <|turn|> and <|over|>."""
CHAT_TEMPLATE_WITHOUT_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + CHAT_TEMPLATE
)
"""Refuses a system message the way the templates of some hub models do."""

_SUBJECTS = ["the film", "this story", "a good actor", "the question", "my friend", "the answer", "one scene"]
_VERBS = ["was", "seems", "helps", "needs", "shows", "is not", "should be"]
_ENDINGS = [
    "great.",
    "very bad.",
    "wonderful and funny.",
    "boring!",
    "quite useful.",
    "long?",
    "kind of sad.",
]


def corpus() -> list[str]:
    """A few hundred plain English sentences: enough to train a small byte-level BPE."""
    return [" ".join(words).capitalize() for words in itertools.product(_SUBJECTS, _VERBS, _ENDINGS)]


def tiny_tokenizer(
    *,
    vocab: int = 384,
    add_bos: bool = False,
    chat: bool | str = False,
    eos: bool = True,
    pad: bool = True,
    special: tuple[str, ...] = (),
):
    """A byte-level BPE tokenizer; `add_bos` makes its post-processor put BOS before every text.

    chat: False, True, "no-system" for a template that raises on a system message, or a template.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD, EOS, BOS, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A",
            pair=f"{BOS} $A $B",
            special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
        )
    special = {"bos_token": BOS}
    if eos:
        special["eos_token"] = EOS
    if pad:
        special["pad_token"] = PAD
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    if chat:
        known = {True: CHAT_TEMPLATE, "no-system": CHAT_TEMPLATE_WITHOUT_SYSTEM}
        fast.chat_template = known.get(chat, chat)
    return fast


def spm_tokenizer(*, special: tuple[str, ...] = (), template: str | None = None):
    """A SentencePiece-like tokenizer: decoding drops the first space, encoding adds one, rare characters are bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces = ["<unk>", BOS, EOS, PAD, *special]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # pieces are words; for training alone
    tokenizer.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=300, special_tokens=pieces, show_progress=False)
    )
    learned = json.loads(tokenizer.to_str())["model"]
    vocab = learned["vocab"] | {f"<0x{byte:02X}>": len(learned["vocab"]) + byte for byte in range(256)}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer.model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.pre_tokenizer = None
    begin = [(BOS, tokenizer.token_to_id(BOS))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=begin)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token="<unk>"
    )
    fast.chat_template = template
    return fast


def policy_of(directory: Path | str, tokenizer, *, seed: int = 0) -> Path:
    """A random Llama policy with this tokenizer, written to `directory`."""
    from transformers import LlamaForCausalLM

    return _save(directory, LlamaForCausalLM(_llama_config(tokenizer, 64, 2, seed)), tokenizer)


def _llama_config(tokenizer, hidden: int, layers: int, seed: int, **more):
    import torch
    from transformers import LlamaConfig

    torch.manual_seed(seed)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 32,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return LlamaConfig(**shape | more)


def tiny_policy(
    directory: Path | str,
    *,
    vocab: int = 384,
    hidden: int = 64,
    layers: int = 2,
    seed: int = 0,
    chat: bool | str = False,
    add_bos: bool = False,
    eos: bool = True,
    pad: bool = True,
    **more,
) -> Path:
    """A random LlamaForCausalLM with its tokenizer, written to `directory` (heads of 32: vLLM on CPU takes them).

    more: of its configuration.
    """
    from transformers import LlamaForCausalLM

    tokenizer = tiny_tokenizer(vocab=vocab, add_bos=add_bos, chat=chat, eos=eos, pad=pad)
    model = LlamaForCausalLM(_llama_config(tokenizer, hidden, layers, seed, **more))
    return _save(directory, model, tokenizer)


def tiny_reward(
    directory: Path | str,
    *,
    num_labels: int = 1,
    vocab: int = 320,
    hidden: int = 64,
    layers: int = 2,
    seed: int = 1,
    chat: bool | str = False,
    pad: bool = True,
) -> Path:
    """A random sequence classifier with a tokenizer of its own (other ids than the policy's)."""
    from transformers import LlamaForSequenceClassification

    tokenizer = tiny_tokenizer(vocab=vocab, chat=chat, pad=pad)
    config = _llama_config(tokenizer, hidden, layers, seed, num_labels=num_labels)
    return _save(directory, LlamaForSequenceClassification(config), tokenizer)


def tiny_adapter(
    model_dir: Path | str, directory: Path | str, *, rank: int = 8, seed: int = 2, added: int = 0, **more
) -> Path:
    """A random, non-zero LoRA adapter over all linear modules of `model_dir`, written to `directory`.

    added: tokens that the model is resized by before. more: of LoraConfig.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(str(model_dir))
    if added:
        base.resize_token_embeddings(base.config.vocab_size + added, mean_resizing=False)
    torch.manual_seed(seed)
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"} | more
    config = LoraConfig(r=rank, lora_alpha=2 * rank, **options)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
            elif parameter.requires_grad:  # biases, modules_to_save
                parameter.add_(0.1)
    model.save_pretrained(str(directory), save_embedding_layers=bool(added))
    return Path(directory)


def _save(directory: Path | str, model, tokenizer) -> Path:
    model.save_pretrained(str(directory))
    tokenizer.save_pretrained(str(directory))
    return Path(directory)
