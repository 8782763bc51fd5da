"""What must hold before a model, tokenizer or adapter is used. Reads files' headers; never loads weights.

Every fault is a UsageError that names the directory and what to do, raised before an engine is started.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ple_data.common.digests import model_digest
from ple_data.common.loading import check_sizes, loading
from schemas.errors import UsageError, first_line
from schemas.files import explained
from schemas.json_text import parse_json

_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_FLOAT_DTYPES = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class AdapterInfo:
    """What an engine needs to know of a LoRA adapter before it starts."""

    path: Path
    rank: int
    config: dict[str, Any]


def check_model(model: str | Path) -> None:
    """Refuse a model directory that is none or unfinished. A hub id is left to the hub client."""
    directory = Path(model)
    if not directory.exists():
        if str(model).startswith((".", "/", "~")) or not _HUB_ID.match(str(model)):
            raise UsageError(f"model directory {model} does not exist; give a directory or a hub id")
        return
    if not directory.is_dir():
        raise UsageError(f"{model} is a file; --model takes a directory written by save_pretrained, or a hub id")
    if not (directory / "config.json").is_file():
        if (directory / "adapter_config.json").is_file():
            raise UsageError(f"{model} is an adapter; give it with --adapter and its base with --model")
        raise UsageError(f"{model} is no model directory: it has no config.json")
    check_sizes(_read_json(directory / "config.json"), str(directory / "config.json"))
    _tensor_shapes(directory)


def load_tokenizer(model: str | Path, revision: str | None = None, *, note: Callable[[str], None] = print) -> Any:
    """The model's tokenizer, with an EOS and a pad token. `note` is told where EOS stands in for a missing pad.

    EOS as pad is harmless in generation: padded positions are masked. Raises UsageError without a tokenizer or EOS.
    """
    from transformers import AutoTokenizer

    with loading(f"the tokenizer of {model}"):
        tokenizer = AutoTokenizer.from_pretrained(str(model), revision=revision, trust_remote_code=False)
        tokenizer.decode(tokenizer("a")["input_ids"])  # some faults show when it is used
    if tokenizer.eos_token_id is None:
        raise UsageError(
            f"the tokenizer of {model} has no EOS token, so no response could end; "
            'set "eos_token" in its tokenizer_config.json'
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        note(f"note: the tokenizer of {model} has no pad token; its EOS token pads (masked, so harmless)")
    return tokenizer


def load_config(model: str | Path, revision: str | None = None) -> Any:
    """The model's configuration. Raises UsageError where there is none, or where it needs code of its repository."""
    from transformers import AutoConfig

    with loading(f"the configuration of {model}"):
        return AutoConfig.from_pretrained(str(model), revision=revision, trust_remote_code=False)


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


def max_positions(model: str | Path, revision: str | None = None) -> int | None:
    """The longest sequence in tokens that the model was made for; None where its configuration does not say."""
    config = load_config(model, revision)
    with loading(f"the configuration of {model}"):
        text_config = config.get_text_config()
        scaling = getattr(text_config, "rope_parameters", None) or {}
        if scaling.get("rope_type", "default") != "default":
            return None
        positions = getattr(text_config, "max_position_embeddings", None)
        return None if positions is None else int(positions)


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
    shapes = _header(directory / "adapter_model.safetensors")
    _check_base_name(adapter, config.get("base_model_name_or_path"), model)
    if Path(model).is_dir():
        _check_base_shapes(adapter, shapes, model)
    with loading(f"the adapter {adapter}"):
        rank = max(map(int, [config.get("r", 0), *(config.get("rank_pattern") or {}).values()]))
    return AdapterInfo(directory.resolve(), rank, config)


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
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        shape_b = shapes.get(name.replace(".lora_A.", ".lora_B."), ("", [0]))[1]
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
                f"which in {model} is {' x '.join(map(str, shape))}"
            )
    if not found:
        raise UsageError(f"adapter {adapter} is of another base: none of its modules is in {model}")


def _tail(name: str) -> str:
    """A weight's name from its first layer number on: 'model.layers.0.x' and 'layers.0.x' are the same weight."""
    match = re.search(r"(?:^|\.)(\d+\..*)$", name)
    return match.group(1) if match else name.removeprefix("model.").removeprefix("transformer.")


def _tensor_shapes(directory: Path) -> dict[str, tuple[str, list[int]]]:
    """dtype and shape of every weight of a model directory, from its safetensors headers."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        with loading(f"the index of weights {index}"):
            names = sorted(set(_read_json(index)["weight_map"].values()))
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
