"""A training command from its options to its finished output: the one skeleton that all of them share.

A command says what its settings are, which model and stream it has and what its objective is. Checks, number type,
lock, resumption, checkpoints, metrics and the record are here. Computes no loss and reads no rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ple_data.common.digests import policy_name
from ple_data.common.models import CONVERT, AdapterInfo, check_adapter, check_model, load_tokenizer
from ple_data.common.settings import Settings
from ple_train.engine.checkpoint import History
from ple_train.engine.loop import make_accelerator, train_loop
from ple_train.engine.output import Kind, Output, kept_precision, training_cost
from ple_train.log import print_to_log
from ple_train.model.batches import Stream
from ple_train.model.policy import Policy, load_policy, load_trainable, resolve_precision
from ple_train.objectives import Objective
from schemas.errors import UsageError
from schemas.options import Lora


class Session(Output):
    """Use as a context manager. `finished`: an earlier start has done it all; then there is nothing to do.

    kind: of the record. more: what counts beside the options (`ple_data.common.settings.NO_OPTIONS`). elsewhere:
    options whose content is compared by other means. Raises UsageError for a model or adapter that is none, or where
    the output was made with other settings, LockedError while another process writes it.
    """

    def __init__(
        self, kind: Kind, options: Any, *, more: Mapping[str, Any] | None = None, elsewhere: Collection[str] = ()
    ) -> None:
        adapter = getattr(options, "adapter", None)
        check_model(options.model)
        if adapter:
            refuse_unfit(check_adapter(adapter, options.model), options)
        precision = options.precision
        if precision == "auto":
            precision = kept_precision(options.output, options.resume) or resolve_precision("auto")
        self.options = options.but(precision=precision)
        accelerator = make_accelerator(getattr(options, "report_to", None), options.output)
        with accelerator.local_main_process_first():  # hashes of large files are kept: one process takes them
            self.weights = policy_name(options.model, adapter, options.revision)  # that training starts from
            settings = Settings.of(self.options, elsewhere=elsewhere, **{"weights": self.weights, **(more or {})})
        settings = replace(settings, chosen=options.precision == "auto")
        super().__init__(settings, kind, self.options, accelerator)

    def load_tokenizer(self, *, ends: bool = True) -> Any:
        """The model's tokenizer; it is written beside the result. ends: whether it must have an EOS."""
        self.tokenizer = load_tokenizer(self.options.model, self.options.revision, note=print_to_log, ends=ends)
        return self.tokenizer

    def load_policy(self) -> Policy:
        """The policy to train, checked; what was chosen for the machine is said and kept."""
        policy = load_policy(self.options.model, self.options, **self._start())
        self.note_machine(self.options.precision, attention=policy.attention, layout=policy.layout)
        return policy

    def load_causal_lm(self) -> Any:
        """The model to train, not wrapped, for a trainer of another package."""
        self.note_machine(self.options.precision)
        return load_trainable(self.options.model, self.options.part(Lora), **self._start())

    def _start(self) -> dict[str, Any]:
        return {name: getattr(self.options, name, None) for name in ("adapter", "revision", "precision", "seed")}

    def fit(self, model: Any, stream: Stream, objective: Objective, parameters: Any = None) -> History:
        """Train to the end, going on from the newest checkpoint → metrics of every step."""
        trained = model.trainable() if parameters is None else parameters
        return train_loop(
            self.accelerator, model, trained, stream, objective, self.options, self.checkpoints, self.report
        )

    def finish(
        self, model: Any, history: History, what: str, sampled: dict[Any, int] | None = None, trained: int | None = None
    ) -> None:
        """Publish the result; `what` of the model's card says what it is. sampled: see `training_cost`."""
        cost = {} if sampled is None else training_cost(history, sampled, getattr(self.options, "round", None), trained)
        self.publish(model, self.tokenizer, history, f"{Path(self.options.model).name}, {what}", cost)


def refuse_unfit(adapter: AdapterInfo, options: Lora) -> None:
    """Raise UsageError where --lora-rank or --lora-alpha contradict the adapter that training goes on from, or where
    the model is not the start policy with it off. Merged (--full), nothing is off, and nothing of it goes on."""
    if getattr(options, "full", False):
        return
    if adapter.changes_base:
        raise UsageError(
            f"--adapter {adapter.path} has {adapter.changes_base}: it changed weights of the model itself, so with it "
            f"off the model is not its start policy; {CONVERT}, or train all weights with --full"
        )
    own, asked = (adapter.rank, adapter.alpha), (options.lora_rank, options.lora_alpha)
    if own != asked:
        raise UsageError(
            f"--adapter {adapter.path} has rank {own[0]} and alpha {own[1]}, --lora-rank is {asked[0]} and "
            f"--lora-alpha {asked[1]}; training goes on with the adapter's own: give those"
        )
