"""`ple run`: a reward model and SFT if asked for, then rounds of ple-gen, ple-score and ple-train (or a baseline).

Every stage is a child process that reads and writes files; this room passes their names on, records each stage and
goes on where it stopped. It never imports torch and never looks into the data.
"""

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ple_data.rewards import recorded_spec
from ple_train.run.child import GRACE_SECONDS, Ended, Launcher
from ple_train.run.gpu_watch import GpuWatch, gibibytes
from schemas.errors import DamagedError, PleError, UsageError
from schemas.files import locked, write_atomic
from schemas.options import Baseline, Dpo, Gen, Reward, Score, Sft, Train, about, flag
from schemas.recipe import GIVEN, BaselineStage, Recipe, differences, dump_recipe, parse_recipe
from schemas.records import TRAINED, read_record
from schemas.training import StageRecord, Stages

_DOCUMENTED_CODES = {1, 2, 3, 4, 130}
RUN_BY = (Gen, Score, Train, Sft, Reward, Baseline, Dpo)
MACHINE_ONLY = {
    word
    for command in RUN_BY
    for known in command.in_order()
    if about(known).machine and known.name not in GIVEN
    for word in (flag(known), f"--no-{flag(known)[2:]}")
}
"""Options that may change between two starts of a run."""


@dataclass(frozen=True)
class Stage:
    """One child process: its name, its round (None before the rounds) and its words."""

    name: str
    round: int | None
    command: tuple[str, ...]

    @property
    def title(self) -> str:
        return self.name if self.round is None else f"round {self.round} {self.name}"

    @property
    def recorded(self) -> list[str]:
        """The words as files and messages show them: of a reward model's address the query only as its digest."""
        before = ("", *self.command)
        return [
            recorded_spec(word) if option == "--reward-model" else word
            for option, word in zip(before, self.command, strict=False)
        ]

    @property
    def shell_line(self) -> str:
        return shlex.join(self.recorded)

    @property
    def output(self) -> Path | None:
        """The directory that a training stage writes."""
        return Path(self.command[self.command.index("--output") + 1]) if "--output" in self.command else None


def plan(recipe: Recipe) -> list[Stage]:
    """All stages of a recipe in order, with full command lines."""
    run = Path(recipe.run_dir)
    stages = []
    model, reward_model = recipe.model, recipe.reward_model
    if recipe.reward is not None:
        reward_model = str(run / "reward")
        stages.append(_reward_stage(recipe, run))
    if recipe.sft is not None:
        model = str(run / "sft")
        stages.append(_sft_stage(recipe, run))
    assert reward_model is not None  # Recipe's own check
    for t in range(recipe.rounds):
        policy = _policy_words(recipe, model, t)
        stages.append(_gen_stage(recipe, policy, t))
        stages.append(_score_stage(recipe, reward_model, t))
        stages.append(_train_stage(recipe, policy, t))
    return stages


def run(recipe: Recipe) -> None:
    """Runs what is left of the recipe in its run directory.

    Raises UsageError for a missing program or another recipe in the directory, LockedError when another process runs
    it, and PleError with the child's exit code when a stage fails.
    """
    directory = Path(recipe.run_dir)
    stages = plan(recipe)
    _refuse_missing_programs(stages)
    directory.mkdir(parents=True, exist_ok=True)
    lock = locked(directory / ".ple" / "run.lock", str(directory), patience=GRACE_SECONDS + 5)
    with lock as held, Launcher(keep_open=[held]) as launcher, GpuWatch() as gpus:
        _freeze(recipe, stages, directory)
        for number, stage in enumerate(stages, start=1):
            records = _load_records(directory)
            place = f"[{number}/{len(stages)}] {stage.title}"
            if any(_is_done(record, stage) for record in records):
                _log(f"{place}: done before")
            else:
                _log(f"{place}: {stage.shell_line}")
                _log(f"{place}: {_run_stage(stage, directory, records, launcher, gpus)}")


def _run_stage(stage: Stage, directory: Path, records: list[StageRecord], launcher: Launcher, gpus: GpuWatch) -> str:
    """Run a stage and keep its record → what became of it, in words. What it held of the GPUs is free again then."""
    record = StageRecord(stage=stage.name, round=stage.round, command=stage.recorded, start=_now())
    before = list(records)
    _save_records(directory, [*before, record])
    gpus.begin()
    start = time.monotonic()
    ended: Ended | None = None
    try:
        ended = launcher.run(stage.command)
    except KeyboardInterrupt:
        ended = Ended(130, 0)
        raise
    finally:
        seconds = time.monotonic() - start
        found = {"exit_code": ended.code, "memory_bytes": ended.memory} if ended else {}
        record = record.model_copy(update={"end": _now(), "seconds": round(seconds, 3), **found})
        _save_records(directory, [*before, record])
    most, left = gpus.end()
    if most:
        record = record.model_copy(update={"gpu_memory_bytes": {str(gpu): size for gpu, size in most.items()}})
        _save_records(directory, [*before, record])
    refuse_failure(stage.title, ended.code)
    for gpu, size in left.items():
        more = f"{gibibytes(size)} more of GPU {gpu} are in use than before {stage.title}"
        _log(f"warning: {more}; nvidia-smi tells by which process")
    held = [f"{gibibytes(ended.memory)} of memory"] if ended.memory else []
    held += [f"{gibibytes(size)} of GPU {gpu}" for gpu, size in most.items()]
    return f"done in {seconds:.1f} s" + (f", held at most {', '.join(held)}" if held else "")


def refuse_failure(title: str, code: int) -> None:
    """Raises PleError with the child's exit code where it is not 0."""
    if code != 0:
        failure = PleError(
            f"{title} failed with exit code {code}; its own message is above. When the cause is gone, run the same "
            "command again: it goes on from there"
        )
        failure.exit_code = code if code in _DOCUMENTED_CODES else 1
        raise failure


def _is_done(record: StageRecord, stage: Stage) -> bool:
    """Whether the stage ended well, and what it trained is still there."""
    whole = stage.output is None or (stage.output / TRAINED).exists()
    return whole and _is_of(record, stage) and record.exit_code == 0


def _is_of(record: StageRecord, stage: Stage) -> bool:
    return (record.stage, record.round) == (stage.name, stage.round)


def _reward_stage(recipe: Recipe, run: Path) -> Stage:
    assert recipe.reward is not None
    output = ["--output", str(run / "reward"), "--metrics", str(run / "metrics" / "reward.parquet")]
    return _stage("reward", None, recipe.reward, [*output, *_seed(recipe)])


def _sft_stage(recipe: Recipe, run: Path) -> Stage:
    assert recipe.sft is not None
    model = ["--model", recipe.model, *_revision(recipe)]
    output = ["--output", str(run / "sft"), "--metrics", str(run / "metrics" / "sft.parquet")]
    how = [] if recipe.gen.prompt_format == "auto" else ["--prompt-format", recipe.gen.prompt_format]
    return _stage("sft", None, recipe.sft, [*model, *output, *_seed(recipe), *how])


def _gen_stage(recipe: Recipe, policy: list[str], t: int) -> Stage:
    queries = ["--queries", recipe.queries, "--principles", recipe.principles]
    if recipe.queries_per_round is not None:
        first = t * recipe.queries_per_round
        queries += ["--shuffle", "--skip", str(first), "--limit", str(recipe.queries_per_round)]
    reuse = [word for store in recipe.reuse for word in ("--reuse", store)]
    return _stage("gen", t, recipe.gen, [*policy, *queries, *_data(recipe, t), *_seed(recipe), *reuse])


def _score_stage(recipe: Recipe, reward_model: str, t: int) -> Stage:
    return _stage("score", t, recipe.score, [*_data(recipe, t), "--reward-model", reward_model])


def _train_stage(recipe: Recipe, policy: list[str], t: int) -> Stage:
    run = Path(recipe.run_dir)
    output = ["--output", _policy_dir(run, t), "--metrics", str(run / "metrics" / f"round={t:03d}.parquet")]
    words = [*policy, *_data(recipe, t), *output]
    if recipe.baseline is not None:
        return _stage("baseline", t, recipe.baseline, [*words, *_seed(recipe)])
    schedule = ["--tau0", str(recipe.tau0), "--alpha", str(recipe.alpha)]
    return _stage("train", t, recipe.train, [*words, *schedule, *_seed(recipe)])


def _policy_words(recipe: Recipe, model: str, t: int) -> list[str]:
    """The policy that samples and starts round t: the start model, after round 0 with the last round's adapter."""
    if t == 0:
        return ["--model", model, *(_revision(recipe) if recipe.sft is None else [])]
    last = _policy_dir(Path(recipe.run_dir), t - 1)
    if (recipe.baseline or recipe.train).full:
        return ["--model", last]
    return ["--model", model, *(_revision(recipe) if recipe.sft is None else []), "--adapter", last]


def _policy_dir(run: Path, t: int) -> str:
    return str(run / "policy" / f"round={t:03d}")


def _data(recipe: Recipe, t: int) -> list[str]:
    return ["--data", str(Path(recipe.run_dir) / "data"), "--round", str(t)]


def _seed(recipe: Recipe) -> list[str]:
    return ["--seed", str(recipe.seed)]


def _revision(recipe: Recipe) -> list[str]:
    return [] if recipe.revision is None else ["--revision", recipe.revision]


def _stage(name: str, t: int | None, options: BaseModel, words: list[str]) -> Stage:
    program, *first_words = options.command  # type: ignore[attr-defined]
    if isinstance(options, BaselineStage):
        first_words.append(options.method)
    command = [find_program(program), *first_words, *_option_words(options), *words]
    return Stage(name, t, tuple(command))


def _option_words(options: BaseModel) -> list[str]:
    """The options that differ from the command's defaults, as command-line words."""
    words = []
    for name, field in type(options).model_fields.items():
        value = getattr(options, name)
        if name in ("command", "method") or value == field.get_default(call_default_factory=True):
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list):
            words += [word for item in value for word in (flag, str(item))]
        elif isinstance(value, dict):
            words += [word for key, item in value.items() for word in (flag, f"{key}={_plain(item)}")]
        else:
            words += [flag, str(value)]
    return words


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def find_program(program: str) -> str:
    """The program beside the running Python where there is one, else as it is, as it must be typed."""
    beside = Path(sys.executable).parent / program
    if os.sep in program or not beside.exists() or shutil.which(program) == str(beside):
        return program
    return str(beside)


def _refuse_missing_programs(stages: list[Stage]) -> None:
    missing = {stage.name: stage.command[0] for stage in stages if shutil.which(stage.command[0]) is None}
    if missing:
        named = ", ".join(f"{name}.command: {program}" for name, program in missing.items())
        raise UsageError(f"there is no such program: {named}; give its path in the recipe, e.g. .venv/bin/ple-gen")


def _freeze(recipe: Recipe, stages: list[Stage], directory: Path) -> None:
    """Keep the recipe with the run. A changed one is refused where it would have changed a stage that is done.

    Of a reward model's address the copy holds the query only as its digest, unless the file there has it already.
    """
    path = directory / "recipe.yaml"
    kept = _recorded(recipe)
    if path.exists():
        frozen = _frozen(path)
        if frozen.reward_model == recipe.reward_model:  # the user's own recipe: it must work again
            kept = recipe
        changed = differences(frozen, kept)
        if not changed:
            return
        if other := _done_otherwise(stages, _load_records(directory)):
            raise UsageError(
                "\n  ".join(
                    [
                        f"{path}: {other} was done with another recipe; take the old one again or another run_dir",
                        *changed,
                    ]
                )
            )
        _log("\n  ".join([f"{path}: no stage that is done depends on what has changed; going on with", *changed]))
    write_atomic(path, dump_recipe(kept))


def _recorded(recipe: Recipe) -> Recipe:
    if recipe.reward_model is None:
        return recipe
    return recipe.model_copy(update={"reward_model": recorded_spec(recipe.reward_model)})


def _frozen(path: Path) -> Recipe:
    import yaml

    try:
        return parse_recipe(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    except (UsageError, yaml.YAMLError) as error:
        raise DamagedError(f"{path}: the frozen recipe does not read: {error}") from error


def _done_otherwise(stages: list[Stage], records: list[StageRecord]) -> str | None:
    """The first stage that is done with words that the plan no longer has."""
    for record in records:
        done = Stage(record.stage, record.round, tuple(record.command))
        planned = next((stage for stage in stages if _is_of(record, stage)), None)
        same = planned is not None and _telling_words(planned.recorded) == _telling_words(record.command)
        if not same and _is_done(record, done):
            return done.title
    return None


def _telling_words(command: Sequence[str]) -> list[list[str]]:
    """A command's options without the machine-only ones, in one order: versions of this program differ in it."""
    groups: list[list[str]] = []
    for word in command[1:]:
        if word.startswith("--") or not groups:
            groups.append([word])
        else:
            groups[-1].append(word)
    return sorted(group for group in groups if group[0] not in MACHINE_ONLY)


def _load_records(directory: Path) -> list[StageRecord]:
    path = directory / "stages.json"
    advice = "move it away to run every stage again: finished work is found"
    return read_record(Stages, path, advice).stages if path.exists() else []


def _save_records(directory: Path, records: list[StageRecord]) -> None:
    write_atomic(directory / "stages.json", Stages(stages=records).to_json())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
