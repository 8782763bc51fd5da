"""One training loop, read top to bottom; SFT, reward and PLE training are its users.

It knows steps, gradients, checkpoints and metrics. It never reads data and never computes a loss: the stream
gives global batches, the objective gives the loss of a micro-batch, already divided by its global batch.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from ple_data.common.device import default_device
from ple_data.common.extras import need
from ple_data.common.progress import Progress
from ple_train.engine.checkpoint import Checkpoints, History, newest_checkpoint, training_state
from ple_train.model.batches import Stream, micro_batches
from ple_train.model.shard import in_parts, whole
from ple_train.objectives import Objective
from schemas.errors import PleError, UsageError, first_line
from schemas.options import Loop

STEPS_AHEAD = {"cuda": 1}
"""Steps at work while an earlier one is read, so that a GPU never waits for the host; a CPU has no queue."""
SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
}
"""What `accelerate launch` sets for what no training here is made for."""
WAIT = timedelta(hours=6)
"""How long a process waits for the others: one may have a larger share of what is measured before the first step."""
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
Report = Callable[[dict[str, Any]], None]
"""What is done with the metrics of a step."""


def learning_rate_at(step: int, total: int, settings: Loop) -> float:
    """Learning rate of a step counted from 0."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def make_accelerator(report_to: str | None = None, directory: Path | None = None) -> Any:
    """The `Accelerator` of this process, one of one or of many (torchrun, accelerate launch).

    report_to: `tensorboard`, `wandb`, `mlflow` or `trackio`; the first writes below `directory`.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    if report_to:
        need(report_to, f"--report-to {report_to} writes with")
    count = next((os.environ[name] for name in WORLD_SIZES if name in os.environ), None)
    sharding = [how for name, how in SHARDED.items() if os.environ.get(name, "").lower() in ("true", "1")]
    if sharding:
        _refuse_launcher(f"the launcher's configuration asks for {sharding[0]}, which no training here does", count)
    if count is None and "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ:
        _refuse_launcher("accelerate was told to start several processes, and has started one", count)
    launched = ", ".join(name for name in (*WORLD_SIZES, "RANK", "LOCAL_RANK") if name in os.environ)
    try:
        accelerator = Accelerator(
            mixed_precision="no",  # autocast is the loop's own: one process may train in several precisions
            cpu=default_device().type == "cpu",
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=WAIT),
            ],
            log_with=report_to,
            project_dir=directory,
        )
    except (ValueError, KeyError, RuntimeError) as error:
        if not launched:
            raise
        _refuse_launcher(f"{launched} make no group of processes ({first_line(error)}), and one needs none", count)
    if count not in (None, str(accelerator.num_processes)):
        _refuse_launcher(f"the launcher says {count} processes, and {accelerator.num_processes} work together", count)
    return accelerator


def _refuse_launcher(fault: str, count: str | None) -> NoReturn:
    """What it asks for would compute something else, or one process the work of several, and not say so."""
    n = count if count and count.isdecimal() else "N"
    raise UsageError(
        f"{fault}: start it with `torchrun --nproc-per-node {n} -m cli ...` or `accelerate launch --multi_gpu "
        f"--num_processes {n} -m cli ...` (on a CPU too), without that configuration: every process has the whole "
        "model, or with --shard a part of it"
    )


def train_loop(
    accelerator: Any,
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    stream: Stream,
    objective: Objective,
    settings: Loop,
    checkpoints: Checkpoints,
    report: Report = lambda metrics: None,
) -> History:
    """Train to the end, going on from the newest checkpoint → metrics of every step.

    settings: its precision is resolved. `schedule` is `constant` or `cosine` (to 0 at the last step), after a linear
    warm-up.

    A GPU is never waited for: what a step measured is read while the GPU works on the next one. Raises PleError when
    the loss or the gradient is not finite; the last good checkpoint stays.
    """
    decay = settings.weight_decay
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=decay)
    done, history = checkpoints.restore(parameters, optimizer)
    shared = in_parts(model)
    if not shared:
        model, optimizer = accelerator.prepare(model, optimizer)
    total = stream.steps_per_epoch * settings.epochs
    model.train()

    main, processes, process = accelerator.is_main_process, accelerator.num_processes, accelerator.process_index
    device: torch.device = accelerator.device
    with Progress("training", total, "steps", done=done) if main else nullcontext() as progress:
        ledger = _Ledger(objective, history, checkpoints.directory, report, progress)
        while done < total:
            epoch, start = divmod(done, stream.steps_per_epoch)
            for sequences, divisor in stream.batches(epoch, start):
                began = time.perf_counter()
                torch.manual_seed(_step_seed(settings.seed, done, process))  # dropout, if any
                how: dict[str, Any] = {"layout": objective.layout, "together": objective.together}
                mine = micro_batches(sequences, divisor, settings.microbatch_tokens, processes, process, **how)
                rate = learning_rate_at(done, total, settings)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                sums = torch.zeros(1 + len(objective.sums), dtype=torch.float64, device=device)
                for number, batch in enumerate(mine, start=1):
                    with accelerator.no_sync(model) if number < len(mine) else nullcontext():
                        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                            loss, parts = objective(model, batch, done)
                        (loss * processes).backward()  # processes average: make it a sum
                    sums[0] += loss.detach()
                    sums[1:] += parts
                if processes > 1:
                    sums = accelerator.reduce(sums, "sum")
                norm = accelerator.clip_grad_norm_(list(parameters.values()), settings.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

                done += 1
                norm = whole(norm).to(device, torch.float64)  # of no gradients at all, a 0 of the host
                numbers = Reading(torch.cat([sums, norm[None]]))
                tokens = sum(len(s.ids) for s in sequences)
                known = {"step": done, "epoch": epoch, "learning_rate": rate}
                ledger.at_work.append(_Step(known, tokens, began, numbers))
                if done % settings.checkpoint_every == 0 or done == total:
                    ledger.read()
                    if main or shared:
                        state = training_state(parameters, optimizer, keep=main)
                    if main:
                        checkpoints.save(done, *state, history)
                else:
                    ledger.read(but=STEPS_AHEAD.get(device.type, 0))
    accelerator.wait_for_everyone()
    return history


class Reading:
    """Numbers on their way to the host: from a GPU they are copied when it gets there, and waited for when read."""

    def __init__(self, values: Tensor) -> None:
        self._event = None
        self._host = values
        if values.device.type == "cuda":
            self._host = torch.empty_like(values, device="cpu", pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[float]:
        """The numbers."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


@dataclass(frozen=True)
class _Step:
    """A step that may still be at work; `numbers` are its loss, the objective's sums and the gradient's norm."""

    known: dict[str, Any]
    tokens: int
    began: float
    numbers: Reading


class _Ledger:
    """The steps in order: those that are still at work, and the metrics of those that were read."""

    def __init__(
        self, objective: Objective, history: History, checkpoints: Path, report: Report, progress: Progress | None
    ) -> None:
        self._objective, self._history, self._checkpoints = objective, history, checkpoints
        self._report, self._progress = report, progress
        self.at_work: deque[_Step] = deque()
        self._last_read = time.perf_counter()

    def read(self, *, but: int = 0) -> None:
        """Take in what the steps measured, but for the last `but`. Raises PleError where a number is not finite."""
        while len(self.at_work) > but:
            metrics = self._metrics(self.at_work.popleft())
            self._history.append(metrics)
            self._report(metrics)
            if self._progress:
                self._progress.advance(1, f"loss {metrics['loss']:.4f}")

    def _metrics(self, step: _Step) -> dict[str, Any]:
        loss, *sums, norm = step.numbers.read()
        if not math.isfinite(loss) or not math.isfinite(norm):
            newest = newest_checkpoint(self._checkpoints)
            raise PleError(_not_finite(step.known["step"], loss, norm, newest, self._objective.remedy))
        now = time.perf_counter()
        seconds, self._last_read = now - max(step.began, self._last_read), now
        return {
            **step.known,
            "loss": loss,
            "grad_norm": norm,
            "seconds": seconds,
            **self._objective.summarise(dict(zip(self._objective.sums, sums, strict=True))),
            "tokens_per_second": step.tokens / seconds,
        }


def _step_seed(seed: int, step: int, process: int) -> int:
    return int(np.random.SeedSequence([seed, step, process]).generate_state(1)[0])


def _not_finite(step: int, loss: float, norm: float, newest: Path | None, remedy: str) -> str:
    kept = f"the last good checkpoint is {newest}" if newest else "no checkpoint had been written yet"
    return f"step {step}: the loss is {loss} and its gradient's norm {norm}; stopped, {kept}. {remedy}"
