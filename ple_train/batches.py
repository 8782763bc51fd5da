"""Sequences → packed token batches. Says which sequence goes where; never reads a file and never computes a loss.

A sequence is a prompt and the response that is trained on. Sequences of one optimizer step are dealt to processes
and micro-batches by length alone, the same way on every process, so that the gradient does not depend on the deal.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequence:
    """ids [n] int32: prompt then response; the first `prompt` ids are context only. `tag` is the objective's own.

    `beside`: a second sequence that goes through the model with this one (the rejected text of a preference).
    """

    ids: np.ndarray
    prompt: int
    tag: Any = None
    beside: Sequence | None = None

    @property
    def positions(self) -> int:
        """Positions that it takes in a micro-batch, itself and what is beside it padded to the longer."""
        return len(self.ids) if self.beside is None else 2 * max(len(self.ids), len(self.beside.ids))

    @property
    def response(self) -> int:
        """Response tokens with a log-probability (a first token without context has none)."""
        return len(self.ids) - max(self.prompt, 1)


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that go through the model together, and how many pairs or tokens their global batch has.

    `weight` is 0.0 for a filler batch: it keeps processes in step and adds nothing.
    """

    sequences: list[Sequence]
    total: int
    weight: float = 1.0


@dataclass(frozen=True)
class Tokens:
    """A micro-batch as tensors: `inputs` for the model; position, target id and response of every response token."""

    inputs: dict[str, Any]
    rows: Tensor  # [n] index into the flattened hidden states that predict the targets
    targets: Tensor  # [n] token ids
    responses: Tensor  # [n] index of the sequence
    lengths: Tensor  # [sequences] response tokens each
    positions: int = field(default=0)  # positions computed, padding counted


class Stream(Protocol):
    """What the loop trains on: global batches of sequences, a function of (seed, epoch) alone."""

    steps_per_epoch: int

    def batches(self, epoch: int, start: int) -> Iterator[tuple[list[Sequence], int]]:
        """The epoch's global batches from the start-th on: sequences, and the divisor (pairs or tokens)."""
        ...


def deal(lengths: ListLike[int], budget: int, processes: int, *, packed: bool = True) -> list[list[list[int]]]:
    """Deal sequences to processes and micro-batches: [process][micro-batch][index]; empty lists are fillers.

    A micro-batch holds at most `budget` positions (a longer sequence goes alone), fewer when that would leave a
    process idle. Packed sequences are fitted in beside one another; padded ones share a micro-batch with their
    neighbours in length. Every process gets the same number of micro-batches.
    """
    budget = max(1, min(budget, -(-sum(lengths) // processes)))
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins = _fit(order, lengths, budget) if packed else _neighbours(order, lengths, budget)
    bins += [[] for _ in range(-len(bins) % processes)]
    return [bins[process::processes] for process in range(processes)]


def _fit(order: list[int], lengths: ListLike[int], budget: int) -> list[list[int]]:
    """First fit, longest first."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in order:
        place = next((b for b, left in enumerate(room) if left >= lengths[index]), None)
        if place is None:
            bins.append([])
            room.append(budget)
            place = len(bins) - 1
        bins[place].append(index)
        room[place] -= lengths[index]
    return bins


def _neighbours(order: list[int], lengths: ListLike[int], budget: int) -> list[list[int]]:
    """Runs of similar length whose padded size stays within the budget."""
    bins: list[list[int]] = []
    for index in order:
        if bins and lengths[bins[-1][0]] * (len(bins[-1]) + 1) <= budget:
            bins[-1].append(index)
        else:
            bins.append([index])
    return bins


def micro_batches(
    sequences: list[Sequence], total: int, budget: int, processes: int, process: int, *, packed: bool = True
) -> list[MicroBatch]:
    """This process's micro-batches of one global batch."""
    if not sequences:
        return []
    mine = deal([s.positions for s in sequences], budget, processes, packed=packed)[process]
    shortest = min(sequences, key=lambda s: s.positions)
    return [
        MicroBatch([sequences[i] for i in indices], total) if indices else MicroBatch([shortest], total, weight=0.0)
        for indices in mine
    ]


def collate_packed(sequences: list[Sequence], device: torch.device) -> Tokens:
    """All sequences behind one another in one row, with their borders: not one position is padding."""
    lengths = [len(s.ids) for s in sequences]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    borders = torch.from_numpy(starts).to(device)
    inputs = {
        "input_ids": _row(np.concatenate([s.ids for s in sequences]), device),
        "position_ids": _row(np.concatenate([np.arange(n) for n in lengths]), device),
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    return _tokens(sequences, inputs, starts[:-1], int(starts[-1]), device)


def collate_padded(sequences: list[Sequence], device: torch.device) -> Tokens:
    """One sequence a row, padded on the right (causal attention never looks there)."""
    width = max(len(s.ids) for s in sequences)
    ids = np.zeros((len(sequences), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence.ids)] = sequence.ids
        mask[row, : len(sequence.ids)] = 1
    inputs = {
        "input_ids": torch.from_numpy(ids).to(device),
        "attention_mask": torch.from_numpy(mask).to(device),
    }
    return _tokens(sequences, inputs, np.arange(len(sequences)) * width, ids.size, device)


def _tokens(
    sequences: list[Sequence],
    inputs: dict[str, Any],
    starts: np.ndarray,
    positions: int,
    device: torch.device,
) -> Tokens:
    first = [max(s.prompt, 1) for s in sequences]
    rows = [np.arange(f - 1, len(s.ids) - 1) + start for s, f, start in zip(sequences, first, starts, strict=True)]
    lengths = [s.response for s in sequences]
    return Tokens(
        inputs=inputs,
        rows=_long(np.concatenate(rows), device),
        targets=_long(np.concatenate([s.ids[f:] for s, f in zip(sequences, first, strict=True)]), device),
        responses=_long(np.repeat(np.arange(len(sequences)), lengths), device),
        lengths=_long(np.array(lengths), device),
        positions=positions,
    )


def _long(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(device)


def _row(values: np.ndarray, device: torch.device) -> Tensor:
    return _long(values, device)[None]
