"""`ple-train` end to end on a tiny real model: equivalences, resume, the snapshot, safeguards and what is saved."""

import contextlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from ple_data.common.digests import policy_name
from ple_data.common.settings import Settings
from ple_data.storage.store import Store
from ple_train import train as training
from ple_train.engine import loop
from ple_train.engine.checkpoint import Checkpoints, training_state
from ple_train.engine.output import metrics_table
from ple_train.model import lora
from ple_train.model.batches import micro_batches
from ple_train.model.policy import load_policy
from ple_train.objectives.pairs import PairObjective
from ple_train.snapshot import freeze
from ple_train.stream import WINDOW_ROWS, PairStream, refuse_unfit_pairs
from schemas.errors import DamagedError, LockedError, PleError, UsageError
from schemas.options import Sft, Train
from schemas.records import RoundManifest
from tests import oracle
from tests.conftest import ROOT
from tests.ple_train.small_training import ROWS_PER_SHARD, stop_in_step, weights, write_pairs
from tests.tables import table


def stream(data: Path, window_rows: int = WINDOW_ROWS, **more) -> PairStream:
    options = asked(data, 1, **{"batch_size": 8} | more)
    limits = SimpleNamespace(vocabulary=300, positions=None)
    return PairStream(freeze([data], 1, options.max_length), options, limits, window_rows)


def asked(data: Path, round: int, **more) -> Train:
    return Train(model="m", data=[data], round=round, output="none", **more)


# --- the gradient, whatever the batching ---------------------------------------------------------------------------


def gradient(policy, batch, pairs, budget, layout="shared") -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and LoRA gradient of one global batch."""
    policy.layout = layout
    objective = PairObjective(policy, None)
    policy.zero_grad()
    total = 0.0
    for part in micro_batches(batch, pairs, budget, 1, 0, layout=policy.layout):
        loss, _ = objective(policy, part, 1)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in policy.trainable().items()}


def test_loss_equals_the_oracle_on_the_models_own_log_probabilities(policy, pairs):
    """Eqs. 3, 4 and 6 from stored rewards and the plain model's logits, in float64 Python."""
    rows = pl.concat([pl.from_arrow(Store(pairs).read(s)) for s in Store(pairs).shards("pairs")])
    model = AutoModelForCausalLM.from_pretrained(policy).double().eval()

    def logps(x: list[int], y: list[int]) -> list[float]:
        ids = torch.tensor(x + y)
        with torch.no_grad():
            scores = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        return scores[len(x) - 1 : -1].gather(1, ids[len(x) :, None]).squeeze(1).tolist()

    expected = oracle.batch_loss(
        [
            (r["s"], r["s_prompt"], logps(r["x_ids"], r["y_ids"]), logps(r["x_ids"], r["y_prompt_ids"]))
            for r in rows.iter_rows(named=True)
        ],
        tau=0.2,
    )
    ((batch, count),) = stream(pairs, batch_size=1000).batches(0, 0)
    found, _ = gradient(load_policy(str(policy)), batch, count, budget=10_000)
    assert found == pytest.approx(expected, rel=1e-5)


def test_shared_packed_padded_and_one_by_one_give_the_same_gradient(policy, adapter, pairs):
    batch, count = next(stream(pairs).batches(0, 0))
    expected_loss, expected = gradient(load_policy(str(policy), adapter=str(adapter)), batch, count, 1, "padded")
    for budget, layout in ((10_000, "shared"), (100, "shared"), (1, "shared"), (10_000, "packed"), (10_000, "padded")):
        loss, found = gradient(load_policy(str(policy), adapter=str(adapter)), batch, count, budget, layout)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_one_micro_batch_equals_many(run):
    once, often = run("once", microbatch_tokens=100_000), run("often", microbatch_tokens=60)
    torch.testing.assert_close(weights(once), weights(often), rtol=0, atol=1e-5)


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.long)])
def test_two_processes_equal_one(run, policy, pairs, tmp_path, launcher):
    alone = run("alone")
    launch = {
        "torchrun": ["torch.distributed.run", "--nproc-per-node=2", "--master-port=29513"],
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"],
    }[launcher]
    if launcher == "accelerate":
        launch += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=29514"]
    command = [sys.executable, "-m", *launch, "-m", "cli", "train", "--model", policy, "--data", pairs, "--round", "1"]
    command += ["--output", tmp_path / "two", "--learning-rate", "1e-3", "--batch-size", "8"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(weights(tmp_path / "two"), weights(alone), rtol=0, atol=1e-5)
    one, two = (pl.read_parquet(path / "metrics.parquet") for path in (alone, tmp_path / "two"))
    for column in ("loss", "loss_rank", "rank_share", "mean_logps_wsft_y", "drift_rank_y_age0"):
        assert two[column].drop_nulls().to_list() == pytest.approx(one[column].drop_nulls().to_list(), rel=1e-4)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"}, "FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "tensor, context"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, "several processes, and has started one"),
    ],
)
def test_a_launcher_that_shards_or_starts_too_few_is_refused(run, monkeypatch, tmp_path, given, named):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"{named}.*torchrun --nproc-per-node {given.get('WORLD_SIZE', 'N')} "):
        run("launched")
    assert not (tmp_path / "launched").exists()


GROUPLESS = [
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE make no group"),
    ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE, RANK, LOCAL_RANK make no group"),
    ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE, RANK make no group"),
    ({"RANK": "0", "LOCAL_RANK": "0"}, "RANK, LOCAL_RANK make no group"),
    ({"WORLD_SIZE": "0"}, "the launcher says 0 processes, and 1 work together"),
]
IN_FORKS = """
import json, os, sys
from ple_train.engine.loop import make_accelerator
for given in json.load(sys.stdin):
    if not os.fork():
        os.environ.update(given)
        try:
            make_accelerator()
        except Exception as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(0)
    os.wait()
"""


def test_variables_of_a_launcher_that_make_no_group_of_processes_are_named():
    known = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "MASTER_PORT")}
    told = json.dumps([given for given, _ in GROUPLESS])
    how = {"input": told, "capture_output": True, "text": True, "timeout": 120}
    ended = subprocess.run([sys.executable, "-c", IN_FORKS], env=known | {"PYTHONPATH": str(ROOT)}, **how)
    for line, (_, said) in zip(ended.stdout.splitlines(), GROUPLESS, strict=True):
        assert line.startswith(f"UsageError: {said}")


# --- the stream ----------------------------------------------------------------------------------------------------


def keys(batches) -> list[list[tuple]]:
    return [sorted((s.tag.arm, tuple(s.ids.tolist())) for s in sequences) for sequences, _ in batches]


@pytest.mark.parametrize("window_rows", [1, 10, 10_000])
@pytest.mark.parametrize("batch_size", [1, 8, 1000])
def test_an_epoch_holds_every_pair_once_and_can_start_anywhere(pairs, window_rows, batch_size):
    whole = stream(pairs, window_rows=window_rows, batch_size=batch_size)
    batches = keys(whole.batches(3, 0))
    assert len(batches) == whole.steps_per_epoch
    found = [key for batch in batches for key in batch]
    assert len(found) == len(set(found)) == 2 * whole.pairs == 2 * 6 * ROWS_PER_SHARD
    for start in (1, 2, whole.steps_per_epoch):
        assert keys(whole.batches(3, start)) == batches[start:]


def test_the_order_is_a_function_of_seed_and_epoch(pairs):
    def order(seed, epoch):
        return keys(stream(pairs, seed=seed).batches(epoch, 0))

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_a_short_last_batch_is_divided_by_its_own_pairs(pairs):
    assert [count for _, count in stream(pairs, batch_size=40).batches(0, 0)] == [40, 2]


def test_sets_ages_and_coefficients_come_from_the_partition(pairs):
    rows = pl.concat([pl.from_arrow(Store(pairs).read(s)) for s in Store(pairs).shards("pairs")])
    expected = {}
    for r in rows.iter_rows(named=True):
        of = oracle.row(r["s"], r["s_prompt"], len(r["y_ids"]), len(r["y_prompt_ids"]), tau=0.2 * 0.9)
        expected["y", *r["x_ids"], *r["y_ids"]] = (of.set, 1 - r["round"], of.c)
        expected["y_prompt", *r["x_ids"], *r["y_prompt_ids"]] = (of.set, 1 - r["round"], of.c_prompt)
    for sequences, _ in stream(pairs).batches(0, 0):
        for s in sequences:
            kind, age, coefficient = expected[s.tag.arm, *s.ids.tolist()]
            assert (s.tag.set, s.tag.age) == (kind, age)
            assert s.tag.coefficient == pytest.approx(coefficient, rel=1e-12)


def test_a_round_with_all_or_no_pairs_in_the_rank_set_is_warned_of(tmp_path, capsys):
    store = Store(tmp_path / "data")
    margins = {0: [1.0, 2.0], 1: [-1.0, 1.0], 2: [0.0, 0.1]}
    for t, found in margins.items():
        rows = [{"query_id": f"q{n}", "s": 0.0, "s_prompt": margin} for n, margin in enumerate(found)]
        store.commit("pairs", t, "00000-0123456789ab", table("pairs", rows, t), {})
    training.print_partition(freeze([store.root], 2, None), asked(store.root, 2))
    said = capsys.readouterr().err
    assert "6 pairs of 3 rounds, tau_2 = 0.162" in said
    assert "round 0: all of the 2 rows in the rank set" in said
    assert "round 2: none of the 2 rows in the rank set" in said
    assert "round 1:" not in said


@pytest.mark.parametrize(
    ("settings", "method", "noted"),
    [
        ({"without": "rank"}, "ple without rank", True),
        ({"objective": "ple-residual", "without": "rank"}, "ple-residual without rank", False),
        ({"objective": "dpo"}, "dpo", False),
    ],
)
def test_without_a_rank_set_no_threshold_is_named(tmp_path, capsys, settings, method, noted):
    """The paper's ablation has plain responses alone: that is said there, and nowhere else."""
    store = Store(tmp_path / "data")
    rows = [{"query_id": "q", "s": 0.0, "s_prompt": 1.0, "principle": "be kind"}]
    store.commit("pairs", 0, "00000-0123456789ab", table("pairs", rows, 0), {})
    training.print_partition(freeze([store.root], 0, None), asked(store.root, 0, **settings))
    said = capsys.readouterr().err
    assert said.splitlines()[0] == f"1 pairs of 1 round, by {method}"
    assert ("this method has plain responses alone" in said) == noted


def test_without_the_weighted_set_it_is_said_which_pairs_are_left_out(pairs, capsys):
    training.print_partition(freeze([pairs], 1, None), asked(pairs, 1, without="wsft"))
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith("tau_1 = 0.18, by ple without wsft")
    assert said[1] == "without wsft: pairs outside the rank set are left out"


def test_pairs_over_max_length_are_left_out_and_counted(run, pairs, capsys):
    rows = pl.concat([pl.from_arrow(Store(pairs).read(s)) for s in Store(pairs).shards("pairs")])
    longest = (
        pl.max_horizontal(pl.col("y_ids").list.len(), pl.col("y_prompt_ids").list.len()) + pl.col("x_ids").list.len()
    )
    over = rows.filter(longest > 20).height
    assert 0 < over < rows.height
    assert stream(pairs, max_length=20).pairs == rows.height - over
    run("short", max_length=20)
    assert f"{over} pairs left out" in capsys.readouterr().err
    assert training.statistics(asked(pairs, 1, max_length=20))["rows"].sum() == rows.height - over
    shown, whole = (training.dry_run(asked(pairs, 1, max_length=length)) for length in (20, None))
    assert shown != whole


def test_a_dry_run_says_where_the_median_margin_rests_under_beta(pairs):
    medians = training.statistics(asked(pairs, 1)).sort("round")["margin_q50"]
    told = training.dry_run(asked(pairs, 1, objective="ple-residual"))
    for t, median in enumerate(medians):
        assert re.search(rf"beta = 0.05: .* {median / 0.05:.3f} in round {t}", told)
    assert "comes to rest" not in training.dry_run(asked(pairs, 1))
    assert "comes to rest" not in training.dry_run(asked(pairs, 1, objective="dpo", beta=0.1))


# --- interruption --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint_every", [1, 4])
def test_resumed_equals_uninterrupted_bit_by_bit(run, monkeypatch, checkpoint_every):
    options = {"epochs": 2, "checkpoint_every": checkpoint_every, "trust_region": 0.05}
    whole = run("whole", **options)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            run("resumed", **options)
    resumed = run("resumed", **options)
    for name, expected in weights(whole).items():
        assert torch.equal(weights(resumed)[name], expected), name
    timing = pl.exclude("seconds", "tokens_per_second")
    metrics = [pl.read_parquet(path / "metrics.parquet").select(timing) for path in (whole, resumed)]
    assert metrics[0].equals(metrics[1])


def test_shards_that_come_later_are_not_seen(run, policy, tmp_path, monkeypatch):
    data = write_pairs(tmp_path / "growing", seed=1)
    with monkeypatch.context() as patch:
        patch.setattr("ple_train.engine.session.load_policy", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run("frozen", data=[data])
    write_pairs(data, seed=2)
    expected = run("expected", data=[write_pairs(tmp_path / "growing-copy", seed=1)])
    found = run("frozen", data=[data])
    assert all(torch.equal(weights(found)[name], value) for name, value in weights(expected).items())


def test_starting_over_forgets_the_shards_at_once(run, tmp_path, monkeypatch):
    """Killed before it has found the new ones; what goes on then sees them all."""

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    data = write_pairs(tmp_path / "growing", seed=1)
    for place, more in (("ple_train.engine.session.load_policy", {}), ("ple_train.snapshot.freeze", {"resume": False})):
        with monkeypatch.context() as patch:
            patch.setattr(place, killed)
            with pytest.raises(KeyboardInterrupt):
                run("again", data=[data], **more)
        write_pairs(data, seed=2)
    found, expected = weights(run("again", data=[data])), weights(run("expected", data=[data]))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_finished_output_is_left_alone_and_other_settings_are_refused(run, capsys):
    output = run("done")
    before = (output / "adapter_model.safetensors").stat().st_mtime_ns
    run("done")
    assert "complete already" in capsys.readouterr().err
    assert (output / "adapter_model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match=r"learning_rate: 0.001 then, 0.5 now"):
        run("done", learning_rate=0.5)
    run("done", learning_rate=1e-4, resume=False)
    assert (output / "adapter_model.safetensors").stat().st_mtime_ns != before


def test_what_a_kill_at_the_end_left_is_removed_by_the_next_call(run):
    private = run("done") / ".ple"
    for folder in ("writing", "checkpoints/checkpoint-00000003", "checkpoints/writing", "trl"):
        (private / folder).mkdir(parents=True)
        (private / folder / "left").write_text("")
    run("done")
    assert sorted(path.name for path in private.iterdir()) == ["lock", "snapshot.json"]


@pytest.mark.parametrize("name", ["../kept.txt", "{outside}/kept.txt", "a/../../kept.txt", ".."])
def test_a_record_never_removes_what_lies_outside(run, tmp_path, name):
    kept = tmp_path / "kept.txt"
    kept.write_text("mine")
    record = run("done") / "ple.json"
    fields = json.loads(record.read_text())
    fields["files"][name.format(outside=tmp_path)] = "0" * 64
    record.write_text(json.dumps(fields))
    with pytest.raises(DamagedError, match=r"ple\.json: .*files"):
        run("done")
    run("done", resume=False)
    assert kept.read_text() == "mine"


@pytest.mark.parametrize("name", [".ple", ".ple/writing", ".ple/checkpoints", ".ple/lock"])
def test_links_in_an_output_are_neither_followed_nor_emptied(run, tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "checkpoint-00000001").mkdir(parents=True)
    (elsewhere / "kept.txt").write_text("mine")
    place = tmp_path / "out" / name
    place.parent.mkdir(parents=True)
    place.symlink_to(elsewhere / "kept.txt" if name.endswith("lock") else elsewhere)
    for resume in (True, False):
        with pytest.raises(PleError, match="links lead to"):
            run("out", resume=resume)
    assert sorted(path.name for path in elsewhere.iterdir()) == ["checkpoint-00000001", "kept.txt"]
    assert (elsewhere / "kept.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "change",
    [
        lambda at: (at / "state.json").write_text((at / "state.json").read_text().replace('"step": 2', '"step": 1')),
        lambda at: save_file({"other": torch.zeros(1)}, at / "weights.safetensors"),
        lambda at: save_file({"other|step": torch.zeros(1)}, at / "optimizer.safetensors"),
        lambda at: (at / "metrics.parquet").write_bytes(b"no table"),
    ],
)
def test_a_checkpoint_that_was_changed_is_one_sentence(run, monkeypatch, tmp_path, change):
    with monkeypatch.context() as patch:
        stop_in_step(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run("changed", checkpoint_every=1)
    change(tmp_path / "changed" / ".ple" / "checkpoints" / "checkpoint-00000002")
    with pytest.raises(
        DamagedError, match=r"checkpoint-00000002.*delete checkpoint-00000002, or rerun with --no-resume"
    ):
        run("changed", checkpoint_every=1)


def test_a_checkpoint_that_the_system_does_not_give_is_not_called_damaged(run, monkeypatch):
    def fails(*_):
        raise OSError("Too many open files (os error 24)")

    with monkeypatch.context() as patch:
        stop_in_step(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run("open", checkpoint_every=1)
    monkeypatch.setattr("ple_train.engine.checkpoint.load_file", fails)
    with pytest.raises(
        PleError, match=r"weights.safetensors: cannot read \(Too many open files\): raise the limit"
    ) as caught:
        run("open", checkpoint_every=1)
    assert caught.value.exit_code == 1


def test_two_trainings_cannot_write_one_output(run, tmp_path):
    (tmp_path / "busy" / ".ple").mkdir(parents=True)
    holder = subprocess.Popen(
        ["flock", str(tmp_path / "busy" / ".ple" / "lock"), "sleep", "60"], stdout=subprocess.DEVNULL
    )
    try:
        while subprocess.run(["flock", "-n", str(tmp_path / "busy" / ".ple" / "lock"), "true"]).returncode == 0:
            pass
        with pytest.raises(LockedError, match="locked by"):
            run("busy")
    finally:
        holder.kill()
        holder.wait()


def test_another_command_does_not_take_over_a_snapshot(run, tmp_path, monkeypatch):
    """Killed before the first checkpoint, then started with other data: refused, not trained on the old rows."""
    with monkeypatch.context() as patch:
        patch.setattr("ple_train.engine.session.load_policy", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run("taken")
    other = write_pairs(tmp_path / "other", seed=5)
    with pytest.raises(UsageError, match=r"--data .*/other: shard .* is gone or changed"):
        run("taken", data=[other])
    expected = weights(run("untaken", data=[other]))
    found = weights(run("taken", data=[other], resume=False))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_store_that_was_added_on_the_way_is_refused(run, pairs, tmp_path, monkeypatch):
    """Also by a finished training: neither has seen it."""
    other = write_pairs(tmp_path / "added", seed=5)
    with monkeypatch.context() as patch:
        patch.setattr("ple_train.engine.session.load_policy", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run("begun")
    for finished in (False, True):
        with pytest.raises(UsageError, match="added was not there when this training began"):
            run("begun", data=[pairs, other])
        if not finished:
            run("begun")


def test_a_number_type_that_was_chosen_stays_before_the_first_checkpoint_too(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("ple_train.engine.session.resolve_precision", lambda _: "bf16")
        patch.setattr("ple_train.engine.session.load_policy", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run("chosen")
    output = run("chosen")
    assert json.loads((output / "ple.json").read_text())["settings"]["precision"] == "bf16"
    with pytest.raises(UsageError, match="precision: 'bf16' then, 'float32' now"):
        run("chosen", precision="float32")


def test_a_damaged_record_is_named_and_started_over(run):
    output = run("damaged")
    (output / "ple.json").write_text("{")
    with pytest.raises(DamagedError, match="restore it, or rerun with --no-resume"):
        run("damaged")
    assert run("damaged", resume=False) == output
    assert json.loads((output / "ple.json").read_text())["steps"] > 0


def test_another_commands_checkpoint_is_refused(run, policy, tmp_path):
    """Killed SFT of the same settings, as far as both have them."""
    output = run("mine", checkpoint_every=1)
    settings = Settings.of(Train(model=str(policy), data=[tmp_path], round=0, output=output))
    other = Checkpoints(tmp_path / "theirs", Settings(Sft, settings.values))
    model = torch.nn.Linear(2, 2)
    named, optimizer = dict(model.named_parameters()), torch.optim.AdamW(model.parameters())
    other.save(3, *training_state(named, optimizer), [{"step": 3}])
    with pytest.raises(UsageError, match=r"is another command's \(Sft\)"):
        Checkpoints(tmp_path / "theirs", settings).restore(named, optimizer)


def test_starting_over_leaves_nothing_of_the_old_training(run):
    run("again")
    output = run("again", full=True, resume=False)
    assert (output / "model.safetensors").is_file()
    assert not list(output.glob("adapter_*"))


# --- safeguards ----------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(run, tmp_path):
    with pytest.raises(PleError, match=r"stopped, the last good checkpoint is .*checkpoint-\d+.*--trust-region"):
        run("diverged", learning_rate=1e30, checkpoint_every=1, max_grad_norm=1e30)
    assert not (tmp_path / "diverged" / "adapter_config.json").exists()
    assert list((tmp_path / "diverged" / ".ple" / "checkpoints").glob("checkpoint-*"))


@pytest.fixture
def one_sided(tmp_path):
    """A store in which every y_prompt is pushed down as hard as can be."""
    rows = [{"y_ids": [9], "y_prompt_ids": [7] * 12, "s": 20.0, "s_prompt": -20.0} for _ in range(64)]
    Store(tmp_path / "one-sided").commit("pairs", 0, "00000-0123456789ab", table("pairs", rows), {})
    return {"data": [tmp_path / "one-sided"], "round": 0, "epochs": 4}


def test_the_trust_region_bounds_the_drift(run, one_sided):
    options = one_sided | {"learning_rate": 1e-2}
    free = pl.read_parquet(run("free", **options) / "metrics.parquet")
    bound = pl.read_parquet(run("bound", **options, trust_region=0.3) / "metrics.parquet")
    assert free["gated_share"].max() == 0
    assert bound["gated_share"].max() > 0
    assert bound["drift_pushed_down"].min() > free["drift_pushed_down"].min() + 1


def test_a_runaway_of_pushed_down_responses_is_warned_of_once(run, one_sided, capsys):
    run("runaway", **one_sided, learning_rate=0.1)
    assert capsys.readouterr().err.count("--trust-region 0.3 or a lower --learning-rate") == 1


@pytest.mark.parametrize("option", [{"normalize_wsft": True}, {"sft_anchor": 1.0}, {"trust_region": 0.01}])
def test_each_safeguard_changes_the_result(run, option):
    plain, changed = weights(run("plain")), weights(run("changed", **option))
    assert any(not torch.equal(plain[name], changed[name]) for name in plain)


# --- what is saved and refused -------------------------------------------------------------------------------------


def test_the_output_is_a_peft_adapter_that_continues_in_the_next_round(run, policy):
    from peft import PeftModel
    from transformers import AutoTokenizer

    first = run("first", round=0)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policy), first)
    assert model.peft_config["default"].r == 8
    assert AutoTokenizer.from_pretrained(first).eos_token_id is not None
    card = (first / "README.md").read_text()
    assert "library_name: peft" in card
    record = json.loads((first / "ple.json").read_text())
    assert record["settings"]["round"] == 0
    chosen = {"device": "cpu", "precision": "float32", "attention": "ple_packed", "layout": "shared"}
    assert record["machine"] == chosen
    second = run("second", round=1, adapter=str(first))
    assert any(not torch.equal(weights(first)[name], value) for name, value in weights(second).items())


def test_mixed_precision_runs_in_bf16_and_stays_near_float32(run, monkeypatch):
    """The first step's loss is that of float32 up to the rounding of bfloat16; hidden states and products are in it."""
    seen = []
    product, objective = lora._LowRankSum.forward, PairObjective.__call__

    def forward(ctx, x, *rest):
        seen.append(x.dtype)
        return product(ctx, x, *rest)

    def call(*arguments):
        seen.clear()  # what the probe did
        return objective(*arguments)

    monkeypatch.setattr(lora._LowRankSum, "forward", staticmethod(forward))
    monkeypatch.setattr(PairObjective, "__call__", call)
    first = {}
    for precision in ("float32", "bf16"):
        first[precision] = pl.read_parquet(run(precision, precision=precision) / "metrics.parquet")["loss"][0]
        assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert first["bf16"] == pytest.approx(first["float32"], rel=0.02)


def test_full_fine_tuning_writes_a_whole_model_and_mixed_precision_trains(run, policy):
    output = run("full", full=True, precision="bf16", gradient_checkpointing=True)
    trained = AutoModelForCausalLM.from_pretrained(output)
    start = AutoModelForCausalLM.from_pretrained(policy)
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), start.parameters(), strict=True))


def test_metrics_are_per_step_numbers(run):
    metrics = pl.read_parquet(run("metrics") / "metrics.parquet")
    assert metrics["step"].to_list() == list(range(1, 7))
    assert metrics["useful_token_share"].to_list() == [1.0] * 6
    for column in ("loss", "grad_norm", "rank_share", "tokens_per_second", "mean_logps_rank_y", "drift_wsft_y_age1"):
        assert metrics[column].dtype == pl.Float64
    assert (metrics["loss_rank"] + metrics["loss_wsft"]).to_list() == pytest.approx(metrics["loss"].to_list(), rel=1e-5)


def test_a_metric_that_comes_with_a_later_step_is_kept(tmp_path):
    """In the table and in a checkpoint."""
    history = [{"step": 1}, {"step": 2, "late": 0.5}]
    assert metrics_table(history)["late"].to_pylist() == [None, 0.5]
    checkpoints = Checkpoints(tmp_path, Settings(Train, {}))
    model = torch.nn.Linear(2, 2)
    named, optimizer = dict(model.named_parameters()), torch.optim.AdamW(model.parameters())
    checkpoints.save(2, *training_state(named, optimizer), history)
    assert checkpoints.restore(named, optimizer) == (2, [{"step": 1, "late": None}, {"step": 2, "late": 0.5}])


def test_tensorboard_gets_the_metrics(run):
    output = run("tracked", report_to="tensorboard")
    assert list(output.rglob("events.out.tfevents.*"))


def metrics_of(output: Path) -> dict[int, dict[str, float]]:
    return {row["step"]: row for row in pl.read_parquet(output / "metrics.parquet").to_dicts()}


def test_mlflow_gets_the_metrics_of_every_step(run, tmp_path, monkeypatch, capsys):
    """The client's own store of files, where tracking servers keep what clients send them."""
    mlflow = pytest.importorskip("mlflow", reason="pip install 'ple-align[mlflow]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    with pytest.raises(UsageError, match=r"--report-to mlflow cannot begin .*: set MLFLOW_TRACKING_URI to the address"):
        run("refused", report_to="mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    output = run("tracked", report_to="mlflow")
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'ple'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("tracked", "FINISHED")
    assert found.data.params["objective"] == "ple"
    sent = {m.step: m.value for m in client.get_metric_history(found.info.run_id, "loss")}
    assert sent == {step: pytest.approx(row["loss"]) for step, row in metrics_of(output).items()}
    assert capsys.readouterr().out == ""


def test_trackio_gets_the_metrics_of_every_step(policy, pairs, tmp_path, run_ple):
    pytest.importorskip("trackio", reason="pip install 'ple-align[trackio]'")
    output = tmp_path / "tracked"
    words = ["train", "--model", policy, "--data", pairs, "--round", 1, "--batch-size", 8, "--output", output]
    found = run_ple(*words, "--report-to", "trackio", env={"TRACKIO_DIR": str(tmp_path / "trackio")})
    assert (found.returncode, found.stdout) == (0, ""), found.stderr
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "ple.db")) as database:
        rows = database.execute("SELECT step, run_name, metrics FROM metrics ORDER BY step").fetchall()
    assert {name for _, name, _ in rows} == {"tracked"}
    sent = {step: json.loads(metrics)["loss"] for step, _, metrics in rows}
    assert sent == {step: pytest.approx(row["loss"]) for step, row in metrics_of(output).items()}


def test_a_tracker_that_fails_ends_no_training(run, monkeypatch, capsys):
    from accelerate.tracking import TensorBoardTracker

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    output = run("alone", report_to="tensorboard")
    said = [line for line in capsys.readouterr().err.splitlines() if "the server is gone" in line]
    assert len(said) == 1
    assert "training goes on without it" in said[0]
    assert metrics_of(output).keys() == metrics_of(run("untracked")).keys()


def test_a_round_without_pairs_is_named(run, tmp_path):
    with pytest.raises(UsageError, match="no pairs of round 2"):
        run("absent", round=2)
    with pytest.raises(UsageError, match=r"no pairs of round 0 in .*empty"):
        run("none", data=[tmp_path / "empty"])
    assert not (tmp_path / "empty").exists()


def test_a_round_far_beyond_those_that_are_there_is_one_sentence_soon(pairs):
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match="no pairs of round 2 in"):
            freeze([pairs], 10**7, None)
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


def test_pairs_of_another_tokenizer_are_refused(run, tmp_path):
    row = {"y_ids": [5, 999]}
    Store(tmp_path / "foreign").commit("pairs", 0, "00000-0123456789ab", table("pairs", [row]), {})
    with pytest.raises(UsageError, match=r"query 'q0' of round 0: x and y hold token 999"):
        run("foreign-tokens", data=[tmp_path / "foreign"], round=0)


def test_trust_region_and_full_do_not_go_together(run):
    with pytest.raises(UsageError, match="adapter off"):
        run("both", trust_region=0.3, full=True)


def test_a_store_given_twice_is_refused(run, pairs):
    with pytest.raises(UsageError, match="more than once"):
        run("twice", data=[pairs, pairs])


def test_pairs_that_stand_in_two_stores_are_not_counted_twice(run, pairs, tmp_path, capsys):
    """A copy is refused; of stores that share some pairs the number is said."""
    copy = shutil.copytree(pairs, tmp_path / "copy")
    with pytest.raises(UsageError, match=rf"{stream(pairs).pairs} pairs .* count twice: it is a copy"):
        run("copied", data=[pairs, copy])
    shards = Store(copy).shards("pairs")
    first = shards[0]
    for shard in shards[1:]:
        shard.path.unlink()
        Store(copy).record_path("pairs", shard.round, shard.unit).unlink()
    rows = pl.read_parquet(first.path).with_columns(query_id="new-" + pl.col("query_id"))
    Store(copy).commit("pairs", first.round, "00009-0123456789ab", rows.to_arrow(), {})
    run("shared", data=[pairs, copy])
    assert f"warning: {first.rows} pairs" in capsys.readouterr().err


def test_what_the_machine_is_given_may_change_on_the_way(run, monkeypatch):
    """Stopped in step 4, gone on with other micro-batches and checkpointing: the same weights up to rounding."""
    whole = run("whole", checkpoint_every=1)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            run("machine", checkpoint_every=1)
    changed = run("machine", checkpoint_every=2, microbatch_tokens=64, gradient_checkpointing=True)
    for name, expected in weights(whole).items():
        torch.testing.assert_close(weights(changed)[name], expected, rtol=0, atol=1e-5)


def test_an_adapter_of_another_rank_than_asked_is_refused(run, adapter):
    with pytest.raises(UsageError, match=r"has rank 8 .*--lora-rank is 4"):
        run("rank", adapter=str(adapter), lora_rank=4)
    assert (run("merged", adapter=str(adapter), lora_rank=4, full=True) / "model.safetensors").exists()


def test_pairs_longer_than_the_model_has_positions_are_named(run, tmp_path):
    row = {"y_ids": [5] * 2100}
    Store(tmp_path / "long").commit("pairs", 0, "00000-0123456789ab", table("pairs", [row]), {})
    with pytest.raises(UsageError, match=r"query 'q0' of round 0: x and y have 2103 tokens.*--max-length 2048"):
        run("long-rows", data=[tmp_path / "long"], round=0)


def test_pairs_of_empty_responses_alone_train_nothing_and_break_nothing(run, tmp_path):
    rows = [{"y_ids": [], "y_prompt_ids": [], "y_empty": True, "y_prompt_empty": True} for _ in range(3)]
    Store(tmp_path / "empty-pairs").commit("pairs", 0, "00000-0123456789ab", table("pairs", rows), {})
    metrics = pl.read_parquet(run("nothing", data=[tmp_path / "empty-pairs"], round=0) / "metrics.parquet")
    assert metrics["loss"].to_list() == [0.0]


def test_metrics_of_two_rounds_read_together(run, tmp_path):
    for t in (0, 1):
        run(f"round-{t}", round=t, metrics=tmp_path / "metrics" / f"round={t:03d}.parquet")
    together = pl.scan_parquet(tmp_path / "metrics" / "*.parquet").collect()
    assert together["drift_rank_y_age1"].dtype == pl.Float64


def test_the_launchers_own_accumulation_setting_changes_nothing(run, monkeypatch):
    expected = weights(run("without"))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    found = weights(run("with"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_tracker_that_is_not_installed_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"--report-to wandb writes with wandb, .* pip install 'ple-align\[wandb\]'"):
        run("untracked", report_to="wandb")


def test_learning_rate_schedule_by_hand():
    """Warm-up 2 of 6 steps: 0.5, 1; then cosine over 4: 1, (1 + cos 45°)/2, 0.5, (1 - cos 45°)/2 of 1.0."""
    settings = loop.Loop(learning_rate=1.0, warmup_steps=2, schedule="cosine")
    rates = [loop.learning_rate_at(step, 6, settings) for step in range(6)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447], abs=1e-6)


# --- what the store's records know ---------------------------------------------------------------------------------


def asked_for(data: Path, queries: int, **settings: object) -> None:
    """The record of round 1, as ple-gen writes it."""
    manifest = RoundManifest(round=1, settings={"samples": 2, **settings}, counts={"queries_taken": queries})
    Store(data).save_manifest(manifest)


def test_a_round_that_has_not_come_to_its_end_is_said(run, tmp_path, capsys):
    data = write_pairs(tmp_path / "half-data")
    asked_for(data, queries=400)
    run("half", data=[data])
    warning = f"warning: round 1 of {data} has 21 of its 800 pairs: ple-gen or ple-score has not come to its end"
    assert warning in capsys.readouterr().err
    training.dry_run(asked(data, 1))
    assert warning in capsys.readouterr().err
    whole = write_pairs(tmp_path / "whole-data", shards=2)
    asked_for(whole, queries=7)
    run("whole", data=[whole])
    assert "has not come to its end" not in capsys.readouterr().err


def test_pairs_that_came_after_a_finished_training_are_said(run, tmp_path, capsys):
    data = write_pairs(tmp_path / "growing")
    run("done", data=[data])
    run("done", data=[data])
    assert "have come since" not in capsys.readouterr().err
    write_pairs(data, seed=1)
    run("done", data=[data])
    assert "note: 42 pairs have come since it began" in capsys.readouterr().err


def test_another_sampler_than_the_policy_is_said(run, policy, adapter, tmp_path, capsys):
    """The adapter that sampled the newest round is forgotten: the likeliest slip where rounds are run by hand."""
    data = write_pairs(tmp_path / "sampled", rounds=1)
    provenance = {"policy": policy_name(policy, adapter)}
    Store(data).commit("pairs", 1, "00000-00000000000a", table("pairs", [{"query_id": "new"}], 1), provenance)
    run("forgotten", data=[data])
    assert "warning: round 1 of" in (said := capsys.readouterr().err)
    assert f"was sampled by {policy_name(policy, adapter)}, but training starts from {policy_name(policy)}" in said
    run("given", data=[data], adapter=str(adapter))
    assert "was sampled by" not in capsys.readouterr().err


def test_a_pair_that_is_too_long_stops_training_before_its_first_step(run, tmp_path):
    """The model has 2,048 positions. With --max-length the pair is left out."""
    data = write_pairs(tmp_path / "long-data")
    row = {"query_id": "long", "y_ids": [5] * 2100}
    Store(data).commit("pairs", 1, "00009-0123456789ab", table("pairs", [row], 1), {})
    with pytest.raises(UsageError, match=r"query 'long' of round 1: x and y have 2103 tokens, over the 2048 positions"):
        run("long", data=[data], checkpoint_every=1)
    assert not list((tmp_path / "long").rglob("checkpoint-*"))
    run("cut", data=[data], max_length=2048)


def test_rounds_that_the_same_base_model_sampled_are_not_read_for_that(policy, adapter, tmp_path):
    """ple-gen has seen to it that they fit; what was put there by hand is refused when its turn comes."""
    data = write_pairs(tmp_path / "data", rounds=1)
    row = {"query_id": "long", "y_ids": [5] * 2100}
    Store(data).commit("pairs", 0, "00009-0123456789ab", table("pairs", [row]), {})
    own = policy_name(policy, adapter)
    Store(data).save_manifest(RoundManifest(round=0, settings={"policy": own}))
    limits = SimpleNamespace(vocabulary=300, positions=2048)
    refuse_unfit_pairs(freeze([data], 0, None), limits, None, policy_name(policy))
    with pytest.raises(UsageError, match="query 'long' of round 0"):
        refuse_unfit_pairs(freeze([data], 0, None), limits, None, "other@0123456789ab")
    options = asked(data, 0, batch_size=8)
    late = PairStream(freeze([data], 0, None), options, limits)
    with pytest.raises(UsageError, match="query 'long' of round 0"):
        list(late.batches(0, 0))


def test_an_output_that_is_something_else_is_left_alone(run, policy, tmp_path):
    sft = tmp_path / "sft"
    sft.mkdir()
    (sft / "ple.json").write_text(json.dumps({"version": 1, "kind": "sft", "settings": {}, "steps": 1, "files": {}}))
    for resume in (True, False):
        with pytest.raises(UsageError, match=r"is the result of another command \(sft\): use another --output"):
            run("sft", resume=resume)
    assert (sft / "ple.json").exists()
    baseline = json.loads((sft / "ple.json").read_text()) | {"kind": "baseline"}
    (sft / "ple.json").write_text(json.dumps(baseline))
    with pytest.raises(UsageError, match=r"another command \(baseline\): use another --output, or rerun with --no-res"):
        run("sft")
    assert json.loads((run("sft", resume=False) / "ple.json").read_text())["kind"] == "ple"
    model = shutil.copytree(policy, tmp_path / "model")
    before = sorted(model.iterdir())
    with pytest.raises(UsageError, match="is the --model itself"):
        run("model", model=str(model), resume=False)
    assert sorted(model.iterdir()) == before
