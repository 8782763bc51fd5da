"""Several trainings one after another, in each process of a torchrun: `python -m tests.ple_train.sharded CASES.json`.

A case: `options` of ple-train, of the method of `ple baseline` in `method`, or of `ple sft` where that is `ple sft`;
and `stop`, the step before which it is stopped. Prints, from the first process, how many numbers of a model's weights
this process held at most.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from ple_train import train as training
from ple_train.baselines.responses import baseline
from ple_train.engine.session import Session
from ple_train.sft import sft
from schemas.options import Baseline, ContextDistillation, Sft, Train
from tests.ple_train.small_training import stop_in_step

METHODS: dict[str, Any] = {"context-distillation": ContextDistillation, "raft": Baseline}


def held(policy: Any) -> int:
    """Numbers of the weights that this process holds."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in policy.parameters())


def train(options: dict[str, Any]) -> None:
    method = options.pop("method", None)
    if method == "ple sft":
        sft(Sft(**options | {"data": options["data"][0]}))
    elif method is not None:
        baseline(method, METHODS[method](**options))
    else:
        training.train(Train(**options))


def main() -> None:
    for case in json.loads(Path(sys.argv[1]).read_text()):
        options = case["options"]
        options |= {"data": [Path(data) for data in options["data"]], "output": Path(options["output"])}
        with pytest.MonkeyPatch.context() as patch:
            load = Session.load_policy

            def noting(session: Session, load: Any = load) -> Any:
                policy = load(session)
                if torch.distributed.get_rank() == 0:
                    print(f"{session.directory.name}: {held(policy)} numbers", flush=True)
                return policy

            patch.setattr(Session, "load_policy", noting)
            patch.setattr("accelerate.Accelerator.end_training", lambda _: None)  # the processes work on together
            if "stop" in case:
                stop_in_step(patch, case["stop"])
            try:
                train(options)
            except KeyboardInterrupt:
                print(f"{options['output'].name} stopped", flush=True)


if __name__ == "__main__":
    main()
