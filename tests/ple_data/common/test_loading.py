"""Files of models, tokenizers and adapters that no library expects: one UsageError that names them."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from ple_data.common.loading import check_sizes, loading
from ple_data.common.models import check_adapter, check_model, end_ids, load_config, load_tokenizer
from ple_data.engines import EngineSpec
from ple_data.engines.hf import HfEngine
from ple_data.rewards import load_reward_model
from ple_train.model.policy import load_adapter, load_causal_lm
from schemas.errors import PleError, UsageError, first_line

DEEP = "[" * 100_000 + "]" * 100_000


def changed(source: Path, place: Path, file: str, **values: Any) -> Path:
    """A copy of a model's folder with other values in one of its JSON files; `whole` is all of it, as JSON text."""
    copy = Path(shutil.copytree(source, place / "copy"))
    whole = values.pop("whole", None)
    text = whole if whole is not None else json.dumps(json.loads((copy / file).read_text()) | values)
    (copy / file).write_text(text)
    return copy


@pytest.mark.parametrize(
    "error",
    [TypeError("odd"), KeyError("k"), RuntimeError(""), RecursionError("deep"), type("Panic", (BaseException,), {})()],
)
def test_whatever_a_library_raises_is_one_sentence(error: BaseException) -> None:
    sentence = r"^cannot load the model M: .*; check that its files are whole"
    with pytest.raises(UsageError, match=sentence), loading("the model M"):
        raise error


def test_where_the_hub_cannot_be_reached_a_name_may_be_a_slip() -> None:
    error = OSError("We couldn't connect to 'https://hub' to load the files.")
    told = "cannot load the model M: We couldn't connect to 'https://hub' to load the files; no folder of this name is"
    with pytest.raises(UsageError, match=told), loading("the model M"):
        raise error
    with pytest.raises(UsageError, match="the files; neither this nor that"), loading("M", "neither this nor that"):
        raise error


@pytest.mark.parametrize("error", [PleError("ours"), KeyboardInterrupt(), MemoryError()])
def test_our_own_errors_and_too_little_memory_pass(error: BaseException) -> None:
    with pytest.raises(type(error)), loading("the model M"):
        raise error


def test_the_first_line_of_an_error_takes_what_its_heading_announces() -> None:
    assert first_line(ValueError("Validation error for field 'x':\n    TypeError: expected int\nmore")) == (
        "Validation error for field 'x': TypeError: expected int"
    )
    assert first_line(ValueError("a\nb")) == "a"


@pytest.mark.parametrize(
    ("file", "values", "load"),
    [
        ("config.json", {"vocab_size": "x"}, load_config),
        ("config.json", {"rope_parameters": 1e308}, load_config),
        ("config.json", {"model_type": []}, load_config),
        ("config.json", {"num_hidden_layers": 10**12}, check_model),
        ("config.json", {"text_config": {"vocab_size": 10**12}}, check_model),
        ("config.json", {"num_hidden_layers": float("inf")}, check_model),
        ("config.json", {"num_hidden_layers": 10**4000}, check_model),
        ("config.json", {"whole": "[]"}, check_model),
        ("config.json", {"whole": DEEP}, check_model),
        ("config.json", {"whole": '{"vocab_size": ' + "9" * 5000 + "}"}, check_model),
        ("config.json", {"hidden_act": "x"}, load_causal_lm),
        ("config.json", {"num_key_value_heads": -1}, load_causal_lm),
        ("config.json", {"max_position_embeddings": "x"}, load_config),
        *(
            ("config.json", {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4} | more}, load_config)
            for kind, more in (
                ("yarn", {"factor": float("inf")}),
                ("yarn", {"factor": 2.0, "original_max_position_embeddings": "x"}),
                ("linear", {"factor": "x"}),
                ("linear", {"factor": -2.0}),
                ("dynamic", {"factor": 2.0, "original_max_position_embeddings": "x"}),
                ("dynamic", {"factor": 2.0, "original_max_position_embeddings": float("nan")}),
                ("longrope", {"factor": True, "short_factor": [1.0] * 16, "long_factor": [1.0] * 16}),
            )
        ),
        ("tokenizer_config.json", {"tokenizer_class": 1.0}, load_tokenizer),
        ("tokenizer_config.json", {"eos_token": 7}, load_tokenizer),
        ("tokenizer_config.json", {"model_max_length": "x"}, load_tokenizer),
        ("tokenizer_config.json", {"whole": "null"}, load_tokenizer),
        ("tokenizer_config.json", {"whole": DEEP}, load_tokenizer),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)[:50]),
)
def test_a_model_that_no_library_expects(tmp_path: Path, policy: Path, file: str, values: dict, load: Any) -> None:
    copy = changed(policy, tmp_path, file, **values)
    began = time.monotonic()
    with pytest.raises(UsageError, match=str(copy)) as refusal:
        load(copy)
    assert len(str(refusal.value)) < 1000
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("value", ["x", [[]], -1, 1e308, 10**20, {}])
def test_end_ids_that_are_none(tmp_path: Path, policy: Path, value: Any) -> None:
    copy = changed(policy, tmp_path, "generation_config.json", eos_token_id=value)
    with pytest.raises(UsageError, match=r"generation_config\.json"):
        end_ids(copy, load_tokenizer(policy))


@pytest.mark.parametrize("whole", ["{", "7", DEEP])
def test_a_generation_config_that_does_not_read_is_not_passed_over(tmp_path: Path, policy: Path, whole: str) -> None:
    copy = changed(policy, tmp_path, "generation_config.json", whole=whole)
    with pytest.raises(UsageError, match=r"cannot load generation_config\.json"):
        end_ids(copy, load_tokenizer(policy))


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": 0.5},
        {"alpha_pattern": "x"},
        {"lora_alpha": "x"},
        {"r": "x"},
        {"rank_pattern": []},
        {"task_type": ""},
        {"trainable_token_indices": "x"},
        {"whole": "[]"},
    ],
    ids=str,
)
def test_an_adapter_that_no_library_expects(tmp_path: Path, policy: Path, adapter: Path, values: dict) -> None:
    copy = changed(adapter, tmp_path, "adapter_config.json", **values)

    def sample() -> None:
        spec = EngineSpec(str(policy), None, check_adapter(copy, policy), load_tokenizer(policy), (0,), 8, "float32")
        HfEngine(spec, {"device": "cpu"})

    def train() -> None:
        check_adapter(copy, policy)
        load_adapter(load_causal_lm(str(policy)), str(copy))

    for use in (sample, train):
        with pytest.raises(UsageError, match=str(copy)):
            use()


@pytest.mark.parametrize(
    "values", [{"id2label": "x"}, {"head_dim": "x"}, {"hidden_size": True}, {"num_hidden_layers": 10**12}], ids=str
)
def test_a_reward_model_that_no_library_expects(tmp_path: Path, reward: Path, values: dict) -> None:
    copy = changed(reward, tmp_path, "config.json", **values)
    with pytest.raises(UsageError, match=str(copy)):
        load_reward_model(str(copy))


def test_a_limit_that_is_no_whole_number_does_not_stop_a_reward_model(tmp_path: Path, reward: Path) -> None:
    copy = changed(reward, tmp_path, "tokenizer_config.json", model_max_length=0.5)
    assert len(load_reward_model(str(copy)).score([("the film", " was good")])) == 1


def test_sizes_of_real_models_are_taken() -> None:
    real = {"vocab_size": 262_144, "num_hidden_layers": 126, "max_position_embeddings": 10_485_760, "n_experts": 512}
    check_sizes(real | {"vocab_size_per_layer_input": 262_144, "rope_theta": 1e9, "layer_types": ["x"]}, "config.json")
