"""Attention over packed sequences for machines without a flash-attention package: one causal product a sequence.

Registered with transformers under the name `ple_packed`; it takes the same borders (`cu_seq_lens_q`) that the
flash-attention implementations take, so one packed batch serves both.
"""

from __future__ import annotations

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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, tokens, d], key and value [1, kv heads, tokens, d] → [1, tokens, heads, d].

    Tokens see earlier tokens of their own sequence alone (at most `sliding_window` of them where a model has one).
    Without borders each row is one sequence.
    """
    if cu_seq_lens_q is None:
        return _attend(query, key, value, dropout, scaling, sliding_window).transpose(1, 2), None
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [_attend(q, k, v, dropout, scaling, sliding_window) for q, k, v in parts]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def register() -> None:
    """Make `ple_packed` known to transformers (twice does no harm)."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, window: int | None
) -> Tensor:
    length = query.shape[2]
    mask = None
    if window is not None and length > window:
        ones = torch.ones(length, length, dtype=torch.bool, device=query.device)
        mask = ones.tril() & ones.triu(1 - window)
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
