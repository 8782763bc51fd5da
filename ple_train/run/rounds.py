"""`ple run`: a reward model and SFT if asked for, then rounds of ple-gen, ple-score and ple-train (or a baseline).

Every stage is a child process that reads and writes files; this room passes their names on, records each stage and
goes on where it stopped. It never imports torch and never looks into the data.
"""

import itertools
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ple_data.common.command import say
from ple_data.common.digests import text_digest
from ple_data.common.secrets import public
from ple_data.rewards import LENGTH_FIELDS, recorded_spec, rubric_of
from ple_train.run.child import GRACE_SECONDS, run_child
from ple_train.run.gpu_watch import GpuWatch, gibibytes
from ple_train.run.inputs import refuse_missing
from ple_train.run.serve import Server
from schemas.errors import DamagedError, PleError, UsageError
from schemas.files import locked, refuse_outside, write_atomic
from schemas.options import Baseline, Dpo, Gen, Reward, Score, Sft, Train, about, flag
from schemas.recipe import GIVEN, RENDERED, BaselineStage, Recipe, differences, dump_recipe, load_recipe, named_words
from schemas.records import TRAINED, read_record
from schemas.training import StageRecord, Stages

_DOCUMENTED_CODES = {1, 2, 3, 4, 130}
MACHINE_ONLY = {
    word
    for command in (Gen, Score, Train, Sft, Reward, Baseline, Dpo)
    for known in command.in_order()
    if about(known).machine and known.name not in GIVEN
    for word in (flag(known), f"--no-{flag(known)[2:]}")
}
"""Options that may change between two starts of a run."""
_ADDRESSES = ("--reward-model", "--reward-endpoint")


@dataclass(frozen=True)
class Stage:
    """One child process: its name, its round (None before the rounds) and its words."""

    name: str
    round: int | None
    command: tuple[str, ...]
    launch: tuple[str, ...] = ()  # what starts it, such as torchrun
    where: tuple[str, ...] = ()  # further words, of this start alone

    @property
    def title(self) -> str:
        return self.name if self.round is None else f"round {self.round} {self.name}"

    @property
    def recorded(self) -> list[str]:
        """The words as files and messages show them: of a reward model's address the query only as its digest."""
        words = itertools.pairwise(("", *self.command))
        return [recorded_spec(word) if before in _ADDRESSES else word for before, word in words]

    @property
    def shell_line(self) -> str:
        return " ".join(map(_shell_word, [*self.launch, *self.recorded]))

    @property
    def output(self) -> Path | None:
        """The directory that a training stage writes."""
        return Path(self.command[self.command.index("--output") + 1]) if "--output" in self.command else None


def _shell_word(word: str) -> str:
    """The word as a shell takes it, on one line: what does not print, such as a line's end, is escaped."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = {"\\": "\\\\", "'": "\\'", "\n": "\\n"}
    return "$'" + "".join(escaped.get(c) or (c if c.isprintable() else f"\\U{ord(c):08x}") for c in word) + "'"


def plan(recipe: Recipe) -> list[Stage]:
    """All stages of a recipe in order, with full command lines."""
    run, seed = Path(recipe.run_dir), {"seed": recipe.seed}
    stages = []
    base: dict[str, Any] = {"model": recipe.model, "revision": recipe.revision}
    reward_models = recipe.reward_models
    if recipe.reward is not None:
        reward_models = [str(run / "reward")]
        stages.append(_stage("reward", None, recipe.reward, {**_written(run, "reward", "reward"), **seed}))
    if recipe.sft is not None:
        how = {key: value for key, value in _chosen(recipe.gen).items() if key in RENDERED}
        stages.append(_stage("sft", None, recipe.sft, {**base, **_written(run, "sft", "sft"), **seed, **how}))
        base = {"model": run / "sft"}
    name, trainer, schedule = "train", recipe.train, {"tau0": recipe.tau0, "alpha": recipe.alpha}
    if recipe.baseline is not None:
        name, trainer, schedule = "baseline", recipe.baseline, {}
    scored: dict[str, Any] = {"reward_model": reward_models}
    if (rubric := rubric_of(reward_models, recipe.score.rubric, recipe.principles)) != recipe.score.rubric:
        scored["rubric"] = rubric
    policy = base  # samples and starts a round: the start policy, then with the last round's adapter
    for t in range(recipe.rounds):
        data = {"data": run / "data", "round": t}
        queries: dict[str, Any] = {"queries": recipe.queries, "principles": recipe.principles}
        if (count := recipe.queries_per_round) is not None:
            queries |= {"shuffle": True, "skip": t * count, "limit": count}
        written = _written(run, f"policy/round={t:03d}", f"round={t:03d}")
        stages += [
            _stage("gen", t, recipe.gen, {**policy, **queries, **data, **seed, "reuse": recipe.reuse}),
            _stage("score", t, recipe.score, {**data, **scored}),
            _stage(name, t, trainer, {**(base if recipe.restart else policy), **data, **written, **schedule, **seed}),
        ]
        policy = {"model": written["output"]} if trainer.full else {**base, "adapter": written["output"]}
    return stages


def _written(run: Path, output: str, metrics: str) -> dict[str, Any]:
    return {"output": run / output, "metrics": run / "metrics" / f"{metrics}.parquet"}


def run(recipe: Recipe) -> None:
    """Runs what is left of the recipe in its run directory.

    Raises UsageError for a missing program or input or another recipe in the directory, LockedError when another
    process runs it, and PleError with the child's exit code when a stage fails.
    """
    directory = Path(recipe.run_dir)
    stages = plan(recipe)
    _refuse_missing_programs(stages)
    records = _load_records(directory)
    refuse_missing(recipe, {stage.name for stage in stages if not any(_is_done(record, stage) for record in records)})
    directory.mkdir(parents=True, exist_ok=True)
    refuse_outside(directory, directory / ".ple")
    lock = locked(directory / ".ple" / "run.lock", str(directory), patience=GRACE_SECONDS + 5)
    with lock as held, GpuWatch() as gpus, _server(recipe) as server:
        _freeze(recipe, stages, directory)
        for number, stage in enumerate(stages, start=1):
            records = _load_records(directory)
            place = f"[{number}/{len(stages)}] {stage.title}"
            if any(_is_done(record, stage) for record in records):
                say(f"{place}: done before")
            else:
                say(f"{place}: {stage.shell_line}")
                with _with_server(server, stage) as stage:
                    say(f"{place}: {_run_stage(stage, directory, records, held, gpus)}")


def _server(recipe: Recipe) -> AbstractContextManager[Server | None]:
    if recipe.gen.server is None:
        return nullcontext()
    run = Path(recipe.run_dir)
    how, model = recipe.gen.server, recipe.model if recipe.sft is None else str(run / "sft")
    if recipe.revision and recipe.sft is None:
        how = how.model_copy(update={"command": [*how.command, "--revision", recipe.revision]})
    return Server(how, model, run / "server.log")


@contextmanager
def _with_server(server: Server | None, stage: Stage) -> Iterator[Stage]:
    """The stage with the server's address where it samples from it; all others have the GPU to themselves."""
    if server and stage.name == "gen":
        with server.watched() as address:
            yield replace(stage, where=("--endpoint", address))
    else:
        if server:
            server.rest()
        yield stage


def _run_stage(stage: Stage, directory: Path, records: list[StageRecord], lock: int, gpus: GpuWatch) -> str:
    """Run a stage and keep its record → what became of it, in words. What it held of the GPUs is free again then."""
    record = StageRecord(stage=stage.name, round=stage.round, command=stage.recorded, start=_now())

    def note(**found: Any) -> None:
        nonlocal record
        record = record.model_copy(update=found)
        write_atomic(directory / "stages.json", Stages(stages=[*records, record]).to_json())

    note()
    gpus.begin()
    start = time.monotonic()
    found: dict[str, Any] = {}
    try:
        ended = run_child([*stage.launch, *stage.command, *stage.where], keep_open=[lock])
        found = {"exit_code": ended.code, "memory_bytes": ended.memory}
    except KeyboardInterrupt:
        found = {"exit_code": 130, "memory_bytes": 0}
        raise
    finally:
        seconds = time.monotonic() - start
        note(end=_now(), seconds=round(seconds, 3), **found)
    most, left = gpus.end()
    if most:
        note(gpu_memory_bytes={str(gpu): size for gpu, size in most.items()})
    refuse_failure(stage.title, ended.code)
    for gpu, size in left.items():
        more = f"{gibibytes(size)} more of GPU {gpu} are in use than before {stage.title}"
        say(f"warning: {more}; nvidia-smi tells by which process")
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


def _stage(name: str, t: int | None, options: BaseModel, given: dict[str, Any]) -> Stage:
    """A stage with those of the recipe's options that are not the command's defaults, and those that the run gives."""
    program, *first_words = options.command  # type: ignore[attr-defined]
    if isinstance(options, BaselineStage):
        first_words.append(options.method)
    own = _chosen(options)
    starter, *its_words = getattr(options, "launch", None) or [""]
    launch = (find_program(starter), *its_words) if starter else ()
    found = find_program(program)
    if launch:
        found = shutil.which(found) or found  # torchrun takes a file
    return Stage(name, t, (found, *first_words, *_words(own), *_words(given)), launch)


def _chosen(options: BaseModel) -> dict[str, Any]:
    """The options of a stage that are not its command's defaults."""
    return {
        key: getattr(options, key)
        for key, field in type(options).model_fields.items()
        if key not in ("command", "method", "server", "launch")
        and getattr(options, key) != field.get_default(call_default_factory=True)
    }


def _words(options: dict[str, Any]) -> list[str]:
    """Options as command-line words; None is none."""
    words = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list):
            words += [word for item in value for word in (flag, str(item))]
        elif isinstance(value, dict):
            words += [word for named in named_words(value) for word in (flag, named)]
        elif value is not None:
            words += [flag, str(value)]
    return words


def find_program(program: str) -> str:
    """The program beside the running Python where there is one, else as it is, as it must be typed."""
    beside = Path(sys.executable).parent / program
    if os.sep in program or not beside.exists() or shutil.which(program) == str(beside):
        return program
    return str(beside)


def _refuse_missing_programs(stages: list[Stage]) -> None:
    programs = [(f"{stage.name}.command", stage.command[0]) for stage in stages]
    programs += [(f"{stage.name}.launch", stage.launch[0]) for stage in stages if stage.launch]
    missing = {key: program for key, program in programs if shutil.which(program) is None}
    if missing:
        named = ", ".join(f"{key}: {program}" for key, program in missing.items())
        raise UsageError(f"there is no such program: {named}; give its path in the recipe, e.g. .venv/bin/ple-gen")


def _freeze(recipe: Recipe, stages: list[Stage], directory: Path) -> None:
    """Keep the recipe with the run. A changed one is refused where it would have changed a stage that is done.

    Of a reward model's address the copy holds the query only as its digest, unless the file there has it already.
    """
    path = directory / "recipe.yaml"
    endpoint = recipe.score.reward_endpoint
    recorded = [recorded_spec(spec) for spec in recipe.reward_models]
    one = isinstance(recipe.reward_model, str)
    secret: dict[str, Any] = {"reward_model": recorded[0] if one else recorded or None}
    if endpoint is not None:
        secret["score"] = recipe.score.model_copy(update={"reward_endpoint": recorded_spec(endpoint)})
    kept = recipe.model_copy(update=secret)
    if path.exists():
        frozen = _frozen(path)
        own = (frozen.reward_model, frozen.score.reward_endpoint)
        if own == (recipe.reward_model, endpoint):  # the user's own recipe: it must work again
            kept = recipe
        changed = differences(frozen, kept)
        if not changed:
            return
        if other := _done_otherwise(stages, _load_records(directory)):
            what = f"{path}: {other} was done with another recipe; take the old one again or another run_dir"
            raise UsageError("\n  ".join([what, *changed]))
        say("\n  ".join([f"{path}: no stage that is done depends on what has changed; going on with", *changed]))
    write_atomic(path, dump_recipe(kept))


def _frozen(path: Path) -> Recipe:
    try:
        return load_recipe(path)
    except UsageError as error:
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
    """A command's options without the machine-only ones, alike for all versions: in one order, addresses public."""
    groups: list[list[str]] = []
    for word in (public(word, text_digest) for word in command[1:]):
        if word.startswith("--") or not groups:
            groups.append([word])
        else:
            groups[-1].append(word)
    telling = (group for group in groups if group[0] not in MACHINE_ONLY and not _bounds_answers(group))
    return sorted(telling, key=lambda group: group[:1] if group[0] == "--reward-model" else group)  # theirs is an order


def _bounds_answers(group: list[str]) -> bool:
    return group[0] == "--reward-arg" and group[1].partition("=")[0] in LENGTH_FIELDS


def _load_records(directory: Path) -> list[StageRecord]:
    path = directory / "stages.json"
    advice = "move it away to run every stage again: finished work is found"
    return read_record(Stages, path, advice).stages if path.exists() else []


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
