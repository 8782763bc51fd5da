"""What holds on a GPU, as far as a machine without one can show it: choice of device and number type, nothing that
waits for the device inside a step, steps that are read late. `benchmarks/gpu.py` is for where there is a GPU.

The device `meta` has shapes and no values: whatever would wait for a number of a GPU raises an error there. Copies to a
GPU, which wait unless they come from pinned memory, are shown with stand-ins for what torch does.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from ple_data.common import device as devices
from ple_data.common.settings import Settings
from ple_data.engines import hf
from ple_data.rewards.classifier import ClassifierReward
from ple_train import loss
from ple_train.engine import loop as loops
from ple_train.engine.checkpoint import Checkpoints
from ple_train.engine.loop import Reading, make_accelerator, train_loop
from ple_train.model import attention
from ple_train.model.batches import MicroBatch, Sequence
from ple_train.model.lora import fuse
from ple_train.model.policy import Policy, load_causal_lm, load_policy, resolve_precision
from ple_train.objectives.pairs import PairObjective
from ple_train.objectives.responses import SftObjective
from ple_train.stream import Response
from schemas.errors import PleError, UsageError
from schemas.options import Loop, Rewards, Written
from tests.ple_data.engines.test_engines import spec_of

META = torch.device("meta")


@pytest.fixture
def card(monkeypatch):
    """A GPU of a compute capability, as far as torch's questions about it go."""

    def insert(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Card")

    return insert


@pytest.mark.parametrize(
    ("capability", "dtype", "precision"),
    [
        ((7, 0), "float32", "float32"),  # V100: bfloat16 is emulated there, float16 would be the fast one
        ((7, 5), "float32", "float32"),
        ((8, 0), "bfloat16", "bf16"),
        ((8, 9), "bfloat16", "bf16"),
        ((9, 0), "bfloat16", "bf16"),
    ],
)
def test_bfloat16_is_taken_where_the_card_computes_in_it_and_float16_nowhere(card, capability, dtype, precision):
    card(*capability)
    words = f"Card (compute capability {capability[0]}.{capability[1]})"
    assert hf.resolve_machine("auto", {}) == (dtype, words)
    assert resolve_precision("auto") == precision
    assert hf.resolve_machine("float16", {}) == ("float16", words)
    assert hf.resolve_machine("auto", {"device": "cpu"}) == ("float32", "cpu")


def test_a_cpu_stays_in_float32():
    assert devices.default_device() == torch.device("cpu")
    assert hf.resolve_machine("auto", {}) == ("float32", "cpu")
    assert resolve_precision("auto") == "float32"


def test_amds_cards_compute_in_bfloat16_whatever_their_number(card, monkeypatch):
    card(1, 0)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert devices.natural_dtype(torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize(("name", "message"), [("cuda:1", "torch finds 1 GPUs here"), ("gpu", "knows no such device")])
def test_a_device_that_is_not_there_is_refused(card, name, message):
    card(9, 0)
    with pytest.raises(UsageError, match=message):
        hf.resolve_machine("auto", {"device": name})
    assert devices.chosen_device("cuda", "--reward-device") == torch.device("cuda")


def test_a_model_is_loaded_straight_to_the_device(policy, monkeypatch):
    """No second copy on the host: on meta nothing could have been copied from there."""
    monkeypatch.setattr("ple_train.model.policy.default_device", lambda: META)
    assert {parameter.device for parameter in load_causal_lm(str(policy)).parameters()} == {META}


def pairs() -> list[Sequence]:
    """Two pairs that share their prompts and one response alone; the tags of every set and age."""
    numbers = np.random.default_rng(0)
    sequences = []
    for query, (prompt, *lengths) in enumerate([(4, 3, 5), (6, 2, 4), (2, 3)]):
        x = numbers.integers(0, 64, prompt)
        for arm, length, sign in zip(("y", "y_prompt"), lengths, (-0.5, 0.5), strict=False):
            ids = np.concatenate([x, numbers.integers(0, 64, length)]).astype(np.int32)
            tag = Response(arm, "rank" if query else "wsft", query, sign)
            sequences.append(Sequence(ids, prompt, tag, query=query))
    return sequences


def meta_policy(*, lora: bool = True) -> Policy:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    with META:
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        if lora:
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
            fuse(model)
    attention.register()
    return Policy(model)


@pytest.fixture
def kernels_on_meta(monkeypatch):
    """torch's kernel for packed rows has shapes on meta, autocast has nothing there; the loss wants to know a chunk."""
    if attention.varlen_kernel() is None:
        pytest.skip("this torch has no varlen_attn that scales and knows windows")
    monkeypatch.setattr(attention, "kernels_take", lambda values: values.dtype == torch.bfloat16)
    monkeypatch.setitem(loss.LOGITS_PER_CHUNK, "meta", 1 << 10)
    asked, context = torch.is_autocast_enabled, torch.autocast
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": device != "meta" and asked(device))
    monkeypatch.setattr(
        torch, "autocast", lambda device, *a, **k: nullcontext() if device == "meta" else context(device, *a, **k)
    )


class Operations(TorchDispatchMode):
    """The names of all operations that run on the device, backward passes and optimizers included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(isinstance(value, torch.Tensor) and value.device == META for value in tree_leaves((args, kwargs))):
            self.names.append(str(func))  # AdamW asks for its count of steps, which lies on the host
        return func(*args, **(kwargs or {}))

    def count(self, name: str) -> int:
        return sum(name in found for found in self.names)


WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "is_nonzero", "equal.default")


@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize("name", list(attention.OURS))
@pytest.mark.parametrize("delta", [None, 0.3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_waits_for_nothing(kernels_on_meta, layout, name, delta, checkpointing):
    policy = meta_policy()
    base = policy.model.get_base_model()
    base.set_attn_implementation(name)
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy.train()
    policy.layout = layout
    objective = PairObjective(policy, delta)
    parameters = list(policy.trainable().values())
    optimizer = torch.optim.AdamW(parameters, foreach=True)
    with Operations() as ran:
        found, sums = objective(policy, MicroBatch(pairs(), 3), step=0)
        found.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    assert all(parameter.grad is not None and parameter.grad.device == META for parameter in parameters)
    assert sums.shape == (len(objective.sums),)
    assert {found.device, sums.device, norm.device} == {META}
    assert [word for word in WAITING if ran.count(word)] == []
    if name == attention.VARLEN:  # one call a layer: forward, the start policy's pass, and again where it is recomputed
        assert ran.count("_varlen_attn.default") == 3 * (2 + checkpointing)
        assert ran.count("_varlen_attn_backward") == 3
        assert ran.count("scaled_dot_product") == 0


@pytest.mark.parametrize("empty", [False, True])
def test_the_loop_waits_for_nothing_but_its_readings(kernels_on_meta, tmp_path, monkeypatch, empty):
    """Also where a step has no gradient at all: torch's norm of nothing lies on the host."""
    policy = meta_policy()
    policy.model.get_base_model().set_attn_implementation(attention.VARLEN)
    policy.layout = "shared"
    stand_in = SimpleNamespace(
        device=META,
        num_processes=1,
        process_index=0,
        is_main_process=True,
        prepare=lambda *parts: parts,
        no_sync=lambda model: nullcontext(),
        clip_grad_norm_=torch.nn.utils.clip_grad_norm_,
        wait_for_everyone=lambda: None,
    )
    found = []
    numbers = 2 + len(PairObjective.sums)
    monkeypatch.setattr(Reading, "read", lambda reading: found.append(reading) or [0.0] * numbers)
    monkeypatch.setattr(loops, "training_state", lambda *_, keep: ({}, {}))  # it copies to the host
    monkeypatch.setattr(Checkpoints, "save", lambda *_: None)
    stream = Batches()
    if empty:
        stream.batches = lambda epoch, start: iter([([], 3)] * (stream.steps_per_epoch - start))
    settings = Loop(learning_rate=1e-3, microbatch_tokens=16)
    objective = PairObjective(policy, 0.3)
    train_loop(
        stand_in, policy, policy.trainable(), stream, objective, settings, Checkpoints(tmp_path, Settings(Loop, {}))
    )
    assert len(found) == stream.steps_per_epoch
    assert {(reading._host.device, len(reading._host)) for reading in found} == {(META, numbers)}


class Card:
    """What torch would do with a GPU, written down: this machine's memory takes its place."""

    type = "cuda"

    def __init__(self, monkeypatch) -> None:
        self.did: list[str] = []
        pinned = set()
        copied, listed = torch.Tensor.copy_, torch.Tensor.tolist

        def pin(tensor):
            pinned.add(tensor.data_ptr())
            return tensor

        def to(tensor, device, non_blocking=False):
            self.did.append(f"{'pinned' if tensor.data_ptr() in pinned else 'pageable'}, waiting {not non_blocking}")
            return tensor

        def copy_(tensor, other, non_blocking=False):
            self.did.append(f"copied, waiting {not non_blocking}")
            return copied(tensor, other)

        def tolist(tensor):
            self.did.append("listed")
            return listed(tensor)

        event = SimpleNamespace(
            record=lambda: self.did.append("event"), synchronize=lambda: self.did.append("waited for the event")
        )
        for name, stand_in in (("pin_memory", pin), ("to", to), ("copy_", copy_), ("tolist", tolist)):
            monkeypatch.setattr(torch.Tensor, name, stand_in)
        monkeypatch.setattr(torch.cuda, "Event", lambda: event)


def test_batches_go_to_a_gpu_from_pinned_memory_without_waiting(monkeypatch):
    card = Card(monkeypatch)
    devices.upload(np.arange(3), card)
    assert card.did == ["pinned, waiting False"]


def test_numbers_come_back_without_waiting_until_they_are_read(monkeypatch):
    empty = torch.empty_like
    card = Card(monkeypatch)
    monkeypatch.setattr(torch, "empty_like", lambda like, device, pin_memory: empty(torch.zeros(2)))
    values = SimpleNamespace(device=card)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda tensor, other, non_blocking: card.did.append(non_blocking))
    reading = Reading(values)
    assert card.did == [True, "event"]
    reading.read()
    assert card.did == [True, "event", "waited for the event", "listed"]


def test_every_loader_puts_the_weights_straight_where_they_compute(policy, adapter, reward, monkeypatch):
    asked = []
    load = devices.load_weights

    def loading(kind, model, device, *words, **options):
        asked.append(device.type)
        return load(kind, model, device, *words, **options)

    for room in ("ple_data.engines.hf", "ple_train.model.policy", "ple_data.common.device"):
        monkeypatch.setattr(f"{room}.load_weights", loading)
    hf.HfEngine(spec_of(policy, adapter), {})
    ClassifierReward(str(reward), Rewards())
    load_policy(str(policy))
    assert asked == ["cpu", "cpu", "cpu"]


def test_weights_go_straight_to_a_gpu_whose_attention_knows_any_length(policy, monkeypatch):
    """cuDNN's attention makes a plan for every length that it has not seen, 120 ms each on an H100."""
    cudnn, asked = [], []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", cudnn.append)

    def from_pretrained(model, **options):
        asked.append(options)
        nothing = dict.fromkeys(("missing_keys", "mismatched_keys", "unexpected_keys"), ())
        return SimpleNamespace(base_model_prefix="model", state_dict=dict), nothing

    kind = SimpleNamespace(from_pretrained=from_pretrained)
    devices.load_weights(kind, str(policy), torch.device("cpu"), "m", dtype=1)
    assert {"use_safetensors": True, "trust_remote_code": False, "dtype": 1}.items() <= asked[1].items()
    assert ([how.get("device_map") for how in asked], cudnn) == ([{"": META}, None], [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    devices.load_weights(kind, str(policy), torch.device("cuda", 1), "m")
    assert ([how["device_map"][""] for how in asked[2:]], cudnn) == ([META, torch.device("cuda", 1)], [False])


def test_kernels_get_one_number_type_without_autocast_too(kernels_on_meta, monkeypatch):
    """A model's norms and rotations may leave float32 in query and key; values are in bfloat16."""
    seen = []

    def kernel(*tensors_and_more):
        seen.extend(tensor.dtype for tensor in tensors_and_more[:3])
        return tensors_and_more[0]

    monkeypatch.setattr(attention, "varlen_kernel", lambda: kernel)
    q, k = (torch.empty(1, heads, 5, 8, device=META) for heads in (4, 2))
    packing = attention.Packing.of([(2, 1, 2)], META)
    attention.varlen_attention(torch.nn.Identity(), q, k, k.bfloat16(), None, packing=packing)
    assert seen == [torch.bfloat16] * 3


def test_the_other_objectives_wait_for_nothing_either(kernels_on_meta):
    from ple_train.objectives.rewards import LabelObjective, PreferenceObjective

    policy = meta_policy()
    policy.model.get_base_model().set_attn_implementation(attention.VARLEN)
    sft = SftObjective(policy)
    found, sums = sft(policy, MicroBatch(pairs(), 10), step=0)
    found.backward()
    assert sums.shape == (len(sft.sums),)

    def rewards(sequences):
        return torch.zeros(len(sequences), 2, device=META, requires_grad=True)

    labelled = [Sequence(np.arange(3, dtype=np.int32), 0, tag=label) for label in (0, 1)]
    preferred = [Sequence(np.arange(3, dtype=np.int32), 0, beside=labelled[0])]
    for objective, sequences in ((LabelObjective(), labelled), (PreferenceObjective(), preferred)):
        found, sums = objective(rewards, MicroBatch(sequences, len(sequences)), step=0)
        found.backward()
        assert (sums.shape, sums.device) == ((len(objective.sums),), META)


def test_a_wait_would_be_seen(kernels_on_meta, monkeypatch):
    """The test above can fail: a length that is asked of the device is an error on meta."""
    policy = meta_policy(lora=False)

    def asking(module, query, key, value, mask, packing=None, **more):
        packing.borders_q.diff().tolist()
        return attention.packed_attention(module, query, key, value, mask, packing=packing)

    monkeypatch.setitem(attention.OURS, attention.PACKED, asking)
    attention.register()
    policy.model.set_attn_implementation(attention.PACKED)
    try:
        with pytest.raises(NotImplementedError, match="meta tensor"):
            policy(policy.collate(pairs()))
    finally:
        monkeypatch.undo()
        attention.register()


class Batches:
    """A global batch a step, the same sequences in other orders."""

    steps_per_epoch = 5

    def batches(self, epoch, start):
        for step in range(start, self.steps_per_epoch):
            yield pairs()[step % 2 :], 3


def train(policy_dir, directory, *, ahead, broken=None):
    """Metrics without times, the trained weights, and how many steps had begun when each was read."""
    model = load_policy(str(policy_dir))
    begun, begun_when_read = set(), []
    read = Reading.read

    class Watched(PairObjective):
        def __call__(self, model, batch, step):
            begun.add(step)
            found, sums = super().__call__(model, batch, step)
            return (found * float("nan") if step == broken else found), sums

    def watched(reading):
        begun_when_read.append(len(begun))
        return read(reading)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loops.STEPS_AHEAD, "cpu", ahead)
        patch.setattr(Reading, "read", watched)
        history = train_loop(
            make_accelerator(),
            model,
            model.trainable(),
            Batches(),
            Watched(model, None),
            Loop(learning_rate=1e-2, epochs=2, checkpoint_every=4),
            Checkpoints(directory, Settings(Loop, {})),
        )
    times = ("seconds", "tokens_per_second")
    weights = {name: p.detach().clone() for name, p in model.trainable().items()}
    return [{k: v for k, v in step.items() if k not in times} for step in history], weights, begun_when_read


def test_steps_that_are_read_late_are_the_same_steps(policy, tmp_path):
    """With a queue the first step is read when the second was handed over, and so on; a checkpoint reads them all."""
    at_once = train(policy, tmp_path / "a", ahead=0)
    late = train(policy, tmp_path / "b", ahead=1)
    assert at_once[2] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert late[2] == [2, 3, 4, 4, 6, 7, 8, 8, 10, 10]
    assert late[0] == at_once[0]
    assert all(torch.equal(weight, at_once[1][name]) for name, weight in late[1].items())
    assert [step["step"] for step in late[0]] == list(range(1, 11))


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_step_that_is_not_finite_is_named_and_its_checkpoint_is_never_written(policy, tmp_path, ahead):
    """Step 8 is due a checkpoint; step 7 is broken, and what came of it is not saved."""
    with pytest.raises(PleError, match=r"step 7: the loss is nan .*checkpoint-00000004"):
        train(policy, tmp_path, ahead=ahead, broken=6)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000004"]


def test_the_machine_is_said_and_recorded(card, capsys, tmp_path):
    from ple_train.engine.output import Output

    accelerator = SimpleNamespace(is_main_process=True, device=torch.device("cuda", 0), log_with=[])
    out = Output(Settings(Written, {}), "ple", Written(output=tmp_path), accelerator)
    card(9, 0)
    out.note_machine("bf16", attention=attention.VARLEN, layout="shared")
    assert out.machine == {
        "device": "Card (compute capability 9.0)",
        "precision": "bf16",
        "attention": "ple_varlen",
        "layout": "shared",
    }
    assert "training on Card (compute capability 9.0) in bf16: attention ple_varlen, layout shared" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("auto", ["ple_varlen", "ple_varlen", "ple_packed", "ple_packed", "sdpa"]),
        ("ple_packed", ["ple_packed", "ple_packed"]),
        ("ple_varlen", ["ple_varlen", "ple_varlen"]),
        ("eager", ["eager", "eager"]),
    ],
)
def test_a_gpu_in_bf16_tries_one_call_first(asked, expected, monkeypatch):
    from ple_train.model.policy import _candidates

    for installed in (False, True):
        monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda there=installed: there)
        found = [name for name, _ in _candidates(asked, "sdpa", torch.device("cuda"), "bf16")]
        theirs = ["flash_attention_2"] if installed and asked == "auto" else []
        assert found == [*expected[:4], *theirs, *expected[4:]]
    assert all(name != attention.VARLEN for name, _ in _candidates("auto", "sdpa", torch.device("cuda"), "float32"))
    assert all(name != attention.VARLEN for name, _ in _candidates("auto", "sdpa", torch.device("cpu"), "bf16"))
