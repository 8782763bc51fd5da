"""What must hold before a model, tokenizer or adapter is used. Reads files' headers; never loads weights.

Every fault is a UsageError that names the directory and what to do, raised before an engine is started.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ple_data.common.command import say
from ple_data.common.digests import model_digest
from ple_data.common.loading import check_sizes, loading
from schemas.errors import UsageError, first_line
from schemas.files import explained
from schemas.json_text import parse_json

INDEX = "model.safetensors.index.json"
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""What configurations call the number of layers, and that of positions."""
COUNTED_FROM_PAD = {
    *("camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet"),
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}
"""Kinds of models whose positions begin behind the pad id: the embedding has rows that are no positions."""
KEEPING = ("none", "true", "false", "gaussian", "eva", "orthogonal", "mica")
"""Ways of peft to begin an adapter (init_lora_weights) that leave the weights below it alone."""
REBUILT = ("pissa", "olora", "loftq")
"""Others, whose change to those weights peft makes again, the same, each time it loads the adapter."""
CONVERT = "save it as a plain LoRA adapter: peft's save_pretrained with path_initial_model_for_weight_conversion"
PLAIN = re.compile(
    "auto_mapping|base_model_name_or_path|inference_mode|peft_type|peft_version|revision|task_type|target_(modules|"
    "parameters)|exclude_modules|layers_to_transform|layers_pattern|modules_to_save|trainable_token_indices|"
    "ensure_weight_tying|fan_in_fan_out|runtime_config|(r|alpha|rank)(_pattern)?|lora_(alpha|dropout|bias)|bias|"
    "use_(rslora|dora)|init_lora_weights|(loftq|eva|corda|lora_ga)_config|megatron_core|qalora_group_size"
)
"""Settings of adapters under which numbers, and the code that runs, are those of a LoRA adapter."""
PEFT_DEFAULT = 8
"""Rank and alpha of an adapter that does not name them."""
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_FLOAT_DTYPES = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class AdapterInfo:
    """What an engine needs to know of a LoRA adapter before it starts."""

    path: Path
    rank: int
    config: dict[str, Any]
    alpha: Any = PEFT_DEFAULT

    @property
    def changes_base(self) -> str | None:
        """The setting under which training changed weights of the base, so that with the adapter off the model is
        another than its start policy."""
        init = self.config.get("init_lora_weights")
        if str(init).lower() not in KEEPING:
            return f"init_lora_weights {init}"
        bias = self.config.get("bias") or "none"
        return None if bias == "none" else f"bias {bias}"


def check_model(model: str | Path, *, quantized: bool = False) -> None:
    """Refuse a model directory that is none, unfinished or, unless `quantized`, quantized. Hub ids: when they load."""
    directory = Path(model)
    if not os.path.exists(directory):  # False for what is too long to be a path
        if str(model).startswith((".", "/", "~")) or not _HUB_ID.match(str(model)):
            raise UsageError(f"model directory {model} does not exist; give a directory or a hub id")
        say_if_looked_up(model)
        return
    files = {path.suffix for path in (directory.iterdir() if directory.is_dir() else [directory])}
    if ".gguf" in files and ".safetensors" not in files:
        raise UsageError(
            f"{model} is in GGUF format: make a model folder of it with `ple convert`, or give the safetensors"
        )
    if not directory.is_dir():
        raise UsageError(f"{model} is a file; a model is a directory written by save_pretrained, or a hub id")
    _refuse_endless(directory)
    if not (directory / "config.json").is_file():
        if (directory / "adapter_config.json").is_file():
            raise UsageError(f"{model} is an adapter; give it with --adapter and its base with --model")
        raise UsageError(f"{model} is no model directory: it has no config.json")
    config = _read_json(directory / "config.json")
    check_sizes(config, str(directory / "config.json"))
    if (directory / "adapter_config.json").is_file():
        raise UsageError(f"{model} holds a model and an adapter, of which libraries load one or both: keep them apart")
    if not quantized:
        refuse_quantized(model, config)
    refuse_foreign_files(directory / "config.json", [config.get("transformers_weights")])
    held = len(_tensor_shapes(directory))
    for part in [part for part in (config, config.get("text_config")) if isinstance(part, dict)]:
        layers = next((part[name] for name in LAYERS if isinstance(part.get(name), int)), 0)
        if layers > held:
            raise UsageError(f"{directory}: config.json speaks of {layers} layers, but there are {held} weights in all")


def say_if_looked_up(model: str | Path) -> None:
    """Say so where a name that is not here begins as a folder here does: it may be a slip."""
    owner = Path(model).parts[0]
    if owner != str(model) and os.path.isdir(owner):
        say(f"note: the folder {owner} has no {Path(model).name}, so {model} is looked up on the hub")


def _refuse_endless(directory: Path) -> None:
    """Raise UsageError where a file of the directory is none: whoever opens a pipe or a device may wait for ever."""
    for path in directory.iterdir():
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UsageError(f"{path} is a pipe or device, which may never end: put the file itself there")


def refuse_quantized(model: str | Path, config: Mapping[str, Any]) -> None:
    """Raise UsageError for a configuration of quantized weights: each format would need a package of its own."""
    if found := config.get("quantization_config"):
        kind = str(found.get("quant_method", "unknown") if isinstance(found, dict) else found)[:40].upper()
        raise UsageError(
            f"{model} is quantized ({kind}): give the model in full precision that it was made of (only sampling with "
            "--engine vllm reads quantized models)"
        )


def refuse_foreign_files(path: Path, names: Iterable[Any]) -> None:
    """Raise UsageError where `path` names weights (None: nothing) that are no safetensors of its own folder."""
    for name in names:
        if name is not None and not (isinstance(name, str) and re.fullmatch(r"[^/\\]+\.safetensors", name)):
            raise UsageError(f"{path} names {str(name)[:200]!r}: weights are read from *.safetensors beside it alone")


def load_tokenizer(
    model: str | Path, revision: str | None = None, *, note: Callable[[str], None] = print, ends: bool = True
) -> Any:
    """The model's tokenizer, with an EOS and a pad token. `note` is told where EOS stands in for a missing pad.

    EOS as pad is harmless in generation: padded positions are masked. Raises UsageError without a tokenizer or, where
    texts have ends, without an EOS.
    """
    from transformers import AutoTokenizer

    with loading(f"the tokenizer of {model}"):
        tokenizer = AutoTokenizer.from_pretrained(str(model), revision=revision, trust_remote_code=False)
        tokenizer.decode(tokenizer("a")["input_ids"])  # some faults show when it is used
    if ends and tokenizer.eos_token_id is None:
        raise UsageError(
            f"the tokenizer of {model} has no EOS token, so no response could end; "
            'set "eos_token" in its tokenizer_config.json'
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
        note(f"note: the tokenizer of {model} has no pad token; its EOS token pads (masked, so harmless)")
    return tokenizer


def pad_id(tokenizer: Any, vocabulary: int) -> int:
    """An id to pad with that the embedding has: the tokenizer's, where it is none of those added without a row for it.

    Padding is masked, so any id in range serves.
    """
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)
    return next((id for id in known if id is not None and 0 <= id < vocabulary), 0)


def load_config(model: str | Path, revision: str | None = None, **changes: Any) -> Any:
    """The model's configuration. Raises UsageError where there is none, or where it needs code of its repository."""
    from transformers import AutoConfig

    with loading(f"the configuration of {model}"):
        config = AutoConfig.from_pretrained(str(model), revision=revision, trust_remote_code=False, **changes)
        positions_of(config)  # some faults show when it is asked
    return config


def end_ids(model: str | Path, tokenizer: Any, revision: str | None = None) -> tuple[int, ...]:
    """Token ids that end a response: the tokenizer's EOS and those of the model's generation configuration."""
    from transformers import GenerationConfig

    name = "generation_config.json"
    try:
        with loading(f"{name} of {model}"):
            configured = GenerationConfig.from_pretrained(str(model), revision=revision or "main").eos_token_id
    except UsageError as error:
        if (Path(model) / name).exists() or not isinstance(error.__cause__, OSError):
            raise
        name, configured = "config.json", getattr(load_config(model, revision), "eos_token_id", None)
    more = configured if isinstance(configured, list) else [configured]
    if not all(i is None or (type(i) is int and 0 <= i < 2**31) for i in more):
        raise UsageError(f"{model}: eos_token_id in {name} is no token id or list of them: correct it")
    return tuple(dict.fromkeys(i for i in [tokenizer.eos_token_id, *more] if i is not None))


def positions_of(config: Any) -> int | None:
    """The longest sequence in tokens that a model takes; None where its configuration does not say.

    Positions count as stretched where the configuration says what they are stretched from. Where a row's scaling
    depends on the longest row of its batch (longrope, dynamic NTK), the limit is where that begins, so that no row
    depends on others. Raises ValueError for a scaling that is none, which `load_config` finds.
    """
    config = config.get_text_config()
    limit = next((n for n in (getattr(config, name, None) for name in POSITIONS) if isinstance(n, int) and n > 0), None)
    if limit is None:
        return None
    if config.model_type in COUNTED_FROM_PAD:
        pad = config.pad_token_id
        return limit - 1 - (1 if pad is None else pad)
    scaling = getattr(config, "rope_parameters", None) or {}
    for part in (scaling, *scaling.values()):  # some have one for each kind of layer
        if isinstance(part, dict):
            factor, original = (_rope_number(part, name) for name in ("factor", "original_max_position_embeddings"))
            if original and part.get("rope_type") in ("yarn", "linear"):
                limit = max(limit, int(original * (factor or 1)))
            if original and part.get("rope_type") in ("longrope", "dynamic"):
                limit = min(limit, int(original))
    return limit


def _rope_number(rope: dict[str, Any], name: str) -> float | None:
    value = rope.get(name)
    if value is None or (type(value) in (int, float) and 0 < value < 10**9):
        return value
    raise ValueError(f"{name} of rope_parameters is {str(value)[:40]!r}, which is no number above 0")


def vocabulary_of(config: Any) -> int | None:
    """How many token ids a model has rows for in its embedding; None where its configuration does not say."""
    return getattr(config.get_text_config(), "vocab_size", None)


def refuse_unknown(texts: Iterable[Iterable[int]], vocabulary: int | None, model: str) -> None:
    """Raise UsageError where one of the texts, as token ids, has an id that the model has no row for."""
    highest = max((int(max(ids, default=0)) for ids in texts), default=0)
    if vocabulary is not None and highest >= vocabulary:
        raise UsageError(
            f"a text has token {highest}, but {model} has an embedding of {vocabulary}: a token was added to its "
            "tokenizer alone; leave it out of the texts, or resize the model (resize_token_embeddings) and train it"
        )


def check_adapter(adapter: str | Path, model: str | Path) -> AdapterInfo:
    """Refuse an adapter that is none, is unfinished, is no plain LoRA, or was made for another base than `model`."""
    directory = Path(adapter)
    if not (directory / "adapter_config.json").is_file():
        raise UsageError(f"{adapter} is no adapter directory: it has no adapter_config.json")
    config = _read_json(directory / "adapter_config.json")
    if not (directory / "adapter_model.safetensors").is_file():
        raise UsageError(f"adapter {adapter} is unfinished: it has no adapter_model.safetensors")
    if config.get("peft_type") != "LORA":
        raise UsageError(f"adapter {adapter} is of type {config.get('peft_type')}; only LoRA adapters are supported")
    if special := next((name for name, value in config.items() if value and not PLAIN.fullmatch(name)), None):
        raise UsageError(f"adapter {adapter} has {special}: only plain LoRA adapters are supported")
    shapes = _header(directory / "adapter_model.safetensors")
    with loading(f"the adapter {adapter}"):
        _check_base_name(adapter, config.get("base_model_name_or_path"), model)
        rank = max(map(int, [config.get("r", PEFT_DEFAULT), *(config.get("rank_pattern") or {}).values()]))
        info = AdapterInfo(directory.resolve(), rank, config, config.get("lora_alpha", PEFT_DEFAULT))
        changed = info.changes_base
        rebuilt = str(config.get("init_lora_weights")).lower() in REBUILT
    if Path(model).is_dir():
        _check_base_shapes(adapter, shapes, model)
    if changed and "init" in changed and not rebuilt:
        raise UsageError(f"adapter {adapter} has {changed}, which changed weights that it does not hold; {CONVERT}")
    return info


def _check_base_name(adapter: str | Path, base: str | None, model: str | Path) -> None:
    if not base or str(base) == str(model):
        return
    if Path(base).is_dir() and Path(model).is_dir():
        same = Path(base).resolve() == Path(model).resolve() or model_digest(base) == model_digest(model)
    else:  # a directory that has moved, or a copy of a hub model, cannot be told from another base by its name
        same = Path(base).is_absolute() or Path(model).is_dir() or Path(base).is_dir()
    if not same:
        raise UsageError(f"adapter {adapter} was made for the base {base}, not for {model}; give --model {base}")


def _check_base_shapes(adapter: str | Path, shapes: dict[str, tuple[str, list[int]]], model: str | Path) -> None:
    """Every LoRA pair must fit a weight of the base: A is (r, in), B is (out, r), the weight is out by in."""
    base = {_tail(name): value for name, value in _tensor_shapes(Path(model)).items()}
    patterns = {re.sub(r"\d+", "#", tail) for tail in base}
    found = False
    for name, (_, shape_a) in shapes.items():
        whole = base.get(_tail(name.removeprefix("base_model.model.").replace(".base_layer.", ".")))
        if whole and whole[0] in _FLOAT_DTYPES and whole[1] != shape_a:
            raise UsageError(
                f"adapter {adapter} holds {name} of {_times(shape_a)}, which in {model} is {_times(whole[1])}: give "
                "--model the resized model that it was trained with"
            )
        other = name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace(".lora_B.", ".lora_A.")
        if other not in shapes:
            raise UsageError(f"adapter {adapter} is unfinished: it has {name}, but no {other}")
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        shape_b = shapes[other][1]
        tail = _tail(f"{module}.weight")
        if tail not in base:
            if re.sub(r"\d+", "#", tail) in patterns:
                raise UsageError(f"adapter {adapter} is of another base: {model} has no module {module}")
            continue  # weights that the model renames or fuses when it loads them
        found = True
        dtype, shape = base[tail]
        if dtype in _FLOAT_DTYPES and sorted(shape) != sorted([shape_a[-1], shape_b[0]]):
            raise UsageError(
                f"adapter {adapter} is of another base: it changes {module} as {shape_b[0]} x {shape_a[-1]}, "
                f"which in {model} is {_times(shape)}"
            )
    if not found:
        raise UsageError(f"adapter {adapter} is of another base: none of its modules is in {model}")


def _times(shape: list[int]) -> str:
    return " x ".join(map(str, shape))


def _tail(name: str) -> str:
    """A weight's name from its first layer number on: 'model.layers.0.x' and 'layers.0.x' are the same weight."""
    match = re.search(r"(?:^|\.)(\d+\..*)$", name)
    return match.group(1) if match else name.removeprefix("model.").removeprefix("transformer.")


def _tensor_shapes(directory: Path) -> dict[str, tuple[str, list[int]]]:
    """dtype and shape of every weight of a model directory, from its safetensors headers."""
    index = directory / INDEX
    if index.is_file():
        names = sorted(index_files(index))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise UsageError(f"model directory {directory} is unfinished: {', '.join(missing)} missing")
    else:
        names = sorted(path.name for path in directory.glob("*.safetensors"))
    if not names:
        raise UsageError(f"{directory} has no weights: no *.safetensors file (other formats are not read)")
    shapes: dict[str, tuple[str, list[int]]] = {}
    for name in names:
        shapes |= _header(directory / name)
    return shapes


def weight_files(model: str | Path, revision: str | None = None) -> dict[str, Path]:
    """The file that holds each weight of a model directory or hub id, by the weight's name there. Raises UsageError."""
    from transformers.utils import cached_file

    def place(name: str) -> Path | None:
        if Path(model).is_dir():
            return Path(model, name) if Path(model, name).is_file() else None
        found = cached_file(str(model), name, revision=revision, _raise_exceptions_for_missing_entries=False)
        return Path(found) if found else None

    index = place(INDEX)
    names = sorted(index_files(index)) if index else ["model.safetensors"]
    if not index and Path(model).is_dir():
        names = sorted(path.name for path in Path(model).glob("*.safetensors"))
    found = [file for file in map(place, names) if file is not None]
    if not found or len(found) < len(names):
        raise UsageError(f"{model} has no whole set of *.safetensors files")
    return {name: file for file in found for name in _header(file)}


def index_files(index: Path) -> set[str]:
    """The files that an index of weights names. Raises UsageError for one that could run code or lies elsewhere."""
    weights = _read_json(index).get("weight_map")
    if not isinstance(weights, dict):
        raise UsageError(f"{index} is no index of weights: it has no weight_map")
    refuse_foreign_files(index, weights.values())
    return set(weights.values())


def _header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """dtype and shape by name from a safetensors header. Raises UsageError where the file is cut short."""
    from safetensors import SafetensorError, safe_open

    try:
        with explained(path, "read"), safe_open(str(path), framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is damaged or unfinished: {first_line(error)}; write it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is no valid JSON: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds a JSON {type(found).__name__}, not an object with fields: write it again")
    return found
