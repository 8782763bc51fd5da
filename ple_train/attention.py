"""Attention over packed sequences for machines without a flash-attention package: one causal product a sequence.

Registered with transformers under the name `ple_packed`; it takes the same borders (`cu_seq_lens_q`) that the
flash-attention implementations take, so one packed batch serves both. It also takes `branches`: several responses
behind one prompt, each of which sees the prompt and itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

PACKED_ATTENTION = "ple_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    branches: list[tuple[int, ...]] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, tokens, d], key and value [1, kv heads, tokens, d] → [1, tokens, heads, d].

    Tokens see earlier tokens of their own sequence alone (at most `sliding_window` of them where a model has one).
    Without borders each row is one sequence. branches: for each part between borders the length of its prompt and
    of every response behind it. Raises ValueError for what this attention does not know.
    """
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if attention_mask is not None or unknown:
        raise ValueError(f"{PACKED_ATTENTION} does not know {', '.join(unknown) or 'masks'}")
    kind = value.dtype
    if kind == torch.bfloat16 and value.device.type == "cpu":  # torch's backward there is 2 to 5 times slower in it
        query, key, value = query.float(), key.float(), value.float()
    if cu_seq_lens_q is None:
        return _attend(query, key, value, dropout, scaling, sliding_window).transpose(1, 2).to(kind), None
    parts = branches or [(0, n) for n in cu_seq_lens_q.diff().tolist()]
    lengths = [length for prompt, first, *others in parts for length in (prompt + first, *others)]
    pieces = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = []
    for prompt, _, *others in parts:
        q, k, v = next(pieces)
        outputs.append(_attend(q, k, v, dropout, scaling, sliding_window))
        k_prompt, v_prompt = k[:, :, :prompt], v[:, :, :prompt]
        for _ in others:
            q, k, v = next(pieces)
            k, v = torch.cat([k_prompt, k], dim=2), torch.cat([v_prompt, v], dim=2)
            outputs.append(_attend(q, k, v, dropout, scaling, sliding_window))
    return torch.cat(outputs, dim=2).transpose(1, 2).to(kind), None


def register() -> None:
    """Make `ple_packed` known to transformers (twice does no harm)."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)


@contextmanager
def windows() -> Iterator[set[int | None]]:
    """What models give `ple_packed` as their sliding window, as long as this is open."""
    from transformers import AttentionInterface

    seen = set()

    def attend(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        seen.add(kwargs.get("sliding_window"))
        return packed_attention(*args, **kwargs)

    AttentionInterface.register(PACKED_ATTENTION, attend)
    try:
        yield seen
    finally:
        register()


def _attend(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, window: int | None
) -> Tensor:
    """The queries are those of the last of the keys' positions."""
    queries, keys = query.shape[2], key.shape[2]
    mask = None
    if queries < keys or (window is not None and keys > window):
        ones = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        mask = ones.tril(keys - queries)
        if window is not None:
            mask &= ones.triu(keys - queries + 1 - window)
        if (repeats := query.shape[1] // key.shape[1]) > 1:  # with a mask, GPU kernels take no grouped heads
            key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    with torch.autocast("cpu", enabled=False):
        return nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
