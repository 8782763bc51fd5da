"""The recipe of a run: a small YAML file, checked whole before anything starts.

`load_recipe` reads one, applies `--set key=value` and reports every fault at once with its path. A stage's keys are the
options of the command that runs it (`schemas.options`). This room starts nothing and reads nothing but the recipe.
"""

import difflib
import json
import re
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, Field, JsonValue, ValidationError, create_model, model_validator

from schemas import options
from schemas.errors import UsageError
from schemas.files import read_given_text
from schemas.records import Strict

GIVEN = {
    *("model", "revision", "adapter", "queries", "principles", "reward_model", "data", "round", "output", "metrics"),
    *("seed", "shuffle", "skip", "limit", "reuse", "dry_run", "tau0", "alpha", "resume", "report_to", "merge"),
}
"""Options of a stage's command that the run itself gives."""
MOST_ROUNDS, MOST_BYTES, MOST_VALUES, MOST_FAULTS = 10_000, 2**20, 100_000, 20
"""A recipe's bounds: rounds, its file's size, keys and values with every alias written out, faults that are named."""
OF_REWARDS = {known.name for known in options.Rewards.in_order()}


def _stage(kind: type[options.Options], *command: str, without: Collection[str] = ()) -> Any:
    """The keys of a stage: the options of its command that the run does not give, with their checks and defaults."""
    keys = {known.name: _key(known) for known in kind.in_order() if known.name not in {*GIVEN, *without}}
    first = {"command": (list[str], Field(default=list(command), min_length=1))}
    if "shard" in keys or kind is options.Reward:
        first["launch"] = (Words, [])
    return create_model(kind.__name__, __base__=Strict, **(first | keys))


def _key(known: Any) -> tuple[Any, Any]:
    if options.about(known).metavar == "NAME=VALUE":
        return dict[str, JsonValue], {}
    if options.is_repeated(known):
        return list[Annotated[options.kind_of(known), Field(min_length=1)]], []  # type: ignore[misc]
    return known.type, _field(known)


def _field(known: Any) -> Any:
    told, inf = options.about(known), False if options.kind_of(known) is float else None
    return Field(default=known.default, ge=told.least, gt=told.above, le=told.most, lt=told.below, allow_inf_nan=inf)


def _split(value: Any) -> Any:
    return shlex.split(value) if isinstance(value, str) else value


Words = Annotated[list[str], BeforeValidator(_split)]
"""Words that may be written as one text, such as `torchrun --nproc-per-node 8`."""


class GenServer(Strict):
    """A server that the run starts for its rounds, e.g. `[.venv-vllm/bin/vllm, serve, "{model}", --enable-lora]`.

    sleep: it gives its memory on the GPU free while a round is scored and trained on.
    """

    command: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1)
    sleep: bool = False


class GenStage(_stage(options.Gen, "ple-gen", without={*OF_REWARDS, "combine", "normalize_rewards"})):  # type: ignore[misc]
    """Options of `ple-gen`; `command` may come from another environment, e.g. `[.venv-vllm/bin/ple-gen]`."""

    server: GenServer | None = None

    @model_validator(mode="after")
    def _one_way(self) -> "GenStage":
        if self.server and (self.endpoint or self.engine not in (None, "server")):
            raise ValueError("give either server (one to start), endpoint (some that run) or another engine")
        if self.workers and (self.server or self.endpoint):
            raise ValueError("give either workers (engines of their own) or servers")
        return self


class ScoreStage(_stage(options.Score, "ple-score")):  # type: ignore[misc]
    """Options of `ple-score`."""


class TrainStage(_stage(options.Train, "ple-train")):  # type: ignore[misc]
    """Options of `ple-train`."""

    @model_validator(mode="after")
    def _go_together(self) -> "TrainStage":
        if found := options.misfit(self):
            raise ValueError(found)
        return self


class BaselineStage(_stage(options.Baseline, "ple", "baseline")):  # type: ignore[misc]
    """Options of `ple baseline METHOD`, which takes the place of `ple-train` in every round.

    ppo is not among the methods: it samples for itself, so it has no rounds.
    """

    method: Literal["sft", "context-distillation", "raft", "dpo"]
    beta: float = _field(options.Dpo.__dataclass_fields__["beta"])
    via: Literal["ple", "trl"] | None = None
    on_policy: bool = _field(options.ContextDistillation.__dataclass_fields__["on_policy"])

    @model_validator(mode="after")
    def _options_of_the_method(self) -> "BaselineStage":
        kind = options.Dpo if self.method == "dpo" else options.Baseline
        own = {known.name for known in kind.in_order()} | {"command", "method", "launch"}
        own |= {"on_policy"} if self.method == "context-distillation" else set()
        for name, field in type(self).model_fields.items():
            if name not in own and getattr(self, name) != field.get_default(call_default_factory=True):
                raise ValueError(f"{name} is no option of {self.method}")
        return self


RENDERED = tuple(known.name for known in options.Prompting.in_order())
"""Options that say how a query becomes a prompt: those of `gen` hold for `sft` too."""


class SftStage(_stage(options.Sft, "ple", "sft", without=RENDERED)):  # type: ignore[misc]
    """Options of `ple sft`; its output, RUN/sft, becomes the start policy. It renders as `gen` says (`RENDERED`)."""

    data: str

    @model_validator(mode="after")
    def _merged(self) -> "SftStage":
        if self.shard and not self.full:
            raise ValueError("shard needs full: an adapter is merged at the end, which takes the whole model")
        return self


class RewardStage(_stage(options.Reward, "ple", "reward", without={*OF_REWARDS, "measured", "as_json"})):  # type: ignore[misc]
    """Options of `ple reward`; its output, RUN/reward, becomes the reward model."""

    model: str
    revision: str | None = None
    data: str


STAGES: dict[str, type[BaseModel]] = {
    "reward": RewardStage,
    "sft": SftStage,
    "gen": GenStage,
    "score": ScoreStage,
    "train": TrainStage,
    "baseline": BaselineStage,
}


class Recipe(Strict):
    """One alternating run. Relative paths are relative to the current directory, as on the command line."""

    model: str
    revision: str | None = None
    queries: str
    principles: str
    reward_model: str | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    run_dir: str
    rounds: int = Field(default=5, ge=1, le=MOST_ROUNDS)
    queries_per_round: int | None = Field(default=None, ge=1)
    seed: int = _field(options.Seed.__dataclass_fields__["seed"])
    tau0: float = _field(options.Threshold.__dataclass_fields__["tau0"])
    alpha: float = _field(options.Threshold.__dataclass_fields__["alpha"])
    reuse: list[str] = Field(default_factory=list)
    restart: bool = False
    reward: RewardStage | None = None
    sft: SftStage | None = None
    gen: GenStage = GenStage()
    score: ScoreStage = ScoreStage()
    train: TrainStage = TrainStage()
    baseline: BaselineStage | None = None

    @model_validator(mode="after")
    def _one_reward(self) -> "Recipe":
        if (self.reward_model is None) == (self.reward is None):
            raise ValueError("give either reward_model (one to use) or reward (one to train first)")
        try:
            options.combination(self.score.combine, len(self.reward_models) or 1, self.score.normalize_rewards)
        except UsageError as error:
            raise ValueError(f"score.combine: {error}") from error
        return self

    @property
    def reward_models(self) -> list[str]:
        """Those to use, none where one is trained first."""
        return [self.reward_model] if isinstance(self.reward_model, str) else self.reward_model or []

    @model_validator(mode="after")
    def _adapters(self) -> "Recipe":
        name = "train" if self.baseline is None else "baseline"
        if self.gen.server and getattr(self, name).full:
            raise ValueError(f"gen.server serves one model with each round's adapter: leave it out, or {name}.full")
        return self

    @model_validator(mode="after")
    def _where_training_starts(self) -> "Recipe":
        if self.restart and self.baseline and self.baseline.on_policy:
            raise ValueError("restart: baseline.on_policy trains the policy that sampled; leave one of the two out")
        return self

    @model_validator(mode="after")
    def _enough_samples(self) -> "Recipe":
        if options.OBJECTIVE_KINDS[self.train.objective].quantiles and self.baseline is None and self.gen.samples < 2:
            raise ValueError(
                f"train.objective {self.train.objective} compares responses to a query: set gen.samples: 4"
            )
        return self


def named_words(values: Mapping[str, JsonValue]) -> list[str]:
    """NAME=VALUE as the command line takes them: texts as they are, all else as JSON."""
    return [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()]


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in a YAML file with `key=value` overrides (dotted keys, values in YAML) applied.

    Raises UsageError with every fault and its place: unreadable YAML, doubled, unknown or missing keys, wrong values.
    """
    values = _read_yaml(path)
    for override in overrides or []:
        _set(values, override)
    return parse_recipe(values, str(path))


def parse_recipe(values: dict[str, Any], source: str) -> Recipe:
    """Validates the values of a recipe; `source` names them in the errors."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        faults = error.errors()
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    more = [f"and {len(faults) - MOST_FAULTS} more"] if len(faults) > MOST_FAULTS else []
    raise UsageError("\n  ".join([f"{source}: {count} in the recipe", *map(_describe, faults[:MOST_FAULTS]), *more]))


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML text, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """One line a changed key: 'train.learning_rate: 0.0001 -> 0.001'."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return [
        f"{key}: {before.get(key, '(none)')} -> {after.get(key, '(none)')}"
        for key in before | after
        if before.get(key) != after.get(key)
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, which YAML would silently let the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else repr(key))
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    text = read_given_text(path, "recipe")
    if len(text) > MOST_BYTES:
        raise UsageError(f"{path}: a recipe has at most {MOST_BYTES} bytes: is this one?")
    values = _parsed(text, str(path))
    if not isinstance(values, dict):
        found = "empty" if values is None else f"a {type(values).__name__}"
        raise UsageError(f"{path}: a recipe is a mapping of keys to values; this is {found}")
    return values


def _parsed(text: str, source: str) -> Any:
    """The value of a YAML text. Raises UsageError, whatever is wrong with it."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node, source)
        return loader.construct_document(node)
    except UsageError:
        raise
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{source}{line}: not valid YAML: {error.problem}") from error
    except Exception as error:  # a control character, nesting, a value that its tag does not allow: !!int x, 2026-99-99
        deep = isinstance(error, RecursionError)
        why = "nested too deeply" if deep else " ".join(str(error).split())[:200]
        raise UsageError(f"{source}: not valid YAML: {why}") from error


def _check_nodes(root: yaml.Node, source: str) -> None:
    """Refuse aliases that stand for themselves or for more values than a recipe has, and texts no command takes."""
    sizes: dict[int, float] = {}

    def size(node: yaml.Node) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = float("inf")  # what holds itself never ends
            if isinstance(node, yaml.ScalarNode) and re.search("[\x00\ud800-\udfff]|(?s:.{4097})", node.value):
                wrong = f"{source}, line {node.start_mark.line + 1}: a text holds a NUL or half a character, or is"
                raise UsageError(f"{wrong} longer than 4,096 characters: correct it")
            inside = node.value if isinstance(node, yaml.CollectionNode) else []
            sizes[id(node)] = 1 + sum(sum(map(size, i)) if isinstance(i, tuple) else size(i) for i in inside)
        return sizes[id(node)]

    if size(root) > MOST_VALUES:
        raise UsageError(f"{source}: a recipe holds at most {MOST_VALUES} values, with every alias written out")


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not (key and equals):
        raise UsageError(f"--set {override[:80]}: write key=value, for example --set train.learning_rate=1e-4")
    *parents, last = key.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise UsageError(f"--set {override[:80]}: {parent} is a value, not a group of keys")
    values[last] = _parsed(text, f"--set {override[:80]}")


def _shown(value: Any) -> str:
    """The beginning of a value, for a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # digits that Python does not write, nesting
        text = f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= 100 else f"{text[:100]}..."


def _describe(fault: Any) -> str:
    place = ".".join(str(part) for part in fault["loc"])[:200]
    if fault["type"] == "extra_forbidden":
        return f"{place}: unknown key{_close_match(fault['loc'])}"
    if fault["type"] == "missing":
        return f"{place}: missing"
    if fault["type"] == "value_error":
        return ": ".join(part for part in (place, str(fault["ctx"]["error"])) if part)
    return f"{place}: {fault['msg']}, not {_shown(fault['input'])}"


def _close_match(loc: tuple[str | int, ...]) -> str:
    group = STAGES.get(str(loc[0]), Recipe) if len(loc) > 1 else Recipe
    key = str(loc[-1])
    matches = difflib.get_close_matches(key.replace("-", "_"), group.model_fields, n=1)
    if matches:
        return f"; did you mean {matches[0]}?"
    homes = [name for name, home in STAGES.items() if key in home.model_fields]
    if homes and len(loc) == 1:
        return f"; it belongs under {' or '.join(homes)}"
    return f"; known here: {', '.join(group.model_fields)}"
