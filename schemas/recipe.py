"""The recipe of a run: a small YAML file, checked whole before anything starts.

`load_recipe` reads one, applies `--set key=value` and reports every fault at once with its path. The defaults of a
stage's options are those of the command that runs it (a test compares them). This room starts nothing and reads
nothing but the recipe.
"""

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from schemas.errors import UsageError

Command = list[str]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GenStage(_Strict):
    """Options of `ple-gen`; `command` may come from another environment, e.g. `[.venv-vllm/bin/ple-gen]`."""

    command: Command = Field(default=["ple-gen"], min_length=1)
    engine: Literal["vllm", "hf"] | None = None
    engine_arg: dict[str, Any] = Field(default_factory=dict)
    reader: Literal["auto", "hh", "imdb", "tldr"] = "auto"
    query_column: str | None = None
    prefix_words: int | None = Field(default=None, ge=1)
    split: str | None = None
    prompt_format: Literal["auto", "plain", "chat"] = "auto"
    unit_size: int | None = Field(default=None, ge=1)
    samples: int = Field(default=1, ge=1)
    max_new_tokens: int = Field(default=1024, ge=1)
    max_query_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    stop: list[str] = Field(default_factory=list)
    logprobs: bool = True
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class ScoreStage(_Strict):
    """Options of `ple-score`."""

    command: Command = Field(default=["ple-score"], min_length=1)
    output_index: int | None = Field(default=None, ge=0)
    join: Literal["auto", "text", "pair", "chat"] = "auto"
    batch_tokens: int | None = Field(default=None, ge=1)
    reward_device: str = "auto"
    reward_dtype: Literal["float32", "bfloat16"] = "float32"


class _Training(_Strict):
    epochs: int = Field(default=1, ge=1)
    precision: Literal["auto", "float32", "bf16"] = "auto"
    microbatch_tokens: int = Field(default=8192, ge=1)
    checkpoint_every: int = Field(default=100, ge=1)


class _Lora(_Strict):
    lora_rank: int = Field(default=8, ge=1)
    lora_alpha: float = Field(default=16, gt=0)
    full: bool = False
    attention: str = "auto"
    gradient_checkpointing: bool = False
    max_length: int | None = Field(default=None, ge=1)


class _Schedule(_Strict):
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = Field(default=0.0, ge=0)


class TrainStage(_Training, _Lora):
    """Options of `ple-train`."""

    command: Command = Field(default=["ple-train"], min_length=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    batch_size: int = Field(default=16, ge=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    trust_region: float | None = Field(default=None, gt=0)
    normalize_wsft: bool = False
    sft_anchor: float = Field(default=0.0, ge=0)
    without: Literal["rank", "wsft"] | None = None


class BaselineStage(_Training, _Lora):
    """Options of `ple baseline METHOD`, which takes the place of `ple-train` in every round.

    ppo is not among the methods: it samples for itself, so it has no rounds.
    """

    command: Command = Field(default=["ple", "baseline"], min_length=1)
    method: Literal["sft", "context-distillation", "raft", "dpo"]
    learning_rate: float = Field(default=1e-4, gt=0)
    batch_size: int = Field(default=16, ge=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    beta: float = Field(default=0.1, gt=0)

    @model_validator(mode="after")
    def _options_of_the_method(self) -> "BaselineStage":
        foreign = ("full", "attention", "checkpoint_every") if self.method == "dpo" else ("beta",)
        for name in foreign:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is no option of {self.method}")
        return self


class SftStage(_Training, _Lora, _Schedule):
    """Options of `ple sft`; its output, RUN/sft, becomes the start policy."""

    command: Command = Field(default=["ple", "sft"], min_length=1)
    data: str
    learning_rate: float = Field(default=1e-4, gt=0)
    batch_size: int = Field(default=32, ge=1)


class RewardStage(_Training, _Schedule):
    """Options of `ple reward`; its output, RUN/reward, becomes the reward model."""

    command: Command = Field(default=["ple", "reward"], min_length=1)
    model: str
    revision: str | None = None
    data: str
    learning_rate: float = Field(default=5e-5, gt=0)
    batch_size: int = Field(default=32, ge=1)
    max_length: int = Field(default=512, ge=1)


STAGES: dict[str, type[BaseModel]] = {
    "reward": RewardStage,
    "sft": SftStage,
    "gen": GenStage,
    "score": ScoreStage,
    "train": TrainStage,
    "baseline": BaselineStage,
}


class Recipe(_Strict):
    """One alternating run. Relative paths are relative to the current directory, as on the command line."""

    model: str
    revision: str | None = None
    queries: str
    principles: str
    reward_model: str | None = None
    run_dir: str
    rounds: int = Field(default=5, ge=1)
    queries_per_round: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    tau0: float = Field(default=0.2, ge=0)
    alpha: float = Field(default=0.9, gt=0, lt=1)
    reuse: list[str] = Field(default_factory=list)
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
        return self


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
        faults = [_describe(fault) for fault in error.errors()]
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    raise UsageError("\n  ".join([f"{source}: {count} in the recipe", *faults]))


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML text, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """One line a changed key: 'train.learning_rate: 0.0001 -> 0.001'."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    keys = [*before, *(key for key in after if key not in before)]
    return [
        f"{key}: {before.get(key, '(none)')} -> {after.get(key, '(none)')}"
        for key in keys
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
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UsageError(f"{path}: cannot read the recipe: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: the recipe is not UTF-8 text (byte {error.start})") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{path}{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:  # a control character
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a recipe is a mapping of keys to values; this is {_kind(values)}")
    return values


def _kind(value: Any) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not (key and equals):
        raise UsageError(f"--set {override}: write key=value, for example --set train.learning_rate=1e-4")
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.get(parent)
        inner = {} if inner is None else inner
        if not isinstance(inner, dict):
            raise UsageError(f"--set {override}: {parent} is a value, not a group of keys")
        values[parent] = inner
        values = inner
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {override}: the value is not valid YAML") from error


def _describe(fault: Any) -> str:
    place = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"{place}: unknown key{_close_match(fault['loc'])}"
    if fault["type"] == "missing":
        return f"{place}: missing"
    if fault["type"] == "value_error":
        return ": ".join(part for part in (place, str(fault["ctx"]["error"])) if part)
    return f"{place}: {fault['msg']}, not {fault['input']!r}"


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
