"""Attention over packed sequences: in one call for the whole row where there is a kernel for it, else in a loop.

Registered with transformers under the names `ple_varlen` and `ple_packed`. Both take a `Packing`, which says which
positions of the row see one another: sequences behind one another, or several responses behind one prompt, each of
which sees the prompt and itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ple_data.common.device import upload

PACKED, VARLEN = "ple_packed", "ple_varlen"


@dataclass(frozen=True)
class Packing:
    """A packed row in spans. A span is a prompt with its first response, or another response to it alone.

    parts: on the host, for each part of the row the length of its prompt and of every response behind it. keys: the
    positions that the spans see, span behind span; a later response's begin with its prompt's. None where every span
    sees its own positions alone. The borders of queries and keys are [spans + 1] int32.
    """

    parts: tuple[tuple[int, ...], ...]
    borders_q: Tensor
    borders_k: Tensor
    keys: Tensor | None
    longest_q: int
    longest_k: int

    @classmethod
    def of(cls, parts: Sequence[tuple[int, ...]], device: torch.device) -> Packing:
        """The packing of a row made of these parts, its tensors on the device."""
        queries, keys, seen = [], [], []
        start = 0
        for prompt, first, *others in parts:
            place, shared = start, 0  # a later response sees the prompt too
            for length in (prompt + first, *others):
                queries.append(length)
                keys.append(shared + length)
                seen += [np.arange(start, start + shared), np.arange(place, place + length)]
                place, shared = place + length, prompt
            start = place
        borders_q = upload(borders_of(queries), device)
        repeated = len(queries) > len(parts)
        return cls(
            parts=tuple(parts),
            borders_q=borders_q,
            borders_k=upload(borders_of(keys), device) if repeated else borders_q,
            keys=upload(np.concatenate(seen), device) if repeated else None,
            longest_q=max(queries),
            longest_k=max(keys),
        )

    @property
    def borders(self) -> tuple[Tensor, Tensor, int, int]:
        """Borders of queries and keys, and the longest span of each, as kernels take them."""
        return self.borders_q, self.borders_k, self.longest_q, self.longest_k


def borders_of(lengths: list[int]) -> np.ndarray:
    """Where each of these lengths begins, behind one another, and where the last one ends: [lengths + 1] int32."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    **how: Any,
) -> tuple[Tensor, None]:
    """As `packed_attention`, by one kernel for the whole row: prompts' keys are repeated for every later response.

    Raises ValueError also where there is no such kernel for these tensors (a CPU, float32), or with dropout.
    """
    _note_and_refuse_unknown(VARLEN, attention_mask, how)
    if packing is None:
        return packed_attention(module, query, key, value, None, **how)
    kernel, device = varlen_kernel(), query.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    query, key, value = query.to(kind), key.to(kind), value.to(kind)  # norms and rotations may leave float32
    if kernel is None or not kernels_take(value) or how.get("dropout"):
        raise ValueError(f"{VARLEN} needs a GPU, bfloat16 and no dropout")
    return in_one_call(kernel, query, key, value, packing, how.get("scaling"), how.get("sliding_window")), None


Kernel = Callable[[Tensor, Tensor, Tensor, Packing, float | None, int | None], Tensor]
"""query [n, heads, d], key and value [keys, kv heads, d], packing, scale, window → [n, heads, d]. Causal. A span's
queries stand at the end of its keys: of 3 queries with 5 keys, the first sees 3 keys and the last sees 5."""


def kernels_take(values: Tensor) -> bool:
    """Whether the kernels are made for the place and number type of these values."""
    return values.device.type == "cuda" and values.dtype in (torch.bfloat16, torch.float16)


def in_one_call(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float | None, window: int | None
) -> Tensor:
    """query [1, heads, tokens, d], key and value [1, kv heads, tokens, d] → [1, tokens, heads, d]."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if packing.keys is not None:
        k, v = k.index_select(0, packing.keys), v.index_select(0, packing.keys)
    return kernel(q, k, v, packing, scale, window)[None]


@cache
def varlen_kernel() -> Kernel | None:
    """torch's own kernel where it has one that scales and knows windows, else flash-attention's, else None."""
    return _torchs_kernel() or _flash_attentions_kernel()


def _torchs_kernel() -> Kernel | None:
    """https://docs.pytorch.org/docs/stable/nn.attention.varlen.html"""
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return None
    known = signature(varlen.varlen_attn).parameters.keys()
    if not known >= {"scale", "window_size"}:
        return None
    attend: Any = partial(varlen.varlen_attn, enable_gqa=True) if "enable_gqa" in known else varlen.varlen_attn

    def kernel(q: Tensor, k: Tensor, v: Tensor, at: Packing, scale: float | None, window: int | None) -> Tensor:
        return attend(q, k, v, *at.borders, scale=scale, window_size=_window(window))

    return kernel


def _flash_attentions_kernel() -> Kernel | None:
    """https://github.com/Dao-AILab/flash-attention"""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None

    def kernel(q: Tensor, k: Tensor, v: Tensor, at: Packing, scale: float | None, window: int | None) -> Tensor:
        how = {"softmax_scale": scale, "causal": True, "window_size": _window(window)}
        return flash_attn_varlen_func(q, k, v, *at.borders, **how)

    return kernel


def _window(size: int | None) -> tuple[int, int]:
    """How many earlier and later positions a token sees beside itself; -1: all."""
    return (-1 if size is None else size - 1, 0)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    **how: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, tokens, d], key and value [1, kv heads, tokens, d] → [1, tokens, heads, d]; a call a span.

    Tokens see earlier tokens of their own span and of its prompt alone (at most `sliding_window` of them, themselves
    counted, where a model has one). Without a packing each row is one sequence. how: dropout, scaling and
    sliding_window, as transformers gives them. Raises ValueError for what this attention does not know.
    """
    _note_and_refuse_unknown(PACKED, attention_mask, how)
    dropout, scaling, window = how.get("dropout", 0.0), how.get("scaling"), how.get("sliding_window")
    kind = value.dtype
    if kind == torch.bfloat16 and value.device.type == "cpu":  # torch's backward there is 2 to 5 times slower in it
        query, key, value = query.float(), key.float(), value.float()
    if packing is None:
        return _attend(query, key, value, dropout, scaling, window).transpose(1, 2).to(kind), None
    lengths = [length for prompt, first, *others in packing.parts for length in (prompt + first, *others)]
    pieces = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = []
    for prompt, _, *others in packing.parts:
        q, k, v = next(pieces)
        outputs.append(_attend(q, k, v, dropout, scaling, window))
        k_prompt, v_prompt = k[:, :, :prompt], v[:, :, :prompt]
        for _ in others:
            q, k, v = next(pieces)
            k, v = torch.cat([k_prompt, k], dim=2), torch.cat([v_prompt, v], dim=2)
            outputs.append(_attend(q, k, v, dropout, scaling, window))
    return torch.cat(outputs, dim=2).transpose(1, 2).to(kind), None


OURS = {VARLEN: varlen_attention, PACKED: packed_attention}
"""The cheaper first."""


def register() -> None:
    """Make both known to transformers (twice does no harm)."""
    from transformers import AttentionInterface

    for name, attend in OURS.items():
        AttentionInterface.register(name, attend)


seen_windows: set[int | None] = set()
"""What models gave our attention as their sliding window since this was last cleared."""


def _note_and_refuse_unknown(name: str, mask: Tensor | None, more: dict[str, Any]) -> None:
    seen_windows.add(more.get("sliding_window"))
    unknown = [word for word in ("softcap", "s_aux", "position_bias") if more.get(word) is not None]
    if mask is not None or unknown:
        raise ValueError(f"{name} does not know {', '.join(unknown) or 'masks'}")


def _attend(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, window: int | None
) -> Tensor:
    """Causal. The queries stand at the end of the keys: of 3 queries with 5 keys, the first sees 3, the last sees 5."""
    queries, keys = query.shape[2], key.shape[2]
    mask = None
    if queries < keys or (window is not None and keys > window):
        ones = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        mask = ones.tril(keys - queries)
        if window is not None:
            mask &= ones.triu(keys - queries + 1 - window)
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1 and (mask is not None or (query.device.type == "cuda" and query.dtype == torch.float32)):
        # else a GPU would take its slowest kernel, which keeps all scores: the others know no grouped heads there
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    grouped = query.shape[1] != key.shape[1]
    with torch.autocast("cpu", enabled=False):
        return nn.functional.scaled_dot_product_attention(
            query, key, value, mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
