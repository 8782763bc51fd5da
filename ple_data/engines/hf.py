"""Engine `hf`: transformers' `generate` with left padding, one batch after another. Runs wherever torch runs.

A batch never crosses a unit, and a request's random numbers come from its own seed, so a unit that is sampled again
after a kill is the same to the bit (float32 on CPU). Never trains and never merges an adapter.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ple_data.common.device import chosen_device, describe, load_adapter, load_weights, natural_dtype, upload
from ple_data.common.loading import is_out_of_memory
from ple_data.common.models import AdapterInfo, pad_id
from ple_data.engines import (
    Completion,
    EngineSpec,
    Request,
    Sampling,
    cut_at_stop,
    refuse_no_numbers,
    refuse_unknown,
    response_text,
)
from schemas.errors import UsageError, first_line

ENGINE_ARGS = ("batch_size", "device", "attn_implementation")
DEFAULT_BATCH = 64
TOLERANCE = {torch.float32: 1e-4}
"""Mean difference between log-probabilities as they are sampled and those of the model alone, over their mean size,
that is forgiven; 0.03 where numbers are shorter."""
LEAVE = 0.25
"""Share of a batch's rows that have ended, at which they leave it: the model has fewer rows then."""
STOP_WINDOW = 32
"""Tokens at a response's end that are searched for a stop string after each step, beside the string's own bytes."""


def check(engine_args: Mapping[str, Any], adapter: AdapterInfo | None) -> None:
    """Refuse engine arguments that there are not."""
    refuse_unknown(engine_args, ENGINE_ARGS, "hf")
    refuse_no_numbers(engine_args, {"batch_size": 1})


class HfEngine:
    """transformers on one device. Engine arguments: batch_size, device, attn_implementation."""

    def __init__(self, spec: EngineSpec, engine_args: Mapping[str, Any]) -> None:
        """Load the model straight to its device, and its adapter."""
        self._spec = spec
        self.under_way: Callable[[int], None] = lambda tokens: None
        self._batch_size = engine_args.get("batch_size", DEFAULT_BATCH)
        self._device = chosen_device(engine_args.get("device"), "--engine-arg device")
        options = {name: value for name, value in engine_args.items() if name == "attn_implementation"}
        options |= {"revision": spec.revision, "dtype": _dtype(spec.dtype, self._device)}
        model = load_weights(AutoModelForCausalLM, spec.model, self._device, f"the model {spec.model}", **options)
        if spec.adapter is not None:
            model = load_adapter(model, spec.adapter.path).get_base_model()
            head = model.get_output_embeddings()
            if head is not None and head.weight.is_floating_point():
                head.weight.requires_grad_(True)  # a frozen one is copied for every row by torch's matmul
        self._model = model.to(self._device).eval()
        self._pad_id = pad_id(spec.tokenizer, model.get_input_embeddings().weight.shape[0])
        # generate() fills what a call leaves open from here: a model's own sampling defaults must not slip in
        self._model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=list(spec.end_ids), pad_token_id=self._pad_id
        )

        self._rows_leave = False
        self._keep_rows_apart()

    def _keep_rows_apart(self) -> None:
        """Try whether log-probabilities as they are sampled are those of the model for the whole sequence: else rows
        are sampled one by one. Raises UsageError where that is not enough (some see tokens to come)."""
        asked = self._batch_size
        for size in (asked, 1):
            self._batch_size = size
            found = self._try()
            if self._are_of_the_model(found):
                if size < asked:
                    name = type(self._model).__name__
                    print(f"rows of a batch disturb one another in {name}: sampled one by one", file=sys.stderr)
                elif self._device.type != "mps":  # generate() undoes a step there, and a row's random numbers with it
                    self._let_rows_leave(found)
                return
        raise UsageError(
            f"{type(self._model).__name__} samples with other log-probabilities than those it gives to the whole "
            "sequence, so it could not be trained on what it samples: this architecture is not supported"
        )

    def _let_rows_leave(self, tried: list[tuple[Request, Completion]]) -> None:
        """Let rows that have ended leave a batch, where those that stay are of the model then too."""
        spec, ends = self._spec, tuple(completion.ids[0] for _, completion in tried[: len(tried) // 2])
        self._spec, self._rows_leave = replace(spec, end_ids=ends), True
        try:
            self._rows_leave = self._are_of_the_model(self._try())
        except UsageError:
            self._rows_leave = False
        self._spec = spec

    def _try(self) -> list[tuple[Request, Completion]]:
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        unit = [Request(None, tuple((7 * at + n) % vocabulary for at in range(n)), n) for n in (3, 5, 7, 9)]
        tokens = 4 if self._model.dtype == torch.float32 else 16  # rounding may send a few to other experts
        try:
            return list(self.sample(iter([unit]), Sampling(max_new_tokens=tokens)))
        except Exception as error:  # the code of any architecture runs here
            if is_out_of_memory(error):
                raise
            name = type(self._model).__name__
            raise UsageError(f"transformers cannot sample with {name} here ({first_line(error)})") from error

    def _are_of_the_model(self, found: list[tuple[Request, Completion]]) -> bool:
        errors, sizes = zip(*(self._error(*row) for row in found), strict=True)
        return sum(errors) <= TOLERANCE.get(self._model.dtype, 0.03) * sum(sizes)

    @torch.inference_mode()
    def _error(self, request: Request, found: Completion) -> tuple[float, float]:
        ids = torch.tensor([[*request.prompt_ids, *found.ids]], device=self._device)
        logits = self._model(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1]
        own = logits.float().log_softmax(-1).gather(1, ids[0, len(request.prompt_ids) :, None])[:, 0].cpu()
        return (own - torch.tensor(found.logps)).abs().sum().item(), own.abs().sum().item()

    def sample(self, units: Iterator[Sequence[Request]], sampling: Sampling) -> Iterator[tuple[Request, Completion]]:
        """Unit after unit, each in batches of requests with prompts of similar length."""
        for unit in units:
            ordered = sorted(unit, key=lambda request: len(request.prompt_ids))
            for start in range(0, len(ordered), self._batch_size):
                batch = ordered[start : start + self._batch_size]
                yield from zip(batch, self._sample_batch(batch, sampling), strict=True)

    def close(self) -> None:
        """Drop the model."""
        self._model = None

    @torch.inference_mode()
    def _sample_batch(self, batch: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """A response to each request. Rows that have ended leave the batch when they are a share LEAVE of it."""
        input_ids, attention_mask = self._left_padded(batch)  # (rows, longest prompt) each
        width, cache, rows = input_ids.shape[1], None, list(range(len(batch)))
        longest = width + sampling.max_new_tokens
        noise = _SeededSampler([request.seed for request in batch], sampling, attention_mask)
        prompts = [request.prompt_ids for request in batch]
        ends = _Ends(self._spec, sampling.stop, prompts, width, self.under_way, pauses=self._rows_leave)
        found: dict[int, Completion] = {}
        while rows:
            output = self._model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=cache,
                max_new_tokens=longest - input_ids.shape[1],
                logits_processor=LogitsProcessorList([noise]),
                stopping_criteria=StoppingCriteriaList([ends]),
                return_dict_in_generate=True,
            )
            input_ids = output.sequences
            stay = ends.staying() if input_ids.shape[1] < longest else []
            new_ids, logps = input_ids[:, width:].tolist(), noise.logps(input_ids.shape[1] - width)
            for at in set(range(len(rows))).difference(stay):
                found[rows[at]] = self._completion(prompts[rows[at]], new_ids[at], logps[at], sampling)
            rows = [rows[at] for at in stay]
            if rows:
                kept = torch.tensor(stay, device=self._device)
                cache = output.past_key_values
                cache.batch_select_indices(kept)
                noise.keep(kept)
                ends.keep(stay)
                input_ids = input_ids[kept]
                more = attention_mask.new_ones(len(rows), input_ids.shape[1] - attention_mask.shape[1])
                attention_mask = torch.cat([attention_mask[kept], more], dim=1)
        return [found[row] for row in range(len(batch))]

    def _left_padded(self, batch: Sequence[Request]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(len(request.prompt_ids) for request in batch)
        ids = np.full((len(batch), width), self._pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, width - len(request.prompt_ids) :] = request.prompt_ids
            mask[row, width - len(request.prompt_ids) :] = 1
        return upload(ids, self._device), upload(mask, self._device)

    def _completion(
        self, prompt: Sequence[int], ids: list[int], logps: list[float] | None, sampling: Sampling
    ) -> Completion:
        """Cut a row of the batch where its response ended: after its first end token or completed stop string."""
        end = next((at + 1 for at, token in enumerate(ids) if token in self._spec.end_ids), None)
        length = min(end or len(ids), sampling.max_new_tokens)
        text = response_text(self._spec, prompt, ids[:length])
        if sampling.stop and cut_at_stop(text, sampling.stop) != text:
            said = ((n, response_text(self._spec, prompt, ids[:n])) for n in range(1, length + 1))
            end, text = next((n, cut) for n, whole in said if (cut := cut_at_stop(whole, sampling.stop)) != whole)
            length = end
        return Completion(ids[:length], text, "stop" if end else "length", logps and logps[:length])


start = HfEngine


class _SeededSampler(LogitsProcessor):
    """Turns greedy search into sampling: adds Gumbel noise from each request's own generator (Gumbel-max).

    First comes what `drawn_from` does; the raw log-probability of the winning token is kept. prompts: (batch, longest
    prompt), where its tokens stand.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling, prompts: torch.Tensor) -> None:
        self._sampling, self._prompts = sampling, prompts
        self._generators = [torch.Generator(device=prompts.device).manual_seed(seed) for seed in seeds]
        self._steps: list[torch.Tensor] = []
        self._seen: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        raw = torch.log_softmax(scores.float(), dim=-1)  # (batch, vocabulary)
        seen = self._note_seen(input_ids, raw) if self._sampling.repetition_penalty != 1 else None
        chosen = raw
        if self._sampling.temperature > 0:
            chosen = drawn_from(scores.float(), self._sampling, seen) + self._noise(raw)
        elif seen is not None:
            chosen = penalized(scores.float(), self._sampling.repetition_penalty, seen)
        if self._sampling.logprobs:
            self._steps.append(raw.gather(1, chosen.argmax(dim=-1, keepdim=True)))
        return chosen

    def _note_seen(self, input_ids: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """(batch, vocabulary): the tokens that prompt and response have."""
        if self._seen is None:  # what pads a prompt is not in it
            self._seen = torch.zeros_like(like, dtype=torch.int64).scatter_add_(1, input_ids, self._prompts) > 0
        else:
            self._seen.scatter_(1, input_ids[:, -1:], True)
        return self._seen

    def _noise(self, like: torch.Tensor) -> torch.Tensor:
        exponential = torch.empty_like(like, dtype=torch.float64)  # in float32, 0 is drawn too often for a vocabulary
        for row, generator in enumerate(self._generators):
            exponential[row].exponential_(generator=generator)
        return -exponential.log().float()  # Gumbel(0, 1)

    def logps(self, steps: int) -> list[Any]:
        """Log-probabilities of the sampled tokens, a list a row, `steps` long; None where not asked for."""
        return torch.cat(self._steps, dim=1)[:, :steps].tolist() if self._steps else [None] * len(self._generators)

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone."""
        self._generators = [self._generators[row] for row in rows.tolist()]
        self._steps = [torch.cat(self._steps, dim=1)[rows]] if self._steps else []
        self._seen = None if self._seen is None else self._seen[rows]


class _Ends(StoppingCriteria):
    """Ends a row with an end token, or once a stop string stands in its response (never in its prompt).

    Tells after each step how many tokens the batch has. pauses: all rows are said to have ended when a share LEAVE of
    them has.
    """

    def __init__(
        self,
        spec: EngineSpec,
        stop: Sequence[str],
        prompts: Sequence[Sequence[int]],
        width: int,
        tell: Callable[[int], None],
        *,
        pauses: bool,
    ) -> None:
        self._spec, self._stop, self._prompts, self._start, self._tell = spec, stop, list(prompts), width, tell
        self._window = STOP_WINDOW + max((len(word.encode()) for word in stop), default=0)
        self._end_ids = torch.tensor(spec.end_ids)
        self._tokens = 0
        self._ended = torch.zeros(len(prompts), dtype=torch.bool)
        self._pauses, self._paused = pauses, False

    def staying(self) -> list[int]:
        """The rows that have not ended, if there was a pause."""
        return (~self._ended).nonzero()[:, 0].tolist() if self._paused else []

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows alone."""
        self._prompts = [self._prompts[row] for row in rows]
        self._ended = self._ended[rows]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        self._tokens += int((~self._ended).sum())
        self._tell(self._tokens)
        self._ended |= torch.isin(input_ids[:, -1].cpu(), self._end_ids)
        if self._stop:
            for row in (~self._ended).nonzero()[:, 0].tolist():
                recent = self._recent(self._prompts[row], input_ids[row, self._start :].tolist())
                self._ended[row] = any(word in recent for word in self._stop)
        self._paused = self._pauses and int(self._ended.sum()) >= LEAVE * len(self._ended)
        return (self._ended | self._paused).to(input_ids.device)

    def _recent(self, prompt: Sequence[int], ids: list[int]) -> str:
        before = max(0, len(ids) - self._window)
        return response_text(self._spec, [*prompt, *ids[:before]], ids[before:])


def drawn_from(logits: torch.Tensor, sampling: Sampling, seen: torch.Tensor | None = None) -> torch.Tensor:
    """Logits (batch, vocabulary) of the distribution that a token is drawn from, from the model's float32 ones.

    In vLLM's order: repetition penalty on the tokens `seen`, temperature (above 0), then min-p, top-k and top-p, each
    on what the one before has left; -inf is left out.
    """
    if seen is not None:
        logits = penalized(logits, sampling.repetition_penalty, seen)
    logits = logits / sampling.temperature
    if sampling.min_p > 0:
        probabilities = logits.softmax(dim=-1)
        least = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, float("-inf"))
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return _top_p(logits, sampling.top_p)


def penalized(logits: torch.Tensor, penalty: float, seen: torch.Tensor) -> torch.Tensor:
    """Logits of the tokens `seen` divided by the penalty where they are above 0, else multiplied by it."""
    return torch.where(seen, logits * torch.where(logits > 0, 1 / penalty, penalty), logits)


def _top_p(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Logits (batch, vocabulary) with -inf outside the smallest set of tokens whose probability reaches top_p."""
    if top_p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    ordered = ordered.masked_fill(before >= top_p, float("-inf"))  # the likeliest token always stays
    return torch.empty_like(logits).scatter_(1, order, ordered)


def resolve_machine(dtype: str, engine_args: Mapping[str, Any]) -> tuple[str, str]:
    """Number type and device, in words, that the engine will sample with."""
    device = chosen_device(engine_args.get("device"), "--engine-arg device")
    return str(_dtype(dtype, device)).removeprefix("torch."), describe(device)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return natural_dtype(device)
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UsageError(f"--dtype must be auto, float32, bfloat16 or float16, not {name}")
    return dtype
