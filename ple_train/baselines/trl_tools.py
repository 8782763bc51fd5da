"""What the baselines that run in TRL share: finding it, keeping it quiet, and its steps as our metrics.

TRL is an extra: `trl` brings the newest version that DPO runs with, `ppo` the last one that has PPO, which does for
both. Imported only when it is used.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ple_data.common.device import default_device
from ple_data.common.extras import install_command, missing
from ple_data.common.progress import Progress
from ple_train.engine.checkpoint import History
from schemas.errors import PleError, UsageError

VERSIONS = {"dpo": ((1, 12), (1, 16)), "ppo": ((1, 12), (1, 12))}
"""By method: the oldest and the newest TRL that it is tested with."""
_EXTRAS = {"dpo": "trl", "ppo": "ppo"}


def require_trl(method: str) -> str:
    """The version of TRL. Raises UsageError where it is missing, or one that the method does not run with."""
    what = f"`ple baseline {method}` runs in"
    try:
        found = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        raise missing("trl", what, _EXTRAS[method]) from None
    oldest, newest = VERSIONS[method]
    if not oldest <= tuple(map(int, found.split(".")[:2])) <= newest:
        known = " to ".join(sorted({f"{major}.{minor}" for major, minor in (oldest, newest)}))
        raise UsageError(f"{what} TRL {known}, but trl {found} is installed: {install_command(_EXTRAS[method])}")
    return found


@contextlib.contextmanager
def quiet_trl() -> Iterator[None]:
    """TRL's and transformers' notices are not shown, and what they print goes to stderr: stdout is for data."""
    from transformers.utils import logging

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def refuse_many_processes(accelerator: Any) -> None:
    """Raise UsageError under torchrun: the baselines in TRL run as one process."""
    if accelerator.num_processes > 1:
        raise UsageError("this baseline runs as one process; start it without torchrun or accelerate launch")


def training_arguments(directory: Path, options: Any) -> dict[str, Any]:
    """Arguments of every TRL configuration: ple-train's optimizer, a metric each step, no checkpoints, no reports."""
    on_gpu = default_device().type == "cuda"
    return {
        "output_dir": str(directory),
        "learning_rate": options.learning_rate,
        "max_grad_norm": options.max_grad_norm,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "seed": options.seed % 2**32,  # as far as numpy goes
        "bf16": False,  # no autocast: frozen weights are in bfloat16 as they were loaded, the adapter in float32
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def with_float32_logits(model: Any) -> Any:
    """The same model, its logits in float32: summed over a response, bfloat16 would lose what the methods compare."""
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: logits.float())
    return model


def one_device(arguments: Any) -> Any:
    """The same configuration on one GPU: the Trainer would split batches over all that it sees."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def micro_batching(batch_size: int, at_once: int) -> dict[str, int]:
    """Rows at once and passes a step: at most `at_once` rows, a divisor of `batch_size`; 1 where only that is left."""
    rows = next(n for n in range(batch_size, 0, -1) if batch_size % n == 0 and (n <= at_once or n == 1))
    return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": batch_size // rows}


class _Enough(Exception):
    """Ends a training: TRL's loop for PPO knows no other way out."""


def run_trainer(
    trainer: Any, progress: Progress, done: Callable[[], int] | None = None, enough: float = math.inf
) -> History:
    """Run TRL's trainer, in place → metrics of every step. It ends with the step that brings `done()` to `enough`.

    The progress line moves to `done()`, which counts steps if not given. Raises PleError when a loss is not finite.
    """
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    history: History = []

    class Steps(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began, self.done = time.perf_counter(), 0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if self.done >= enough:
                raise _Enough

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            logs = logs or {}
            loss = logs.get("loss", logs.get("loss/policy_avg"))
            if loss is None:
                return  # the summary at the end
            if not math.isfinite(loss):
                raise PleError(f"step {state.global_step}: the loss is {loss}; stopped. Lower --learning-rate.")
            now = time.perf_counter()
            names = {key: key.replace("/", "_") for key in logs if key not in ("loss", "epoch")}
            more = {name: float(logs[key]) for key, name in names.items()}
            history.append({"step": len(history) + 1, "loss": float(loss), "seconds": now - self.began, **more})
            self.began = now
            before, self.done = self.done, done() if done else len(history)
            progress.advance(self.done - before, f"loss {loss:.4f}")

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Steps())
    with progress, contextlib.suppress(_Enough):
        trainer.train()
    return history
