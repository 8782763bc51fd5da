"""The model that is trained: the only room that loads, wraps and saves it (transformers and peft, safetensors only).

It never reads training rows and never runs an optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ple_data.common.device import default_device, load_adapter, load_weights, natural_dtype
from ple_data.common.models import check_adapter, check_model, positions_of
from ple_train.log import print_to_log
from ple_train.loss import reverse_kl, token_entropies, token_logps
from ple_train.model import attention as packed
from ple_train.model import probe, shard
from ple_train.model.batches import Layout, Sequence, Tokens, collate_packed, collate_padded, collate_shared
from ple_train.model.lora import fuse
from ple_train.model.norms import fuse_norms
from schemas.errors import UsageError, first_line
from schemas.options import Lora, Trainable

RANDOM_PARTS = ("drop", "jitter_noise")
"""Parts of the names under which models keep the rates of what is random in training."""
NOT_RANDOM = "router_jitter_noise"
"""Phi-MoE's: by it, experts are left out when it samples too. Others keep theirs as `jitter_noise`."""
COLLATE = {"padded": collate_padded, "packed": collate_packed, "shared": collate_shared}


class Policy(nn.Module):
    """A causal language model that answers with log-probabilities of response tokens instead of logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = base.config.get_text_config()
        self._base = [base]  # in a list: a view of self.model, not a second submodule
        self.vocabulary: int = base.get_output_embeddings().weight.shape[0]
        self.positions = positions_of(base.config)
        self.scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
        self.softcap = getattr(config, "final_logit_softcapping", None) or 0.0
        self.layout: Layout = "packed"
        self.attention: str = base.config._attn_implementation

    def train(self, mode: bool = True) -> Policy:
        """Tell of training only the modules that checkpoint activations: some others would answer at random in it."""
        super().train(mode)
        for module in self.model.modules():
            module.training = mode and hasattr(module, "gradient_checkpointing")
        return self

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def collate(self, sequences: list[Sequence]) -> Tokens:
        """The sequences as tensors, in the layout that `prepare` found this model's attention to keep."""
        return COLLATE[self.layout](sequences, self.device)

    def forward(
        self, tokens: Tokens | Callable[[], Any], teacher: Tensor | None = None, *, entropies: bool = False
    ) -> Any:
        """Log-probability of each response token, [n] in nats, in the order of `tokens.targets`.

        A function instead of tokens is called where the weights are together: what it gives.

        teacher [n, d]: `predicting` states of another policy at these tokens; then the reverse KL to it at each, [n].
        entropies: give those of the distributions that the tokens were drawn from as well, [n] in nats.
        """
        if callable(tokens):
            return tokens()
        states, head = self.predicting(tokens), self._base[0].get_output_embeddings()
        how: dict[str, Any] = {"bias": getattr(head, "bias", None), "scale": self.scale, "softcap": self.softcap}
        if teacher is not None:
            return reverse_kl(states, teacher, head.weight, **how)
        logps = token_logps(states, head.weight, tokens.targets, **how)
        return (logps, token_entropies(states.detach(), head.weight, **how)) if entropies else logps

    def predicting(self, tokens: Tokens) -> Tensor:
        """Hidden states that each response token is predicted from, [n, d]."""
        hidden = self._base[0].get_decoder()(**tokens.inputs, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, tokens.rows)

    @property
    def has_start_policy(self) -> bool:
        """Whether the start policy pi_0 is at hand, as this model with its adapter off."""
        return hasattr(self.model, "disable_adapter")

    @contextmanager
    def as_start_policy(self) -> Iterator[None]:
        """Answer as pi_0, without gradients."""
        with torch.no_grad(), self.model.disable_adapter():
            yield

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that training changes, by name."""
        shard.take_apart(self)
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def prepare(self, attention: str, precision: str = "float32") -> None:
        """Choose attention and packing, and check them (and the output layer) against the model's own forward.

        attention: `auto`, or any name that transformers knows; precision: float32 or bf16, as it will be trained.
        Packed sequences that share their prompts where the attention is our own, packed ones where it can keep
        sequences apart, padded rows where it cannot. Raises UsageError where even padded rows disagree.
        """
        packed.register()
        base = self._base[0]
        training = self.training
        self.eval()
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
            self._choose(attention, base.config._attn_implementation, precision)
        self.train(training)

    def _choose(self, attention: str, own: str, precision: str) -> None:
        try:
            alone = probe.answers(self._one_by_one, self.vocabulary)
            padded = self._answers(own, "padded")
        except Exception as error:  # the code of any architecture runs here
            raise self._unsupported(first_line(error)) from error
        if not probe.agree(padded[0], alone[0], precision):
            raise self._unsupported("they are others than its own")
        for implementation, layout in _candidates(attention, own, self.device, precision):
            try:
                found = self._answers(implementation, layout)
            except Exception as error:
                if attention != "auto":
                    raise UsageError(f"--attention {attention}: {first_line(error)}") from error
                continue
            if probe.agree(found[0], alone[0], precision) and probe.keeps_apart(found, padded):
                if layout == "padded":
                    print_to_log("note: this model's attention cannot keep packed sequences apart; rows are padded")
                return
        raise UsageError(f"--attention {attention} does not give this model's own log-probabilities; leave it out")

    def _answers(self, implementation: str, layout: Layout) -> Tensor:
        """The probe's answers in a layout, which stays set."""
        self._base[0].set_attn_implementation(implementation)
        self.attention, self.layout = implementation, layout
        packed.seen_windows.clear()
        found = probe.answers(lambda sequences: self(self.collate(sequences)), self.vocabulary)
        if implementation in packed.OURS and self._window and not any(packed.seen_windows):
            raise ValueError("this model keeps its window of attention in a mask")
        return found

    def _one_by_one(self, sequences: list[Sequence]) -> Tensor:
        """The model's own logits, one sequence at a time."""
        found = []
        precision = "bf16" if torch.is_autocast_enabled(self.device.type) else "float32"
        for sequence in sequences:
            ids = torch.from_numpy(sequence.ids).long().to(self.device)
            whole, start = (self(partial(self._logits, part)) for part in (ids, ids[:-1]))
            logps = whole.float().log_softmax(-1)
            if not probe.agree(start.float().log_softmax(-1), logps[:-1], precision):
                raise ValueError("its tokens see those to come")
            targets = ids[sequence.prompt :]
            found.append(logps[sequence.prompt - 1 : -1].gather(1, targets[:, None]).squeeze(1))
        return torch.cat(found)

    def _logits(self, ids: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=ids[None], use_cache=False).logits[0]
        return found

    @property
    def _window(self) -> int | None:
        """Tokens that some layer sees at most, where that is fewer than the model has positions."""
        config = self._base[0].config.get_text_config()
        kinds = getattr(config, "layer_types", None)
        if kinds and not any("sliding" in kind or "chunked" in kind for kind in kinds):
            return None
        sizes = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        return next((size for size in sizes if size and size < (self.positions or math.inf)), None)

    def _unsupported(self, why: str) -> UsageError:
        base = self._base[0]
        return UsageError(
            f"the log-probabilities of {type(base).__name__} ({base.config._name_or_path}) cannot be computed from its "
            f"hidden states and output layer: this architecture (or an adapter on its output layer) is not supported "
            f"({why})"
        )


def resolve_precision(precision: str) -> str:
    """`auto` → bf16 on a GPU that computes in it, float32 elsewhere."""
    if precision != "auto":
        return precision
    return "bf16" if natural_dtype(default_device()) == torch.bfloat16 else "float32"


def load_policy(
    model: str,
    options: Trainable | None = None,
    *,
    adapter: str | None = None,
    revision: str | None = None,
    precision: str = "auto",
    seed: int = 0,
) -> Policy:
    """The policy to train: `load_trainable`, checked and wrapped so that it answers with log-probabilities.

    Raises UsageError for a directory that holds no model, or an adapter that does not fit it.
    """
    options = options or Trainable()
    in_parts = options.shard and shard.is_shared()
    if options.shard and not in_parts:
        print_to_log(
            "note: --shard shares a model among processes, and this is one: it holds the whole; torchrun starts more"
        )
    how: dict[str, Any] = {"adapter": adapter, "revision": revision, "precision": precision, "seed": seed}
    causal = load_trainable(model, options, in_parts=in_parts, **how)
    fuse(causal)
    policy = Policy(causal)
    if in_parts:
        shard.share(policy, shard.layers_of(policy._base[0]), model, revision)
    else:
        policy = policy.to(default_device())  # what peft left on the host
    if policy.device.type == "cuda":  # on a CPU it is not faster, and would round otherwise
        fuse_norms(causal)
    policy.prepare(options.attention, resolve_precision(precision))
    shard.take_apart(policy)
    return policy


def load_trainable(
    model: str,
    options: Lora,
    *,
    adapter: str | None = None,
    revision: str | None = None,
    precision: str = "auto",
    seed: int = 0,
    in_parts: bool = False,
) -> Any:
    """The model to train: with a fresh LoRA adapter on all linear modules, with `adapter` to go on from, or whole.

    Weights are held in float32 when they are trained or when precision is float32, else in bfloat16. Dropout is off.
    in_parts: frozen weights have no memory yet (`shard.share` reads them). Raises UsageError for a directory that holds
    no model, or an adapter that does not fit it.
    """
    if adapter:
        check_adapter(adapter, model)
    full = isinstance(options, Trainable) and options.full
    frozen_bf16 = resolve_precision(precision) == "bf16" and not full
    if in_parts and full and adapter:
        raise UsageError("--shard --full goes on from a whole model: give that as --model, without --adapter")
    dtype = torch.bfloat16 if frozen_bf16 else torch.float32
    causal = shard.empty_causal_lm(model, revision, dtype) if in_parts else load_causal_lm(model, revision, dtype)
    if isinstance(options, Trainable) and options.gradient_checkpointing:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if full and adapter:
        causal = merged(load_adapter(causal, adapter))
    if not full:
        causal = load_adapter(causal, adapter, trainable=True) if adapter else _fresh_lora(causal, options, seed)
    else:
        causal.requires_grad_(True)
    switch_off_dropout(causal)
    return causal


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: with it, drift from the start policy is noise, and batching changes the gradient."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for settings in (module, getattr(module, "config", None)):
            for name, value in vars(settings).items() if settings is not None else ():
                if isinstance(value, float) and any(part in name for part in RANDOM_PARTS) and name != NOT_RANDOM:
                    setattr(settings, name, 0.0)


def load_causal_lm(model: str, revision: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """`AutoModelForCausalLM` on this process's device, safetensors only. Raises UsageError where there is no model."""
    from transformers import AutoModelForCausalLM

    check_model(model)
    what = f"--model {model} as a causal language model"
    return load_weights(AutoModelForCausalLM, model, default_device(), what, revision=revision, dtype=dtype)


def merged(tuned: Any) -> Any:
    """The model with its adapter in its weights, the same function as with it apart.

    Where it changes the embedding or the output layer and these are one weight, that becomes two.
    """
    base = tuned.get_base_model()
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    inner = [getattr(end, "base_layer", getattr(end, "original_module", end)) for end in ends]
    if any(end is not below for end, below in zip(ends, inner, strict=True)) and inner[0].weight is inner[1].weight:
        inner[1].weight = nn.Parameter(inner[1].weight.detach().clone(), requires_grad=inner[1].weight.requires_grad)
        for config in (base.config, base.config.get_text_config()):
            config.tie_word_embeddings = False
    return tuned.merge_and_unload()


def _fresh_lora(causal: Any, options: Lora, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(seed)
    rank, alpha = options.lora_rank, cast(int, options.lora_alpha)  # any number will do
    turned = any(isinstance(module, Conv1D) for module in causal.modules())  # GPT-2's weights are [in, out]
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=turned
    )
    return get_peft_model(causal, config)


def _candidates(attention: str, own: str, device: torch.device, precision: str) -> list[tuple[str, Layout]]:
    """Attention and layout in the order of their cost; the first that the model keeps is taken."""
    from transformers.utils import is_flash_attn_2_available

    if attention not in ("auto", *packed.OURS):
        return [(attention, "packed"), (attention, "padded")]
    half = device.type == "cuda" and precision == "bf16"
    names = [attention] if attention != "auto" else [name for name in packed.OURS if name != packed.VARLEN or half]
    layouts: tuple[Layout, ...] = ("shared", "packed")
    ours = [(name, layout) for name in names for layout in layouts]
    if attention != "auto":
        return ours
    flash: list[tuple[str, Layout]] = [("flash_attention_2", "packed")] if half and is_flash_attn_2_available() else []
    return [*ours, *flash, (own, "padded")]
