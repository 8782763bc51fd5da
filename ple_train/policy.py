"""The model that is trained: the only room that loads, wraps and saves it (transformers and peft, safetensors only).

It never reads training rows and never runs an optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ple_data.models import check_adapter, check_model
from ple_train import attention as packed
from ple_train.batches import Layout, Sequence, Tokens, collate_packed, collate_padded, collate_shared
from ple_train.log import print_to_log
from ple_train.lora import fuse
from ple_train.loss import token_logps
from schemas.errors import UsageError, first_line

COLLATE = {"padded": collate_padded, "packed": collate_packed, "shared": collate_shared}
PROBE_TOLERANCE = {"float32": 1e-3, "bf16": 0.1}
"""Mean difference in nats that the probe forgives, by precision."""


class Policy(nn.Module):
    """A causal language model that answers with log-probabilities of response tokens instead of logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = base.config.get_text_config()
        self._base = [base]  # in a list: a view of self.model, not a second submodule
        self.vocabulary: int = base.get_output_embeddings().weight.shape[0]
        self.positions: int | None = getattr(config, "max_position_embeddings", None)
        self.scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
        self.softcap = getattr(config, "final_logit_softcapping", None) or 0.0
        self.layout: Layout = "packed"

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def collate(self, sequences: list[Sequence]) -> Tokens:
        """The sequences as tensors, in the layout that `prepare` found this model's attention to keep."""
        return COLLATE[self.layout](sequences, self.device)

    def forward(self, tokens: Tokens) -> Tensor:
        """Log-probability of each response token, [n] in nats, in the order of `tokens.targets`."""
        base = self._base[0]
        decoder = getattr(base, base.base_model_prefix)
        hidden = decoder(**tokens.inputs, use_cache=False).last_hidden_state
        head = base.get_output_embeddings()
        return token_logps(
            hidden.flatten(0, 1)[tokens.rows],
            head.weight,
            tokens.targets,
            getattr(head, "bias", None),
            scale=self.scale,
            softcap=self.softcap,
        )

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
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def prepare(self, attention: str, precision: str = "float32") -> None:
        """Choose attention and packing, and check them (and the output layer) against the model's own forward.

        attention: `auto`, or any name that transformers knows; precision: float32 or bf16, as it will be trained.
        Packed sequences that share their prompts where the attention is our own, packed ones where it can keep
        sequences apart, padded rows where it cannot. Raises UsageError where even padded rows disagree.
        """
        packed.register()
        base = self._base[0]
        if getattr(base.config.get_text_config(), "attn_logit_softcapping", None):
            base.set_attn_implementation("eager")  # transformers' other ways leave the cap out
        own = base.config._attn_implementation
        training = self.training
        self.eval()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
            self._choose(attention, own, precision)
        self.train(training)

    def _choose(self, attention: str, own: str, precision: str) -> None:
        base = self._base[0]
        expected = self._probe_plainly()
        chosen = _flash_or_packed(self.device, precision) if attention == "auto" else attention
        layouts: list[tuple[str, Layout]] = [(chosen, "packed"), (own, "padded")]
        if chosen == packed.PACKED_ATTENTION:
            layouts.insert(0, (chosen, "shared"))
        for implementation, layout in layouts:
            try:
                base.set_attn_implementation(implementation)
                self.layout = layout
                found = self._probe()
            except (ValueError, TypeError, ImportError, RuntimeError) as error:
                if attention != "auto":
                    raise UsageError(f"--attention {attention}: {first_line(error)}") from error
                continue
            if (found - expected).abs().mean() <= PROBE_TOLERANCE[precision]:
                if layout == "padded":
                    print_to_log("note: this model's attention cannot keep packed sequences apart; rows are padded")
                return
        raise UsageError(
            f"the log-probabilities of {type(base).__name__} ({base.config._name_or_path}) cannot be computed from its "
            "hidden states and output layer: this architecture (or an adapter on its output layer) is not supported"
        )

    def _probe_sequences(self) -> list[Sequence]:
        """Two responses to one query, and one to another."""
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.vocabulary, (24,), generator=random, dtype=torch.int32).numpy()
        sibling = np.concatenate([ids[:3], ids[19:]])
        return [Sequence(ids[:12], 3, query=0), Sequence(sibling, 3, query=0), Sequence(ids[12:19], 2, query=1)]

    @torch.no_grad()
    def _probe(self) -> Tensor:
        return self(self.collate(self._probe_sequences())).cpu()

    @torch.no_grad()
    def _probe_plainly(self) -> Tensor:
        """The model's own logits, one sequence at a time."""
        found = []
        for sequence in self._probe_sequences():
            ids = torch.from_numpy(sequence.ids).long().to(self.device)
            logps = self.model(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)
            targets = ids[sequence.prompt :]
            found.append(logps[sequence.prompt - 1 : -1].gather(1, targets[:, None]).squeeze(1))
        return torch.cat(found).cpu()


def resolve_precision(precision: str) -> str:
    """`auto` → bf16 on a GPU, float32 elsewhere."""
    if precision != "auto":
        return precision
    return "bf16" if torch.cuda.is_available() else "float32"


def load_policy(
    model: str,
    *,
    adapter: str | None = None,
    revision: str | None = None,
    full: bool = False,
    lora_rank: int = 8,
    lora_alpha: int = 16,
    precision: str = "auto",
    attention: str = "auto",
    gradient_checkpointing: bool = False,
    seed: int = 0,
) -> Policy:
    """The policy to train: `load_trainable`, checked and wrapped so that it answers with log-probabilities.

    Raises UsageError for a directory that holds no model, or an adapter that does not fit it.
    """
    causal = load_trainable(
        model,
        adapter=adapter,
        revision=revision,
        full=full,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
    )
    fuse(causal)
    policy = Policy(causal)
    if torch.cuda.is_available():
        policy.to(torch.device("cuda", torch.cuda.current_device()))
    policy.prepare(attention, resolve_precision(precision))
    return policy


def load_trainable(
    model: str,
    *,
    adapter: str | None = None,
    revision: str | None = None,
    full: bool = False,
    lora_rank: int = 8,
    lora_alpha: int = 16,
    precision: str = "auto",
    gradient_checkpointing: bool = False,
    seed: int = 0,
) -> Any:
    """The model to train: with a fresh LoRA adapter on all linear modules, with `adapter` to go on from, or whole.

    Weights are held in float32 when they are trained or when precision is float32, else in bfloat16. Dropout is off.
    Raises UsageError for a directory that holds no model, or an adapter that does not fit it.
    """
    if adapter:
        check_adapter(adapter, model)
    frozen_bf16 = resolve_precision(precision) == "bf16" and not full
    causal = load_causal_lm(model, revision, torch.bfloat16 if frozen_bf16 else torch.float32)
    if gradient_checkpointing:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if full and adapter:
        causal = load_adapter(causal, adapter, trainable=False).merge_and_unload()
    if not full:
        causal = load_adapter(causal, adapter) if adapter else _fresh_lora(causal, lora_rank, lora_alpha, seed)
    else:
        causal.requires_grad_(True)
    switch_off_dropout(causal)
    return causal


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: with it, drift from the start policy is noise, and batching changes the gradient."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def load_causal_lm(model: str, revision: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """`AutoModelForCausalLM`, safetensors only. Raises UsageError where there is no model."""
    from transformers import AutoModelForCausalLM

    check_model(model)
    try:
        return AutoModelForCausalLM.from_pretrained(
            model, revision=revision, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"--model {model}: no causal language model there ({first_line(error)})") from error


def load_adapter(causal: Any, adapter: str, *, trainable: bool = True) -> Any:
    """`PeftModel` over a causal language model. Raises UsageError where it does not fit."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(causal, adapter, is_trainable=trainable, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UsageError(f"--adapter {adapter} does not fit this --model ({first_line(error)})") from error


def _fresh_lora(causal: Any, rank: int, alpha: int, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(causal, config)


def _flash_or_packed(device: torch.device, precision: str) -> str:
    from transformers.utils import is_flash_attn_2_available

    flash = device.type == "cuda" and precision == "bf16" and is_flash_attn_2_available()
    return "flash_attention_2" if flash else packed.PACKED_ATTENTION
