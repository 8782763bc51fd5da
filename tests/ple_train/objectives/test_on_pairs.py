"""Every objective on our own loop: the same gradient however pairs are batched, kept start policy, resume, and TRL."""

from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import polars as pl
import pytest
import torch

from ple_data.storage.store import Store
from ple_train import train as training
from ple_train.engine.loop import make_accelerator
from ple_train.measure import pair_logps
from ple_train.measure.pair_logps import StartLogps
from ple_train.measure.purity import purity
from ple_train.model.batches import Sequence, micro_batches
from ple_train.model.policy import load_policy
from ple_train.objectives import loss_on_pairs
from ple_train.objectives.pair_loss import Knobs, Pairs
from ple_train.objectives.pairs import PairObjective
from ple_train.snapshot import freeze
from ple_train.stream import Response, plain_rewards
from schemas.errors import DamagedError, UsageError
from schemas.options import OBJECTIVE_KINDS, ObjectiveName, Purity, Train
from tests.ple_train.small_training import stop_in_step, weights, write_pairs
from tests.tables import table

OTHERS = [name for name in get_args(ObjectiveName) if name != "ple"]
TAU = 0.2


def batch(seed: int = 0, count: int = 7, empty: bool = True) -> list[Sequence]:
    """Pairs of random ids; of the last one y is empty."""
    numbers = np.random.default_rng(seed)
    found = []
    for query in range(count):
        x = numbers.integers(3, 300, numbers.integers(2, 9)).tolist()
        margin = 0.0 if query == 1 else float(numbers.normal())
        for arm in ("y", "y_prompt"):
            ids = np.array([*x, *numbers.integers(3, 300, numbers.integers(1, 24))], dtype=np.int32)
            tag = Response(arm, "rank" if margin > TAU else "wsft", 0, 0.0, margin, None, float(numbers.random()))
            if not (empty and query == count - 1 and arm == "y"):
                found.append(Sequence(ids, len(x), tag, query=query))
    return found


def knobs_of(name: str) -> tuple[str, Knobs]:
    form, beta = next(iter(OBJECTIVE_KINDS[name].betas.items()))
    return form, Knobs(TAU, 1.0 if beta is None else beta)


def gradient(name, policy, sequences, budget, layout):
    policy.layout = layout
    form, knobs = knobs_of(name)
    objective = PairObjective(policy, None, name, knobs, form)
    policy.zero_grad()
    total, logged = 0.0, 0.0
    for part in micro_batches(sequences, 7, budget, 1, 0, layout=layout, together=objective.together):
        loss, sums = objective(policy, part, 1)
        loss.backward()
        total += loss.item()
        logged += sum(sums[objective.sums.index(f"loss_{kind}")].item() for kind in ("rank", "wsft"))
    assert logged == pytest.approx(total, rel=1e-4)
    return total, {name: p.grad.clone() for name, p in policy.trainable().items()}


@pytest.mark.parametrize("name", OTHERS)
def test_the_gradient_is_that_of_the_pairs_one_by_one_however_they_are_batched(policy, adapter, name):
    sequences = batch()
    model = load_policy(str(policy), adapter=str(adapter))

    def logps(sequence: Sequence) -> torch.Tensor:
        return model(model.collate([sequence])).sum()

    form, knobs = knobs_of(name)
    expected = 0.0
    model.zero_grad()
    for query in range(7):
        found = {s.tag.arm: s for s in sequences if s.query == query}
        now = torch.stack([logps(found[arm]) if arm in found else torch.zeros(()) for arm in ("y", "y_prompt")])
        with model.as_start_policy():
            start = torch.stack([logps(found[arm]) if arm in found else torch.zeros(()) for arm in ("y", "y_prompt")])
        lengths = [found[arm].response if arm in found else 1 for arm in ("y", "y_prompt")]
        quantiles = [found[arm].tag.quantile if arm in found else 0.0 for arm in ("y", "y_prompt")]
        pair = Pairs(
            now[None], start[None], torch.tensor([lengths]), torch.zeros(1, 2), torch.tensor([quantiles]),
            torch.tensor([found["y_prompt"].tag.margin]), form,
        )  # fmt: skip
        loss = loss_on_pairs(name)(pair, knobs).sum() / 7
        loss.backward()
        expected += loss.item()
    slopes = {name: p.grad.clone() for name, p in model.trainable().items()}
    rounding = 1e-5 * max(1.0, *(slope.abs().max().item() for slope in slopes.values()))
    for budget, layout in ((10_000, "shared"), (1, "shared"), (90, "packed"), (10_000, "packed"), (200, "padded")):
        value, found = gradient(name, model, sequences, budget, layout)
        assert value == pytest.approx(expected, rel=1e-4)
        torch.testing.assert_close(found, slopes, rtol=1e-3, atol=rounding)


def test_kept_log_probabilities_of_the_start_policy_are_those_of_the_step(policy, adapter, pairs, tmp_path):
    model = load_policy(str(policy), adapter=str(adapter))
    snapshot = freeze([pairs], 1, None)
    start = StartLogps("m@123", "float32", tmp_path)
    start.fill(model, snapshot, 200, make_accelerator())
    for part in snapshot:
        rows = pl.DataFrame(pl.from_arrow(Store(pairs).read(part.shard))).hstack(start.of(part))
        for row in rows.iter_rows(named=True):
            for arm in ("y", "y_prompt"):
                ids = np.array(row["x_ids"] + row[f"{arm}_ids"], dtype=np.int32)
                with model.as_start_policy():
                    expected = model(model.collate([Sequence(ids, len(row["x_ids"]))])).sum().item()
                assert row[f"start_{arm}"] == pytest.approx(expected, rel=1e-5)


def test_the_start_policy_is_asked_once_a_row_by_all_trainings_and_purity(run, policy, tmp_path, monkeypatch):
    data = write_pairs(tmp_path / "data", seed=3)
    asked = []
    measured = pair_logps.measured

    def counted(*given):
        asked.append(given[4])
        return measured(*given)

    monkeypatch.setattr(pair_logps, "measured", counted)
    run("a", data=[data], objective="ple-residual")
    shards = Store(data).shards("pairs")
    assert sorted(asked) == sorted(shard.path for shard in shards)
    run("b", data=[data], objective="dpo")
    run("c", data=[data], stable=True)
    every_step = pl.read_parquet(run("plain", data=[data]) / "metrics.parquet")["drift_pushed_down"]
    assert every_step.null_count() == 0  # without them, every tenth
    monkeypatch.setattr("ple_train.measure.purity.measured", counted)
    purity(Purity(model=str(policy), data=[data], output=tmp_path / "purity", precision="float32"))
    assert len(asked) == len(shards)
    (folder,) = (data / "logps").iterdir()
    next(folder.iterdir()).write_bytes(b"")
    with pytest.raises(DamagedError, match=r"logps.*remove it and run the command again"):
        run("d", data=[data], objective="dpo")


def test_two_processes_ask_the_start_policy_of_every_shard_whoever_comes_first(policy, adapter, tmp_path):
    data = write_pairs(tmp_path / "data", seed=3)
    model, snapshot = load_policy(str(policy), adapter=str(adapter)), freeze([data], 1, None)
    start = StartLogps("m@123", "float32", tmp_path)
    for rank in (1, 0):  # the one begins when the other has ended
        rank = SimpleNamespace(process_index=rank, num_processes=2, wait_for_everyone=lambda: None)
        start.fill(model, snapshot, 200, rank)
    assert all(start.of(part).height == part.shard.rows for part in snapshot)


def test_a_store_that_cannot_be_written_has_them_in_the_output(run, tmp_path, monkeypatch):
    data = write_pairs(tmp_path / "data", seed=3)
    monkeypatch.setattr(pair_logps.os, "access", lambda *_: False)
    run("a", data=[data], objective="dpo")
    assert not (data / "logps").exists()
    assert not (tmp_path / "a" / ".ple" / "logps").exists()  # needed until the training is finished


def test_the_drift_of_what_is_pushed_down_is_that_of_the_loss_at_work(run, tmp_path):
    """DPO pushes the response with the lower reward down; so does the printed loss, but not without its rank set."""
    rows = [{"y_ids": [9] * 5, "y_prompt_ids": [7] * 5, "s": 0.0, "s_prompt": 20.0} for _ in range(16)]
    Store(tmp_path / "data").commit("pairs", 0, "00000-0123456789ab", table("pairs", rows), {})
    options = {"data": [tmp_path / "data"], "round": 0, "epochs": 8, "learning_rate": 1e-2, "objective": "dpo"}
    metrics = pl.read_parquet(run("down", **options) / "metrics.parquet")
    pushed, drift = metrics["drift_pushed_down"], metrics["drift_rank_y_age0"]
    assert pushed.to_list() == pytest.approx(drift.to_list())
    assert pushed[-1] < 0


def test_stable_is_short_for_two_options(run, pairs):
    short = run("short", stable=True)
    assert all(
        torch.equal(found, weights(run("long", normalize_wsft=True, trust_region=0.3))[name])
        for name, found in weights(short).items()
    )
    run("short", normalize_wsft=True, trust_region=0.3)  # the same settings: there is nothing to do
    assert (
        training.settled(Train(model="m", data=[pairs], round=0, output="o", stable=True, trust_region=1)).trust_region
        == 1
    )


@pytest.mark.parametrize(
    ("name", "set_to"),
    [
        *((name, {}) for name in ("ple", *OTHERS)),
        ("ple", {"stable": True}),
        ("dpo", {"form": "means"}),
        *(("ple-residual", {"form": "sums", **more}) for more in ({}, {"without": "rank"}, {"without": "wsft"})),
    ],
)
@pytest.mark.parametrize("full_of_trust", [False, True])
def test_it_trains_to_finite_weights_at_a_high_learning_rate(run, tmp_path, name, set_to, full_of_trust):
    data = write_pairs(tmp_path / "data", seed=4)
    if name == "qrpo":
        data = several(tmp_path / "several")
    more = set_to | ({"trust_region": 0.3} if full_of_trust else {})
    output = run(name, data=[data], objective=name, learning_rate=1e-2, epochs=4, **more)
    assert all(torch.isfinite(tensor).all() for tensor in weights(output).values())
    metrics = pl.read_parquet(output / "metrics.parquet")
    assert metrics["entropy"].drop_nulls().is_finite().all()
    assert metrics["entropy"].drop_nulls().len() >= 1


def several(root: Path) -> Path:
    """Four pairs a query."""
    numbers = np.random.default_rng(0)
    for round in (0, 1):
        rows = [
            {
                "query_id": f"q{n}", "sample": sample, "x_ids": [5, n + 3],
                **{f"{arm}_ids": numbers.integers(3, 300, 6).tolist() for arm in ("y", "y_prompt")},
                "s": float(numbers.normal()), "s_prompt": float(numbers.normal()),
            }
            for n in range(6) for sample in range(4)
        ]  # fmt: skip
        Store(root).commit("pairs", round, "00000-0123456789ab", table("pairs", rows, round), {})
    return root


def test_quantiles_are_shares_of_the_plain_rewards_of_query_and_round(tmp_path):
    data = several(tmp_path / "several")
    snapshot = freeze([data], 1, None)
    rows = pl.concat([pl.from_arrow(Store(data).read(part.shard)) for part in snapshot])
    found = plain_rewards(snapshot)
    for row in rows.iter_rows(named=True):
        own = rows.filter((pl.col("query_id") == row["query_id"]) & (pl.col("round") == row["round"]))["s"].to_list()
        assert sorted(found[row["round"], row["query_id"], row["reward_model"]].tolist()) == sorted(own)


def test_qrpo_wants_several_responses_to_a_query(run):
    with pytest.raises(UsageError, match=r"--objective qrpo compares.*ple-gen --samples 4"):
        run("alone", objective="qrpo")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"beta": 1.0}, "--objective ple has no --beta"),
        ({"form": "means"}, "--objective ple has no --form means"),
        ({"objective": "topr", "form": "means"}, "--objective topr has no --form means"),
        ({"objective": "ipo", "label_smoothing": 0.1}, "--objective ipo has no --label-smoothing"),
        ({"objective": "dpo", "stable": True}, "--stable is for the printed loss"),
        ({"objective": "dpo", "without": "rank"}, "--objective dpo has no --without"),
        ({"objective": "dpo", "full": True}, "--objective dpo needs the start policy at hand"),
    ],
)
def test_an_option_that_the_objective_does_not_have_is_refused(run, given, named):
    with pytest.raises(UsageError, match=named):
        run("refused", **given)


@pytest.mark.parametrize("name", ["ple-residual", "dpo"])
def test_resumed_equals_uninterrupted_bit_by_bit(run, monkeypatch, name):
    options = {"epochs": 2, "checkpoint_every": 4, "objective": name}
    whole = run("whole", **options)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            run("resumed", **options)
    resumed = run("resumed", **options)
    assert all(torch.equal(weights(resumed)[key], expected) for key, expected in weights(whole).items())


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "apo_zero"])
def test_dpo_and_its_kin_are_trls(policy, adapter, tmp_path, kind):
    """The loss of one batch by TRL's own trainer code on the same ids and reference, to 1e-5."""
    trl = pytest.importorskip("trl")
    name = {"sigmoid": "dpo", "ipo": "ipo", "apo_zero": "apo"}[kind]
    sequences = [s for s in batch(seed=5, empty=False) if s.tag.margin]
    model = load_policy(str(policy), adapter=str(adapter))
    count = len(sequences) // 2
    form = "means" if kind == "ipo" else "sums"  # TRL's IPO is on means
    objective = PairObjective(model, None, name, Knobs(TAU, 0.1), form)
    (part,) = micro_batches(sequences, count, 10_000, 1, 0, layout=model.layout, together=True)
    found = objective(model, part, 1)[0].item()
    config = trl.DPOConfig(
        output_dir=str(tmp_path), beta=0.1, loss_type=[kind], max_length=None, use_cpu=True,
        per_device_train_batch_size=count, report_to=[], gradient_checkpointing=False, bf16=False,
    )  # fmt: skip
    assert found == pytest.approx(trl_loss(trl, policy, adapter, sequences, config), rel=1e-5)


def trl_loss(trl, policy, adapter, sequences, config) -> float:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    class OnIds(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

    rows = []
    for plain, prompted in zip(sequences[::2], sequences[1::2], strict=True):
        better, worse = (prompted, plain) if plain.tag.margin > 0 else (plain, prompted)
        rows.append(
            {
                "prompt_ids": plain.ids[: plain.prompt].tolist(),
                "chosen_ids": better.ids[better.prompt :].tolist(),
                "rejected_ids": worse.ids[worse.prompt :].tolist(),
            }
        )
    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policy), adapter, is_trainable=True)
    trainer = OnIds(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    if "ref" in model.peft_config:
        model.delete_adapter("ref")
    inputs = trainer.data_collator(list(rows))
    return trainer.compute_loss(model, inputs).item()
