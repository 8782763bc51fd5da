"""Recipes that would hang, fill the memory or break a message: each is one sentence, soon."""

import os
from pathlib import Path

import pytest

from schemas.errors import UsageError
from schemas.recipe import MOST_BYTES, MOST_ROUNDS, load_recipe

GOOD = "model: m\nqueries: q\nprinciples: p\nreward_model: r\nrun_dir: run\n"


def bomb(levels: int = 9, merged: bool = False) -> str:
    first = "a0: &a0 {k: v}\n" if merged else "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    lines = [first]
    for n in range(1, levels):
        nine = ", ".join([f"*a{n - 1}"] * 9)
        lines.append(f"a{n}: &a{n} {{<<: [{nine}]}}\n" if merged else f"a{n}: &a{n} [{nine}]\n")
    return "".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{GOOD}rounds: 1000000000000\n", "rounds: Input should be less than or equal to 10000"),
        (f"{GOOD}rounds: 1.0e+12\n", "less than or equal to 10000"),
        (f"{GOOD}rounds: {'9' * 5000}\n", "longer than 4,096 characters"),
        (f"{GOOD}rounds: 0x{'f' * 4000}\n", "too large to show"),
        (bomb(), "at most 100000 values"),
        (bomb(merged=True), "at most 100000 values"),
        ("a: &a [*a]\n", "at most 100000 values"),
        ("[" * 500_000, "nested too deeply"),
        (f"{GOOD}gen: {'{a: ' * 50_000}", "nested too deeply"),
        (f"{GOOD}seed: {2**63}\n", "seed: Input should be less than 9223372036854775808"),
        (f"{GOOD}tau0: .inf\n", "tau0: Input should be a finite number"),
        (f"{GOOD}train: {{learning_rate: .inf, trust_region: .inf}}\n", "train.trust_region: Input should be a finite"),
        (f"{GOOD}gen: {{stop: ['']}}\n", "gen.stop.0: String should have at least 1 character"),
        (f"{GOOD}gen: {{engine_arg: {{a: 2026-01-01}}}}\n", "gen.engine_arg.a"),
        (f"{GOOD}seed: 2026-99-99\n", "not valid YAML"),
        (f"{GOOD}seed: !!int x\n", "not valid YAML"),
        (f"{GOOD}seed: !!bool x\n", "not valid YAML"),
        (f"{GOOD}seed: !!timestamp x\n", "not valid YAML"),
        (f"{GOOD}seed: !!python/object/apply:os.system [true]\n", "not valid YAML"),
        (f'{GOOD}revision: "a\\0b"\n', "line 6: a text holds a NUL"),
        (f'{GOOD}revision: "\\ud800"\n', "line 6: a text holds a NUL or half a character"),
        (f"{GOOD}revision: {'x' * 5000}\n", "line 6: a text holds a NUL or half a character, or is longer than 4,096"),
        (f"{GOOD}seed: [{'x, ' * 5_000}]\n", "seed: Input should be a valid integer"),
        (f"{GOOD}{'k' * 900}: 1\n", "unknown key"),
        (f"{GOOD}sft: {{data: d, shard: true}}\n", "sft: shard needs full: an adapter is merged at the end"),
        (
            f"{GOOD}restart: true\nbaseline: {{method: context-distillation, on_policy: true}}\n",
            "restart: baseline.on_policy trains the policy that sampled",
        ),
        (GOOD + "".join(f"k{n}: 1\n" for n in range(500)), "and 480 more"),
        ("#" * (MOST_BYTES + 1), "at most 1048576 bytes"),
    ],
    ids=lambda value: str(value)[:40].replace("\n", " "),
)
def test_a_hostile_recipe_is_one_short_refusal(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UsageError) as refusal:
        load_recipe(tmp_path / "r.yaml")
    assert message in str(refusal.value)
    assert max(map(len, str(refusal.value).splitlines())) < 2000


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", tmp_path, Path("/dev/zero"), tmp_path / ("x" * 300)):
        with pytest.raises(UsageError, match="recipe"):
            load_recipe(path)


def test_overrides_are_held_to_the_same(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(GOOD)
    for override in (f"seed={'[' * 5000}", f"revision=[{bomb(3)}", "seed=2026-99-99", 'revision="a\\0"'):
        with pytest.raises(UsageError, match="--set") as refusal:
            load_recipe(tmp_path / "r.yaml", [override])
        assert len(str(refusal.value)) < 500
    with pytest.raises(UsageError, match="unknown key"):
        load_recipe(tmp_path / "r.yaml", [f"{'a.' * 5000}a=1"])


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("{objective: dpo, sft_anchor: 1.0}", "train: --objective dpo has no --sft-anchor"),
        ("{objective: dpo, full: true}", "train: --objective dpo needs the start policy at hand"),
        ("{stable: true, full: true}", "train: --stable needs the start policy at hand"),
        ("{objective: qrpo}", "compares responses to a query: set gen.samples: 4"),
    ],
)
def test_options_of_training_that_do_not_go_together_are_found_before_anything_starts(tmp_path, train, message) -> None:
    (tmp_path / "r.yaml").write_text(f"{GOOD}train: {train}\n")
    with pytest.raises(UsageError, match=message):
        load_recipe(tmp_path / "r.yaml")


def test_aliases_mark_and_many_rounds_are_no_fault(tmp_path: Path) -> None:
    text = f"\ufeff{GOOD}rounds: {MOST_ROUNDS}\ngen: &g {{max_new_tokens: &n 7}}\ntrain: {{batch_size: *n}}\n"
    (tmp_path / "r.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "r.yaml")
    assert (recipe.rounds, recipe.gen.max_new_tokens, recipe.train.batch_size) == (MOST_ROUNDS, 7, 7)
