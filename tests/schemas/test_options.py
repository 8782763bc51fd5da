"""Options are stated once: the command line, the recipe and the records are made from the same dataclasses."""

import enum
import json
from dataclasses import MISSING
from pathlib import Path

import click
import pytest

import cli
from ple_data.common.settings import Settings, counted
from schemas import options
from schemas.errors import DamagedError, UsageError
from schemas.options import Dpo, Gen, Loop, Options, Reward, Sampling, Sft, Train, about, flag, is_repeated
from schemas.recipe import STAGES
from schemas.records import RoundManifest, read_record
from schemas.training import CheckpointState, Snapshot, Trained

COMMANDS = {
    **{"gen": Gen, "score": options.Score, "train": Train, "sft": Sft, "reward": Reward, "run": options.Run},
    **{"eval": options.Evaluate, "cases": options.Cases, "judge": options.Judge, "inspect": options.Inspect},
    **{"export": options.Export, "verify": options.Verify, "purity": options.Purity, "report": options.Report},
    **{"demo": options.Demo, "import": options.Import, "push": options.Push},
    "convert": options.Convert,
}
BASELINES = {
    **{"sft": options.BaselineSft, "context-distillation": options.ContextDistillation, "raft": options.Baseline},
    **{"dpo": Dpo, "ppo": options.Ppo},
}
CASES = [
    *((cli.ple.commands[name], kind) for name, kind in COMMANDS.items()),
    *((cli.baseline.commands[name], kind) for name, kind in BASELINES.items()),
]


def test_every_command_is_here():
    assert cli.ple.commands.keys() - COMMANDS.keys() == {"baseline"}
    assert cli.baseline.commands.keys() == BASELINES.keys()


@pytest.mark.parametrize(("command", "kind"), CASES, ids=lambda value: getattr(value, "name", ""))
def test_the_command_line_offers_its_options_with_their_defaults(command: click.Command, kind: type[Options]):
    shown = {parameter.name: parameter for parameter in command.params if parameter.expose_value}
    stated = {known.name: known for known in kind.in_order() if about(known).offered}
    assert shown.keys() == stated.keys()
    for name, known in stated.items():
        assert shown[name].required == (known.default is MISSING), name
        if known.default is not MISSING:
            assert default(shown[name]) == known.default, name
        if not about(known).positional:
            assert flag(known) in shown[name].opts


def default(option: click.Parameter) -> object:
    value = option.get_default(click.Context(cli.ple))
    return (() if option.multiple else None) if isinstance(value, enum.Enum) else value  # click's mark for "not given"


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_the_recipe_has_the_options_of_the_stages_command_and_its_defaults(stage: str):
    kinds = {**COMMANDS, "baseline": options.Baseline}
    own = {known.name: known for known in kinds[stage].in_order()}
    of_methods = {"beta": Dpo, "via": Dpo, "on_policy": options.ContextDistillation} if stage == "baseline" else {}
    own |= {name: kind.__dataclass_fields__[name] for name, kind in of_methods.items()}
    for name, field in STAGES[stage].model_fields.items():
        if name in ("command", "method", "launch", "server") or field.is_required():
            continue
        known = own[name]
        found = field.get_default(call_default_factory=True)
        assert found == (type(found)() if is_repeated(known) else known.default), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1, not 0"),
        ({"learning_rate": 0}, "--learning-rate must be above 0, not 0"),
        ({"learning_rate": float("nan")}, "--learning-rate must be"),
        ({"alpha": 1.0}, "--alpha must be below 1, not 1.0"),
        ({"schedule": "linear"}, "--schedule must be one of constant, cosine, not linear"),
    ],
)
def test_a_value_that_an_option_does_not_take_is_refused_in_python_too(change: dict, message: str):
    with pytest.raises(UsageError, match=message):
        Train(model="m", data=["d"], round=0, output="o", **change)


def test_paths_and_lists_may_be_given_as_text_and_lists():
    made = Train(model="m", data=["a", Path("b")], round=0, output="o")
    assert (made.data, made.output) == ((Path("a"), Path("b")), Path("o"))
    assert made.part(Loop) == Loop()


SETTINGS = Settings.of(Train(model="m", data=["d"], round=0, output="o"), elsewhere=["data"], weights="m@0123456789ab")


def test_a_setting_that_an_older_record_lacks_is_its_default():
    then = {name: value for name, value in SETTINGS.values.items() if name not in ("warmup_steps", "schedule")}
    assert SETTINGS.differences(then) == []
    changed = Settings(Train, SETTINGS.values | {"warmup_steps": 3}, ["data"])
    assert changed.differences(then) == ["warmup_steps: 0 then, 3 now"]


def test_what_is_machine_only_never_counts():
    then = SETTINGS.values | {"microbatch_tokens": 1, "attention": "eager", "gradient_checkpointing": True}
    assert SETTINGS.differences(then) == []
    assert not {"output", "resume", "metrics", "microbatch_tokens", "dry_run"} & SETTINGS.values.keys()


def test_micro_batches_count_where_another_packages_loop_samples_by_them():
    options_of_ppo = {"model": "m", "queries": "q", "reward_model": "r", "output": "o", "sampled_tokens": 9}
    now = Settings.of(options.Ppo(**options_of_ppo, microbatch_tokens=64), weights="m@0123456789ab")
    then = Settings.of(options.Ppo(**options_of_ppo), weights="m@0123456789ab").values
    assert now.differences(then) == ["microbatch_tokens: 8192 then, 64 now"]


def test_a_model_counts_by_its_digest_and_not_by_its_name():
    moved = SETTINGS.values | {"model": "elsewhere/n", "weights": "n@0123456789ab"}
    assert SETTINGS.differences(moved) == []
    other = SETTINGS.values | {"weights": "m@ffffffffffff"}
    assert SETTINGS.differences(other) == ["weights: 'ffffffffffff' then, '0123456789ab' now"]


def test_a_name_counts_where_there_is_no_digest():
    """A hub dataset has none."""
    now = Settings.of(Sft(model="m", data="owner/one", output="o"), weights="m@0123456789ab", data_digest=None)
    assert now.differences(now.values | {"data": "owner/two"}) == ["data: 'owner/two' then, 'owner/one' now"]


def test_options_of_a_reward_model_as_0_1_0_kept_them_are_the_same_ones():
    how = {"sampled_tokens": 9, "output_index": 1, "reward_dtype": "bfloat16"}
    now = Settings.of(
        options.Ppo(model="m", queries="q", reward_model="r", output="o", **how), weights="m@0123456789ab"
    )
    then = {name: value for name, value in now.values.items() if name not in ("output_index", "join", "reward_dtype")}
    then["reward_options"] = {"output_index": 1, "join": "auto", "device": "cpu", "dtype": "bfloat16"}
    assert now.differences(then) == []
    then["reward_options"]["dtype"] = "float32"
    assert now.differences(then) == ["reward_dtype: 'float32' then, 'bfloat16' now"]


def test_a_digest_over_options_stays_when_there_are_more_of_them():
    """The identity of a unit of sampling holds an option of a later version only where it is not its default."""
    always = ("max_new_tokens", "temperature")
    assert counted(Sampling(), always) == {"max_new_tokens": 1024, "temperature": 1.0}
    assert counted(Sampling(top_p=0.5), always) == {"max_new_tokens": 1024, "temperature": 1.0, "top_p": 0.5}


def test_what_no_file_could_keep_is_refused():
    """Bytes of a command line that are no UTF-8, and a round that no table holds."""
    asked = {"model": "m", "queries": "q", "principles": "hh", "data": "d", "round": 0}
    with pytest.raises(UsageError, match="--stop holds bytes that are no UTF-8"):
        options.Gen(**asked, stop=("\udcff",))
    for kind, more in ((Gen, asked), (Train, {"model": "m", "data": ["d"], "output": "o"})):
        with pytest.raises(UsageError, match="--round must be at most 2147483647"):
            kind(**more | {"round": 2**31})
    with pytest.raises(UsageError, match="--seed must be below 9223372036854775808"):
        options.Gen(**asked, seed=2**63)


@pytest.mark.parametrize(
    ("kind", "change", "name"),
    [
        (Sft, {"output": Path("out/\udcff")}, "--output"),
        (Sft, {"data": "s\udcff.jsonl"}, "--data"),
        (Sft, {"metrics": Path("\udcff")}, "--metrics"),
        (Train, {"data": ["d", Path("\udcff")]}, "--data"),
        (Train, {"round": 0, "data": ["\udcff"]}, "--data"),
    ],
)
def test_a_path_that_no_file_could_keep_is_refused_before_a_training(kind: type[Options], change: dict, name: str):
    asked = {"model": "m", "data": ["d"] if kind is Train else "d", "output": "o"} | (
        {"round": 0} if kind is Train else {}
    )
    with pytest.raises(UsageError, match=f"{name} holds bytes that are no UTF-8"):
        kind(**asked | change)


@pytest.mark.parametrize("change", [{"output": ""}, {"data": ["d", ""]}])
def test_an_empty_text_is_no_path(change: dict):
    with pytest.raises(UsageError, match=f"--{next(iter(change))} must not be an empty text"):
        Train(**{"model": "m", "data": ["d"], "round": 0, "output": "o"} | change)


def test_an_address_of_a_reward_model_as_0_1_0_kept_it_is_the_same_one():
    at = "http://h/v1/{}/score".format
    how = {"model": "m", "queries": "q", "reward_model": at("[dd5d73ee52af]"), "output": "o", "sampled_tokens": 9}
    now = Settings.of(options.Ppo(**how), reward=at("[dd5d73ee52af]"))
    assert now.differences(now.values | {"reward_model": at("8f434346648f"), "reward": at("8f434346648f")}) == []
    assert now.differences(now.values | {"reward_model": at("8f434346648e"), "reward": at("8f434346648e")}) != []


@pytest.mark.parametrize("record", [RoundManifest, Snapshot, Trained, CheckpointState])
@pytest.mark.parametrize("settings", [{"reward_options": 5}, {"sampling": "x"}, {"template_date": "abc"}])
def test_settings_that_do_not_read_are_damage_wherever_they_stand(record, settings: dict, tmp_path: Path):
    kind = {RoundManifest: {"round": 0}, Snapshot: {"shards": []}, Trained: {"kind": "sft", "steps": 1, "files": {}}}
    fields = {"version": 1, "settings": settings, **kind.get(record, {"step": 1})}
    (tmp_path / "r.json").write_text(json.dumps(fields))
    with pytest.raises(DamagedError, match="settings: "):
        read_record(record, tmp_path / "r.json")
