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
from ple_data.common.models import AdapterInfo, check_adapter, check_model, load_tokenizer
from ple_data.common.settings import Settings
from ple_train.engine.loop import Objective, make_accelerator, train_loop
from ple_train.engine.output import Kind, Output, kept_precision
from ple_train.log import print_to_log
from ple_train.model.batches import Stream
from ple_train.model.policy import Policy, load_policy, load_trainable, resolve_precision
from schemas.errors import UsageError
from schemas.options import Lora


class Session:
    """Use as a context manager. `finished`: an earlier start has done it all; then there is nothing to do.

    kind: of the record. more: what counts beside the options (`ple_data.common.settings.NO_OPTIONS`). elsewhere:
    options whose content is compared by other means. Raises UsageError for a model or adapter that is none, or where
    the output was made with other settings, LockedError while another process writes it.
    """

    def __init__(
        self,
        kind: Kind,
        options: Any,
        *,
        more: Mapping[str, Any] | None = None,
        elsewhere: Collection[str] = (),
    ) -> None:
        adapter = getattr(options, "adapter", None)
        check_model(options.model)
        if adapter:
            refuse_other_lora(check_adapter(adapter, options.model), options)
        precision = options.precision
        if precision == "auto":
            precision = kept_precision(options.output, options.resume) or resolve_precision("auto")
        self.options = options.but(precision=precision)
        weights = policy_name(options.model, adapter, options.revision)
        settings = Settings.of(self.options, elsewhere=elsewhere, **{"weights": weights, **(more or {})})
        settings = replace(settings, chosen=options.precision == "auto")
        self.accelerator = make_accelerator(getattr(options, "report_to", None), options.output)
        self.out = Output(settings, kind, self.options, self.accelerator)

    def __enter__(self) -> Session:
        self.out.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.out.__exit__(*exception)

    @property
    def finished(self) -> bool:
        return self.out.finished

    @property
    def weights(self) -> str:
        """The name of the policy that training starts from."""
        return str(self.out.settings.values["weights"])

    def load_tokenizer(self) -> Any:
        """The model's tokenizer; it is written beside the result."""
        self.tokenizer = load_tokenizer(self.options.model, self.options.revision, note=print_to_log)
        return self.tokenizer

    def load_policy(self) -> Policy:
        """The policy to train, checked; what was chosen for the machine is said and kept."""
        policy = load_policy(
            self.options.model,
            self.options,
            adapter=getattr(self.options, "adapter", None),
            revision=self.options.revision,
            precision=self.options.precision,
            seed=self.options.seed,
        )
        self.note_machine(attention=policy.attention, layout=policy.layout)
        return policy

    def load_causal_lm(self) -> Any:
        """The model to train, not wrapped, for a trainer of another package."""
        given = {name: getattr(self.options, name) for name in ("adapter", "revision", "precision", "seed")}
        self.note_machine()
        return load_trainable(self.options.model, self.options.part(Lora), **given)

    def note_machine(self, **more: str) -> None:
        """Say on stderr, and keep for the record, what was chosen for this machine."""
        self.out.note_machine(self.options.precision, **more)

    def fit(self, model: Any, stream: Stream, objective: Objective, parameters: Any = None) -> list[dict[str, Any]]:
        """Train to the end, going on from the newest checkpoint → metrics of every step."""
        trained = model.trainable() if parameters is None else parameters
        return train_loop(
            self.accelerator, model, trained, stream, objective, self.options, self.out.checkpoints, self.out.report
        )

    def finish(
        self, model: Any, history: list[dict[str, Any]], what: str, *, cost: dict[str, float] | None = None
    ) -> None:
        """Publish the result; `what` of the model's card says what it is."""
        title = f"{Path(self.options.model).name}, {what}"
        self.out.finish(model, self.tokenizer, history, title=title, cost=cost)


def refuse_other_lora(adapter: AdapterInfo, options: Lora) -> None:
    """Raise UsageError where --lora-rank or --lora-alpha contradict the adapter that training goes on from."""
    own, asked = (adapter.rank, adapter.config["lora_alpha"]), (options.lora_rank, options.lora_alpha)
    if own != asked:
        raise UsageError(
            f"--adapter {adapter.path} has rank {own[0]} and alpha {own[1]}, --lora-rank is {asked[0]} and "
            f"--lora-alpha {asked[1]}; training goes on with the adapter's own: give those"
        )
