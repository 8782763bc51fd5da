"""How sequences are dealt and collated: every sequence once, whatever the budget and the number of processes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ple_train.model.batches import Sequence, collate_packed, collate_padded, collate_shared, deal, micro_batches

CPU = torch.device("cpu")
lengths = st.lists(st.integers(1, 300), min_size=1, max_size=60)


@given(lengths, st.integers(1, 1000), st.integers(1, 8), st.booleans())
def test_every_sequence_is_dealt_once_and_processes_keep_in_step(lengths, budget, processes, packed):
    dealt = deal(lengths, budget, processes, packed=packed)
    assert sorted(i for process in dealt for batch in process for i in batch) == list(range(len(lengths)))
    assert len({len(process) for process in dealt}) == 1
    for batch in (batch for process in dealt for batch in process if len(batch) > 1):
        longest = max(lengths[i] for i in batch)
        assert (sum(lengths[i] for i in batch) if packed else longest * len(batch)) <= budget


def test_two_processes_need_no_second_round_where_one_is_enough():
    assert deal([10, 8, 8, 8], 100, 2) == [[[0, 3]], [[1, 2]]]


def test_two_processes_share_the_last_round():
    assert deal([4] * 6, 8, 2) == [[[0, 4], [2]], [[1, 5], [3]]]


def test_a_process_without_sequences_gets_a_filler_of_weight_0():
    only = Sequence(np.arange(5, dtype=np.int32), prompt=2)
    batches = [micro_batches([only], 1, 100, 2, process, layout="packed") for process in (0, 1)]
    assert [[b.weight for b in mine] for mine in batches] == [[1.0], [0.0]]


@given(st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=40))
def test_both_texts_of_a_preference_count_towards_the_budget(pairs):
    sequences = [Sequence(np.zeros(a, np.int32), 0, beside=Sequence(np.zeros(b, np.int32), 0)) for a, b in pairs]
    for batch in micro_batches(sequences, 1, 400, 1, 0, layout="padded"):
        longest = max(max(len(s.ids), len(s.beside.ids)) for s in batch.sequences)
        assert 2 * longest * len(batch.sequences) <= 400


@pytest.mark.parametrize("collate", [collate_shared, collate_packed, collate_padded])
def test_collating_finds_the_response_tokens_and_the_positions_that_predict_them(collate):
    """x = 7 8, y = 1 2 3; x empty, y = 4 5 (its first token has no context, so it has no log-probability)."""
    sequences = [Sequence(np.array([7, 8, 1, 2, 3]), prompt=2), Sequence(np.array([4, 5]), prompt=0)]
    tokens = collate(sequences, CPU)
    flat = tokens.inputs["input_ids"].flatten()
    assert tokens.targets.tolist() == [1, 2, 3, 5]
    assert flat[tokens.rows].tolist() == [8, 1, 2, 4]
    assert tokens.responses.tolist() == [0, 0, 0, 1]
    assert tokens.lengths.tolist() == [3, 1]


def test_packed_batches_have_no_padding_and_positions_that_start_again():
    sequences = [Sequence(np.array([7, 8, 1]), prompt=1), Sequence(np.array([4, 5]), prompt=1)]
    tokens = collate_packed(sequences, CPU)
    assert tokens.positions == 5
    assert tokens.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert tokens.inputs["cu_seq_lens_q"].tolist() == [0, 3, 5]


def test_a_shared_prompt_stands_once_and_both_responses_begin_behind_it():
    """x = 7 8 with y = 1 2 and y_prompt = 3; then another query; then one without a prompt, which shares nothing."""
    sequences = [
        Sequence(np.array([7, 8, 1, 2]), prompt=2, query=0),
        Sequence(np.array([7, 8, 3]), prompt=2, query=0),
        Sequence(np.array([9, 4]), prompt=1, query=1),
        Sequence(np.array([5, 6]), prompt=0, query=2),
    ]
    tokens = collate_shared(sequences, CPU)
    assert tokens.inputs["input_ids"].tolist() == [[7, 8, 1, 2, 3, 9, 4, 5, 6]]
    assert tokens.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 2, 0, 1, 0, 1]]
    assert tokens.inputs["cu_seq_lens_q"].tolist() == [0, 5, 7, 9]
    assert tokens.inputs["packing"].parts == ((2, 2, 1), (1, 1), (0, 2))
    assert tokens.rows.tolist() == [1, 2, 1, 5, 7]
    assert tokens.targets.tolist() == [1, 2, 3, 4, 6]
    assert tokens.responses.tolist() == [0, 0, 1, 2, 3]
    [batch] = micro_batches(sequences, 1, 9, 1, 0, layout="shared")
    assert batch.sequences == sequences


def test_a_pair_over_the_budget_is_taken_apart():
    """x of 4 and responses of 6: 16 tokens together, 10 each; what lies in two micro-batches never joins again."""
    pair = [Sequence(np.arange(10, dtype=np.int32), 4, query=0) for _ in range(2)]

    def shapes(budget: int) -> list[tuple[tuple[int, ...], ...]]:
        batches = micro_batches(pair, 1, budget, 1, 0, layout="shared")
        return [collate_shared(batch.sequences, torch.device("cpu")).inputs["packing"].parts for batch in batches]

    assert shapes(16) == [((4, 6, 6),)]
    assert shapes(15) == [((4, 6),), ((4, 6),)]
