"""Sequences → packed token batches. Says which sequence goes where; never reads a file and never computes a loss.

A sequence is a prompt and the response that is trained on. Sequences of one optimizer step are dealt to processes
and micro-batches by length alone, the same way on every process, so that the gradient does not depend on the deal.

Three layouts: `padded`, one sequence a row; `packed`, all behind one another in one row; `shared`, packed, and where
neighbours answer the same query its prompt stands there, and is computed, once.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ple_data.common.device import upload
from ple_train.model.attention import Packing, borders_of

Layout = Literal["padded", "packed", "shared"]


@dataclass(frozen=True)
class Sequence:
    """ids [n] int32: prompt then response; the first `prompt` ids are context only. `tag` is the objective's own.

    `query`: sequences that follow one another with the same one (not None) begin with the same prompt.
    `beside`: a second sequence that goes through the model with this one (the rejected text of a preference).
    """

    ids: np.ndarray
    prompt: int
    tag: Any = None
    query: Any = None
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
    positions: int  # positions computed, padding counted
    padding: int  # those of them that are padding


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
    share = max(1, min(budget, -(-sum(lengths) // processes)))
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins = _fit(order, lengths, share) if packed else _neighbours(order, lengths, share)
    if packed and len(bins) % processes:
        fewer = len(bins) // processes * processes
        bins = _spread(order, lengths, budget, fewer) or _spread(order, lengths, budget, fewer + processes) or bins
    bins += [[] for _ in range(-len(bins) % processes)]
    return [bins[process::processes] for process in range(processes)]


def _spread(order: list[int], lengths: ListLike[int], budget: int, count: int) -> list[list[int]] | None:
    """`count` bins, the longest first into the emptiest; None where one of them would hold more than the budget."""
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for index in order if heap else ():
        held, number = heapq.heappop(heap)
        bins[number].append(index)
        heapq.heappush(heap, (held + lengths[index], number))
    return bins if heap and max(heap)[0] <= budget else None


def _fit(order: list[int], lengths: ListLike[int], budget: int) -> list[list[int]]:
    """First fit, longest first."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in order:
        place = next((b for b, left in enumerate(room) if left >= lengths[index]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(budget)
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
    sequences: list[Sequence],
    total: int,
    budget: int,
    processes: int,
    process: int,
    *,
    layout: Layout,
    together: bool = False,
) -> list[MicroBatch]:
    """This process's micro-batches of one global batch; together: neighbours of one query lie in the same one."""
    if not sequences:
        return []
    if together:
        units = [list(unit) for _, unit in groupby(sequences, key=lambda s: s.query)]
    else:
        units = _units_within(budget, sequences) if layout == "shared" else [[s] for s in sequences]
    lengths = [_positions(unit, layout) for unit in units]
    mine = deal(lengths, budget, processes, packed=layout != "padded")[process]
    shortest = units[lengths.index(min(lengths))]
    return [
        MicroBatch([s for i in indices for s in units[i]], total) if indices else MicroBatch(shortest, total, 0.0)
        for indices in mine
    ]


def _units_within(budget: int, sequences: list[Sequence]) -> list[list[Sequence]]:
    """Units of sequences that share a prompt; one that is over the budget is taken apart, and its prompt repeated."""
    units = []
    for unit in units_of(sequences):
        units += [unit] if _positions(unit, "shared") <= budget else [[s] for s in unit]
    return units


def _positions(unit: list[Sequence], layout: Layout) -> int:
    """Positions that a unit takes in a micro-batch."""
    if layout == "padded":
        return len(unit) * max(s.positions for s in unit)
    return sum(s.positions for s in unit) - (len(unit) - 1) * unit[0].prompt * (layout == "shared")


def units_of(sequences: list[Sequence]) -> list[list[Sequence]]:
    """Neighbours that share a prompt, together; the others each for itself."""
    alone = iter(range(len(sequences)))
    shares = [(s.query, s.prompt) if s.query is not None and s.prompt else (None, next(alone)) for s in sequences]
    return [[s for _, s in unit] for _, unit in groupby(zip(shares, sequences, strict=True), key=lambda part: part[0])]


def collate_shared(sequences: list[Sequence], device: torch.device) -> Tokens:
    """As `collate_packed`, with a prompt that neighbours share once, before all their responses."""
    return _collate_units(units_of(sequences), device)


def collate_packed(sequences: list[Sequence], device: torch.device) -> Tokens:
    """All sequences behind one another in one row, with their borders: not one position is padding."""
    return _collate_units([[s] for s in sequences], device)


def _collate_units(units: list[list[Sequence]], device: torch.device) -> Tokens:
    """`packing` is for our own attention, the borders for that of transformers, where no prompt is shared."""
    ids, positions, rows, parts = [], [], [], []
    start = 0
    for unit in units:
        prompt = unit[0].prompt
        place = start + prompt
        ids.append(unit[0].ids[:prompt])
        positions.append(np.arange(prompt))
        for s in unit:
            ids.append(s.ids[prompt:])
            positions.append(np.arange(prompt, len(s.ids)))
            # a token is predicted where the one before it stands; a response's first, where the prompt ends
            predicting = np.arange(place - 1, place + len(s.ids) - prompt - 1)
            predicting[:1] = start + prompt - 1
            rows.append(predicting if prompt else predicting[1:])
            place += len(s.ids) - prompt
        parts.append((prompt, *(len(s.ids) - prompt for s in unit)))
        start = place
    packing = Packing.of(parts, device)
    lengths = [sum(part) for part in parts]
    borders = packing.borders_q if packing.keys is None else upload(borders_of(lengths), device)
    inputs = {
        "input_ids": _long(np.concatenate(ids), device)[None],
        "position_ids": _long(np.concatenate(positions), device)[None],
        "packing": packing,
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    return _tokens([s for unit in units for s in unit], inputs, rows, start)


def collate_padded(sequences: list[Sequence], device: torch.device) -> Tokens:
    """One sequence a row, padded on the right (causal attention never looks there)."""
    inputs = padded_rows(sequences, device)
    width = inputs["input_ids"].shape[1]
    rows = [np.arange(max(s.prompt, 1) - 1, len(s.ids) - 1) + row * width for row, s in enumerate(sequences)]
    positions = len(sequences) * width
    return _tokens(sequences, inputs, rows, positions, positions - sum(len(s.ids) for s in sequences))


def padded_rows(sequences: list[Sequence], device: torch.device, pad: int = 0) -> dict[str, Tensor]:
    """Ids and attention mask, [sequences, longest] int64 each, padded on the right."""
    ids = np.full((len(sequences), max(len(s.ids) for s in sequences)), pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence.ids)] = sequence.ids
        mask[row, : len(sequence.ids)] = 1
    return {"input_ids": upload(ids, device), "attention_mask": upload(mask, device)}


def _tokens(
    sequences: list[Sequence], inputs: dict[str, Any], rows: list[np.ndarray], positions: int, padding: int = 0
) -> Tokens:
    device = inputs["input_ids"].device
    lengths = [s.response for s in sequences]
    return Tokens(
        inputs=inputs,
        rows=_long(np.concatenate(rows), device),
        targets=_long(np.concatenate([s.ids[max(s.prompt, 1) :] for s in sequences]), device),
        responses=_long(np.repeat(np.arange(len(sequences)), lengths), device),
        lengths=_long(np.array(lengths), device),
        positions=positions,
        padding=padding,
    )


def _long(values: np.ndarray, device: torch.device) -> Tensor:
    return upload(values.astype(np.int64), device)
