"""Engines: sampled ids, finish reasons, log-probabilities and seeds, against the model itself run step by step.

The hf engine runs here; real vLLM runs as a child process in its own environment (marker `vllm`).
"""

import json
import math
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Cache, DynamicCache

from ple_data.common.models import check_adapter, check_model, end_ids, load_config, load_tokenizer, positions_of
from ple_data.engines import (
    Completion,
    EngineSpec,
    Request,
    Sampling,
    choose_engine,
    cut_at_stop,
    hf,
    make_engine,
    parse_engine_args,
    response_text,
    vllm,
)
from ple_data.engines.hf import HfEngine
from ple_train.model.policy import load_causal_lm
from schemas.errors import UsageError
from tests import tiny
from tests.conftest import ROOT

PROMPTS = tiny.corpus()[::11]
MORE_ENDS = [100, 101, 102, 103, 104, 105, 106, 107]


def quiet(_: str) -> None:
    """For messages that a test does not look at."""


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy whose generation_config.json would change every response, and that has nine end tokens."""
    directory = tiny.tiny_policy(tmp_path_factory.mktemp("trap") / "trap", seed=5)
    config = {
        "do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.1, "repetition_penalty": 5.0, "min_length": 40,
        "max_new_tokens": 3, "no_repeat_ngram_size": 1, "eos_token_id": [1, *MORE_ENDS], "pad_token_id": 0,
    }  # fmt: skip
    (directory / "generation_config.json").write_text(json.dumps(config))
    return directory


def spec_of(model: Path, adapter: Path | None = None, **more: Any) -> EngineSpec:
    tokenizer = load_tokenizer(model, note=quiet)
    info = check_adapter(adapter, model) if adapter else None
    return EngineSpec(str(model), None, info, tokenizer, end_ids(model, tokenizer), 512, **more)


def requests_for(model: Path, texts: Sequence[str] = PROMPTS) -> list[Request]:
    tokenizer = load_tokenizer(model, note=quiet)
    return [Request(at, tuple(tokenizer(text).input_ids), 1000 + at) for at, text in enumerate(texts)]


def sample(engine: Any, units: Sequence[Sequence[Request]], **options: Any) -> dict[Any, Completion]:
    sampling = Sampling(**{"max_new_tokens": 24, **options})
    return {request.key: completion for request, completion in engine.sample(iter(units), sampling)}


@torch.inference_mode()
def true_logits(model: Any, prompt: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
    """Logits (len(ids), vocabulary) that predict each of `ids`, from one forward pass without padding or cache."""
    logits = model(torch.tensor([[*prompt, *ids]])).logits[0].float()
    return logits[len(prompt) - 1 : -1]


def assert_true_logps(model: Any, request: Request, ids: Sequence[int], logps: Sequence[float], atol: float) -> None:
    expected = true_logits(model, request.prompt_ids, ids).log_softmax(-1)[range(len(ids)), list(ids)]
    torch.testing.assert_close(torch.tensor(logps), expected, atol=atol, rtol=0)


def assert_ends_right(completion: dict[str, Any], ends: Sequence[int], length: int) -> None:
    """Stopped: the end token is the last and only one. Cut by length: all tokens, and none of them an end token."""
    ids = completion["ids"]
    if completion["finish"] == "stop":
        assert ids[-1] in ends
        assert not set(ids[:-1]) & set(ends)
    else:
        assert completion["finish"] == "length"
        assert len(ids) == length
        assert not set(ids) & set(ends)


# hf


@pytest.fixture(scope="module")
def engine(trap: Path) -> HfEngine:
    return HfEngine(spec_of(trap), {"batch_size": 8})


@pytest.fixture(scope="module")
def reference(trap: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(trap).eval()


def test_greedy_is_the_argmax_of_the_model(engine: HfEngine, reference: Any, trap: Path) -> None:
    """The traps of generation_config.json (penalties, temperature, lengths) change nothing."""
    requests = requests_for(trap)
    found = sample(engine, [requests], temperature=0.0)
    for request in requests:
        completion = found[request.key]
        assert true_logits(reference, request.prompt_ids, completion.ids).argmax(-1).tolist() == completion.ids
    assert max(len(completion.ids) for completion in found.values()) == 24


CHANGED = {"temperature": 0.7, "top_k": 9, "min_p": 0.01, "repetition_penalty": 1.5}


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "top_p": 0.7}, CHANGED])
def test_logps_are_the_models_own(engine: HfEngine, reference: Any, trap: Path, options: dict[str, float]) -> None:
    requests = requests_for(trap)
    found = sample(engine, [requests], **options)
    for request in requests:
        completion = found[request.key]
        assert completion.logps is not None
        assert_true_logps(reference, request, completion.ids, completion.logps, atol=1e-4)


def test_finish_reasons(engine: HfEngine, trap: Path) -> None:
    found = sample(engine, [requests_for(trap)])
    for completion in found.values():
        assert_ends_right({"ids": completion.ids, "finish": completion.finish}, [1, *MORE_ENDS], 24)
        assert completion.logps is not None
        assert len(completion.logps) == len(completion.ids)
    assert {completion.finish for completion in found.values()} == {"stop", "length"}


def test_a_requests_tokens_do_not_depend_on_its_place(trap: Path, engine: HfEngine) -> None:
    requests = requests_for(trap)
    together = sample(engine, [requests])
    alone = sample(HfEngine(spec_of(trap), {"batch_size": 1}), [requests[::-1]])
    assert {key: value.ids for key, value in together.items()} == {key: value.ids for key, value in alone.items()}
    other_seeds = [Request(r.key, r.prompt_ids, r.seed + 1) for r in requests]
    assert sample(engine, [other_seeds])[0].ids != together[0].ids


def test_batches_never_cross_a_unit(engine: HfEngine, trap: Path) -> None:
    """A unit gives the same bits whatever stands before it: that is what a resumed run needs."""
    requests = requests_for(trap)
    streamed = sample(engine, [requests[:5], requests[5:]])
    assert {**sample(engine, [requests[5:]]), **sample(engine, [requests[:5]])} == streamed


def test_it_tells_of_every_step_how_many_tokens_the_batch_has(trap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, told = HfEngine(spec_of(trap), {"batch_size": 64}), []
    monkeypatch.setattr(engine, "under_way", told.append)
    lengths = [len(found.ids) for found in sample(engine, [requests_for(trap)]).values()]
    steps = [sum(min(length, step) for length in lengths) for step in range(1, max(lengths) + 1)]
    assert told == steps
    assert min(lengths) < max(lengths)


def test_it_tells_no_token_behind_a_stop_string(trap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, told = HfEngine(spec_of(trap), {"batch_size": 64}), []
    monkeypatch.setattr(engine, "under_way", told.append)
    found = sample(engine, [requests_for(trap)], stop=("e",)).values()
    assert told[-1] == sum(len(one.ids) for one in found)


@pytest.mark.parametrize("options", [{}, {"stop": ("e",)}, {"repetition_penalty": 1.3, "logprobs": False}])
def test_rows_that_have_ended_leave_and_the_others_are_the_same(
    trap: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    engine = HfEngine(spec_of(trap, dtype="float32"), {"batch_size": 64})
    rows: list[int] = []
    engine._model.register_forward_pre_hook(
        lambda _, args, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    requests = requests_for(trap)
    leaving = sample(engine, [requests], **options)
    assert 0 < min(rows) < len(requests) == max(rows)
    rows.clear()
    engine._rows_leave = False
    staying = sample(engine, [requests], **options)
    assert set(rows) == {len(requests)}
    for key, one in staying.items():
        assert (leaving[key].ids, leaving[key].text, leaving[key].finish) == (one.ids, one.text, one.finish)
        assert leaving[key].logps == (one.logps and pytest.approx(one.logps, abs=1e-5))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.6)])
def test_samples_follow_the_distribution(
    engine: HfEngine, reference: Any, trap: Path, temperature: float, top_p: float
) -> None:
    """First tokens of 6,000 seeds against softmax(logits / T) cut to the nucleus, computed in plain Python."""
    prompt = requests_for(trap)[0].prompt_ids
    draws = 6000
    wide = HfEngine(spec_of(trap), {"batch_size": 2000})
    requests = [Request(seed, prompt, seed) for seed in range(draws)]
    found = sample(wide, [requests], max_new_tokens=1, temperature=temperature, top_p=top_p)
    logits = true_logits(reference, prompt, [0])[0].tolist()
    expected = nucleus([math.exp(value / temperature) for value in logits], top_p)
    counts = Counter(completion.ids[0] for completion in found.values())
    assert set(counts) <= set(expected)
    likely = sorted(expected, key=expected.__getitem__, reverse=True)[:20]
    for token in likely:
        share = expected[token]
        assert abs(counts[token] / draws - share) < 5 * math.sqrt(share * (1 - share) / draws)


def nucleus(weights: list[float], top_p: float) -> dict[int, float]:
    """Probabilities of the likeliest tokens whose sum first reaches top_p."""
    total = sum(weights)
    kept: dict[int, float] = {}
    for token in sorted(range(len(weights)), key=weights.__getitem__, reverse=True):
        if sum(kept.values()) >= top_p:
            break
        kept[token] = weights[token] / total
    return {token: share / sum(kept.values()) for token, share in kept.items()}


def test_stop_strings(engine: HfEngine, trap: Path) -> None:
    """The text ends before the stop string, the ids with the token that completed it; the prompt is not searched."""
    requests = requests_for(trap, [f"{text} zzz" for text in PROMPTS])
    plain = sample(engine, [requests])
    letters = Counter("".join(completion.text for completion in plain.values()))
    stop = next(letter for letter, _ in letters.most_common() if letter.isascii() and letter.isalpha())
    found = sample(engine, [requests], stop=(stop, "zzz"))
    tokenizer = load_tokenizer(trap)
    stopped = 0
    for key, completion in found.items():
        before = plain[key]
        assert completion.text == cut_at_stop(before.text, (stop, "zzz"))
        assert completion.ids == before.ids[: len(completion.ids)]
        if completion.text != before.text:
            stopped += 1
            assert completion.finish == "stop"
            assert stop in tokenizer.decode(completion.ids, skip_special_tokens=True)
            assert stop not in tokenizer.decode(completion.ids[:-1], skip_special_tokens=True)
            assert completion.logps is not None
            assert len(completion.logps) == len(completion.ids)
    assert stopped >= 3


def test_text_and_stop_strings_are_what_prompt_and_response_say_together(tmp_path: Path) -> None:
    """A SentencePiece tokenizer says the first space of a response after its prompt alone."""
    tokenizer = tiny.spm_tokenizer()
    spaced = [token for piece, token in tokenizer.get_vocab().items() if piece.startswith("▁") and len(piece) > 1]
    requests = requests_for(tiny.policy_of(tmp_path / "spm", tokenizer, seed=3), PROMPTS)
    engine = HfEngine(spec_of(tmp_path / "spm"), {})
    plain = sample(engine, [requests])
    for request in requests:
        said = tokenizer.decode([*request.prompt_ids, *plain[request.key].ids], skip_special_tokens=True)
        assert PROMPTS[request.key] + plain[request.key].text == said
    first = next(key for key, completion in plain.items() if completion.ids[0] in spaced)
    stop = plain[first].text[: len(tokenizer.convert_ids_to_tokens(plain[first].ids[0]))]
    assert stop.startswith(" ")
    stopped = sample(engine, [requests], stop=(stop,))[first]
    assert (stopped.text, stopped.ids, stopped.finish) == ("", plain[first].ids[:1], "stop")


def test_a_mark_that_ends_a_response_is_not_in_its_text() -> None:
    """Whether the tokenizer calls it special or not; a word that ends one stays."""
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_tokens(["<|over|>"])
    over, word = tokenizer.convert_tokens_to_ids("<|over|>"), tokenizer("a").input_ids[0]
    spec = EngineSpec("", None, None, tokenizer, (1, over, word), 9)
    ids = tokenizer("the film").input_ids
    assert [response_text(spec, [], [*ids, end]) for end in (1, over, word)] == ["the film", "the film", "the filma"]


def test_adapter_is_loaded_and_logps_are_its_own(policy: Path, adapter: Path) -> None:
    from peft import PeftModel

    requests = requests_for(policy)
    found = sample(make_engine("hf", spec_of(policy, adapter), {}), [requests])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policy), str(adapter)).eval()
    for request in requests:
        completion = found[request.key]
        assert completion.logps is not None
        assert_true_logps(model, request, completion.ids, completion.logps, atol=1e-4)
    assert found != sample(make_engine("hf", spec_of(policy), {}), [requests])


def test_the_output_layer_is_not_copied_for_every_row(policy: Path, adapter: Path) -> None:
    """As torch's bmm does with a weight that is frozen, as an adapter leaves it."""
    engine = HfEngine(spec_of(policy, adapter, dtype="bfloat16"), {})
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        sample(engine, [requests_for(policy)], max_new_tokens=1)
    assert "aten::bmm" not in {event.key for event in seen.key_averages()}


def test_without_logprobs(engine: HfEngine, trap: Path) -> None:
    requests = requests_for(trap)
    found = sample(engine, [requests], logprobs=False)
    assert all(completion.logps is None for completion in found.values())
    assert found[0].ids == sample(engine, [requests])[0].ids


# Arguments


def test_engine_arguments() -> None:
    texts = ["tensor-parallel-size=2", "enforce_eager=True", "dtype_kv=fp8", 'rope={"a": 1}', "x=None", "y=a=b"]
    assert parse_engine_args(texts) == {
        "tensor_parallel_size": 2, "enforce_eager": True, "dtype_kv": "fp8", "rope": {"a": 1}, "x": None, "y": "a=b",
    }  # fmt: skip
    with pytest.raises(UsageError, match="'batch_size' must be name=value"):
        parse_engine_args(["batch_size"])
    with pytest.raises(UsageError, match=r"batch_sise: the hf engine has no such argument; did you mean batch_size\?"):
        hf.check({"batch_sise": 2}, None)


def test_choice_of_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_engine(None) == "hf"
    with pytest.raises(UsageError, match="--engine vllm needs the package vllm"):
        choose_engine("vllm")
    with pytest.raises(UsageError, match="must be one of vllm, hf, server"):
        choose_engine("tgi")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert choose_engine(None) == "vllm"
    assert choose_engine("hf") == "hf"


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}, {"max_new_tokens": 0},
     {"stop": ("",)}],
)  # fmt: skip
def test_sampling_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Sampling(**options)


def test_bad_hf_arguments(policy: Path) -> None:
    for wrong in (0, 2.7, "abc", True, None):
        with pytest.raises(UsageError, match=f"batch_size must be a whole number of at least 1, not {wrong!r}$"):
            hf.check({"batch_size": wrong}, None)
    with pytest.raises(UsageError, match="--dtype must be auto"):
        HfEngine(spec_of(policy, dtype="int8"), {})


# Models, tokenizers and adapters that are none


def test_model_directories_that_are_none(tmp_path: Path, policy: Path, adapter: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        check_model(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        check_model(tmp_path / "file")
    with pytest.raises(UsageError, match=r"is no model directory: it has no config\.json"):
        check_model(tmp_path)
    with pytest.raises(UsageError, match="is an adapter; give it with --adapter"):
        check_model(adapter)
    copy = Path(shutil.copytree(policy, tmp_path / "copy"))
    (copy / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json is no valid JSON"):
        check_model(copy)
    shutil.copy(policy / "config.json", copy)
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(UsageError, match=r"model\.safetensors is damaged or unfinished"):
        check_model(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="has no weights"):
        check_model(copy)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match=r"is unfinished: model-00001-of-00002\.safetensors missing"):
        check_model(copy)
    check_model(policy)
    check_model("owner/hub-model")


def test_code_of_a_model_repository_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that only its own code can read is refused, even where a person could be asked whether to run it."""
    directory = tiny.tiny_policy(tmp_path / "own-code")
    config = json.loads((directory / "config.json").read_text())
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": [None, "own.Tokenizer"]}
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": names}))
    (directory / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    load_tokenizer(directory)  # its tokenizer.json needs no code
    for load in (load_config, load_causal_lm):
        with pytest.raises(UsageError):
            load(str(directory))
    assert not (tmp_path / "ran").exists()


def test_tokenizer_without_eos_without_pad_or_missing(tmp_path: Path, policy: Path) -> None:
    with pytest.raises(UsageError, match=r"no EOS token.*eos_token"):
        load_tokenizer(tiny.tiny_policy(tmp_path / "no-eos", eos=False))
    notes: list[str] = []
    tokenizer = load_tokenizer(tiny.tiny_policy(tmp_path / "no-pad", pad=False), note=notes.append)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert "no pad token" in notes[0]
    copy = Path(shutil.copytree(policy, tmp_path / "copy"))
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match="cannot load the tokenizer"):
        load_tokenizer(copy)


def test_end_ids_and_positions(trap: Path, policy: Path, tmp_path: Path) -> None:
    assert end_ids(trap, load_tokenizer(trap)) == (1, *MORE_ENDS)
    copy = Path(shutil.copytree(policy, tmp_path / "copy"))
    (copy / "generation_config.json").unlink()
    assert end_ids(copy, load_tokenizer(copy)) == (1,)
    assert positions_of(load_config(policy)) == 2048


def test_adapters_that_do_not_fit(tmp_path: Path, policy: Path, adapter: Path) -> None:
    assert check_adapter(adapter, policy).rank == 8
    with pytest.raises(UsageError, match="is no adapter directory"):
        check_adapter(tmp_path, policy)
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    weights = copy / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UsageError, match="is damaged or unfinished"):
        check_adapter(copy, policy)
    weights.unlink()
    with pytest.raises(UsageError, match=r"is unfinished: it has no adapter_model\.safetensors"):
        check_adapter(copy, policy)
    (copy / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    shutil.copy(adapter / "adapter_model.safetensors", copy)
    with pytest.raises(UsageError, match="is of type IA3"):
        check_adapter(copy, policy)


def test_adapters_of_another_base(tmp_path: Path, policy: Path, adapter: Path) -> None:
    """By the base that the adapter names, and, where that is gone, by its modules and shapes."""
    other_weights = tiny.tiny_policy(tmp_path / "other", seed=9)
    with pytest.raises(UsageError, match=f"was made for the base {policy}, not for {other_weights}"):
        check_adapter(adapter, other_weights)
    moved = Path(shutil.copytree(policy, tmp_path / "moved"))
    check_adapter(adapter, moved)
    config = json.loads((adapter / "adapter_config.json").read_text())
    orphan = Path(shutil.copytree(adapter, tmp_path / "orphan"))
    (orphan / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/base"}))
    check_adapter(orphan, policy)
    with pytest.raises(UsageError, match=r"of another base: it changes .* as 64 x 128, which in .* is 96 x 192"):
        check_adapter(orphan, tiny.tiny_policy(tmp_path / "wide", hidden=96))
    with pytest.raises(UsageError, match=r"of another base: .* has no module model\.layers\.1\."):
        check_adapter(orphan, tiny.tiny_policy(tmp_path / "shallow", layers=1))
    (orphan / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "owner/base"}))
    with pytest.raises(UsageError, match="give --model owner/base"):
        check_adapter(orphan, "owner/another")


# What hf tries when it starts


def test_rows_that_disturb_one_another_are_sampled_one_by_one_and_it_is_said(
    policy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = HfEngine._error
    monkeypatch.setattr(HfEngine, "_error", lambda engine, *row: (engine._batch_size - 1.0, alone(engine, *row)[1]))
    engine = HfEngine(spec_of(policy, dtype="float32"), {})
    assert engine._batch_size == 1
    assert (
        capsys.readouterr().err.count("rows of a batch disturb one another in LlamaForCausalLM: sampled one by one")
        == 1
    )


@pytest.mark.parametrize(("dtype", "tokens"), [("float32", 4), ("bfloat16", 16)])
def test_short_number_types_are_tried_on_more_tokens(
    policy: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, tokens: int
) -> None:
    asked = []
    sampled = HfEngine.sample
    monkeypatch.setattr(HfEngine, "sample", lambda engine, *how: asked.append(how[1]) or sampled(engine, *how))
    HfEngine(spec_of(policy, dtype=dtype), {})
    assert [sampling.max_new_tokens for sampling in asked] == [tokens] * 2  # once more with rows that leave


@pytest.mark.parametrize("broken", ["lacks", "raises", "keeps the wrong rows"])
def test_rows_stay_where_those_that_go_on_would_change(
    policy: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    select = DynamicCache.batch_select_indices
    if broken == "lacks":
        monkeypatch.delattr(Cache, "batch_select_indices")
    elif broken == "raises":
        monkeypatch.setattr(Cache, "batch_select_indices", lambda cache, rows: [][0])
    else:
        monkeypatch.setattr(Cache, "batch_select_indices", lambda cache, rows: select(cache, rows - rows.min()))
    assert not HfEngine(spec_of(policy, dtype="float32"), {})._rows_leave
    monkeypatch.undo()
    assert HfEngine(spec_of(policy, dtype="float32"), {})._rows_leave


def test_too_little_memory_when_it_is_tried_is_said_as_that(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(HfEngine, "_sample_batch", full)
    with pytest.raises(torch.OutOfMemoryError):
        HfEngine(spec_of(policy), {})


# vLLM


def test_vllm_is_not_started_with_half_a_model_or_adapter(policy: Path, adapter: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    module = "base_model.model.model.layers.1.self_attn.k_proj"
    half = Path(shutil.copytree(adapter, tmp_path / "half"))
    weights = load_file(half / "adapter_model.safetensors")
    for part in "AB":
        del weights[f"{module}.lora_{part}.weight"]
    save_file(weights, half / "adapter_model.safetensors")
    vllm._refuse_made_up(spec_of(policy, adapter))
    with pytest.raises(UsageError, match=rf"--adapter {half} lacks {module}"):
        vllm._refuse_made_up(spec_of(policy, half))
    broken = Path(shutil.copytree(policy, tmp_path / "broken"))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"hidden_act": "x"}))
    with pytest.raises(UsageError, match=f"^cannot load the model {broken}: "):
        vllm._refuse_made_up(spec_of(broken))


@pytest.fixture(scope="module")
def probe(vllm_python: str, trap: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one real vLLM engine answered (tests/vllm_probe.py)."""
    job = tmp_path_factory.mktemp("probe") / "job.json"
    prompts = [list(request.prompt_ids) for request in requests_for(trap)]
    job.write_text(json.dumps({"model": str(trap), "prompts": prompts, "stop": ["e", "zzz"]}))
    one_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # else two more processes import vLLM
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1", **one_process}
    done = subprocess.run(
        [vllm_python, "-m", "tests.vllm_probe", str(job)],
        capture_output=True,
        text=True,
        timeout=500,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.vllm
def test_vllm_finish_reasons_and_logps(probe: dict[str, Any], reference: Any, trap: Path) -> None:
    """Also cold: temperature and top-p change what is sampled, not the log-probabilities that are kept."""
    for way in ("sampled", "cold", "penalized"):
        for request, completion in zip(requests_for(trap), probe[way], strict=True):
            assert_ends_right(completion, [1, *MORE_ENDS], 24)
            assert_true_logps(reference, request, completion["ids"], completion["logps"], atol=2e-3)
    assert {completion["finish"] for completion in probe["sampled"]} == {"stop", "length"}
    likelier = [
        sum(sum(c["logps"]) for c in probe[way]) / sum(len(c["ids"]) for c in probe[way]) for way in ("sampled", "cold")
    ]
    assert likelier[1] > likelier[0] + 0.5


@pytest.mark.vllm
def test_vllm_tells_how_many_tokens_are_under_way(probe: dict[str, Any]) -> None:
    """After the first step a token of each; at the end none is under way."""
    told, lengths = probe["told"], [len(completion["ids"]) for completion in probe["told of"]]
    assert told[0] > 0
    assert max(lengths) < max(told) < sum(lengths)
    assert told[-1] == 0


@pytest.mark.vllm
def test_vllm_greedy_is_that_of_hf(probe: dict[str, Any], engine: HfEngine, trap: Path) -> None:
    """The traps of generation_config.json change nothing here either."""
    greedy = sample(engine, [requests_for(trap)], temperature=0.0)
    penalized = sample(engine, [requests_for(trap)], temperature=0.0, repetition_penalty=3.0)
    for way, found in (("greedy", greedy), ("top_k", greedy), ("min_p", greedy), ("penalized", penalized)):
        same = sum(found[at].ids == completion["ids"] for at, completion in enumerate(probe[way]))
        assert same >= len(PROMPTS) - 1, way
    assert greedy[0].text == probe["greedy"][0]["text"] != probe["penalized"][0]["text"]


@pytest.mark.vllm
def test_vllm_seeds_hold_in_other_batches(probe: dict[str, Any]) -> None:
    same = sum(a["ids"] == b["ids"] for a, b in zip(probe["sampled"], probe["other batches"], strict=True))
    assert same >= len(PROMPTS) - 2
    assert len({tuple(completion["ids"]) for completion in probe["sampled"]}) == len(PROMPTS)


@pytest.mark.vllm
def test_vllm_says_of_which_models_it_loads_no_adapter(probe: dict[str, Any]) -> None:
    assert "vllm loads no adapter on a GPT2LMHeadModel" in probe["GPT2LMHeadModel"]
    assert probe["LlamaForCausalLM"] == "not refused"


@pytest.mark.vllm
def test_vllm_is_never_left_to_choose_float16(probe: dict[str, Any]) -> None:
    assert probe["machine"] == ["bfloat16", "cpu"]
    assert probe["on an older card"] == "float32"  # vLLM itself would take float16


@pytest.mark.vllm
def test_vllm_stop_strings(probe: dict[str, Any], trap: Path) -> None:
    tokenizer = load_tokenizer(trap)
    stopped = [
        completion
        for completion in probe["stop"]
        if completion["finish"] == "stop" and completion["ids"][-1] not in [1, *MORE_ENDS]
    ]
    assert len(stopped) >= 3
    for completion in stopped:
        whole = tokenizer.decode(completion["ids"], skip_special_tokens=True)
        assert completion["text"] == whole[: whole.index("e")]
        assert "e" not in tokenizer.decode(completion["ids"][:-1], skip_special_tokens=True)


@pytest.mark.vllm
def test_vllm_without_logprobs(probe: dict[str, Any]) -> None:
    assert all(completion["logps"] is None for completion in probe["no logps"])


@pytest.mark.vllm
def test_vllm_refuses_before_it_starts(probe: dict[str, Any]) -> None:
    assert "did you mean tensor_parallel_size?" in probe["unknown"]
    assert "use --model" in probe["reserved"]
    assert "safetensors alone" in probe["pickles"]
    assert "rank 16, over the limit of --engine-arg max_lora_rank, 8" in probe["rank over our limit"]
    assert "rank 4096, over the limit of the vllm engine, 512" in probe["rank over vllm's limit"]
    assert "has use_dora, which vllm cannot load" in probe["dora"]
    assert "is too short" in probe["too short"]
