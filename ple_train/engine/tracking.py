"""Metrics sent to a tracker of another package while a training runs. None that fails ends a training.

What a tracker prints goes to stderr: stdout is for data.
"""

import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from ple_train.log import print_to_log
from schemas.errors import UsageError, first_line

NAMES = {"wandb": "name", "trackio": "name", "mlflow": "run_name"}
"""What trackers call the name of a run."""
HELP = {
    "mlflow": "set MLFLOW_TRACKING_URI to the address of a server",
    "wandb": "run `wandb login`, or WANDB_MODE=offline",
}
RESERVED = {"step"}
"""Trackers are told it beside the metrics."""


class Tracker:
    """The tracker that an accelerator was made with, or none."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.name = next((str(getattr(kind, "value", kind)) for kind in accelerator.log_with), None)
        self._sends = False

    def begin(self, directory: Path, settings: Mapping[str, Any]) -> None:
        """Begin a run that is called as `directory` is. Raises UsageError where the tracker cannot be had."""
        if self.name is None:
            return
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        named = {NAMES[self.name]: directory.absolute().name} if self.name in NAMES else {}
        try:
            with redirect_stdout(sys.stderr):
                self._accelerator.init_trackers("ple", {k: str(v) for k, v in settings.items()}, {self.name: named})
        except Exception as error:
            advice = HELP.get(self.name, "or leave --report-to out")
            raise UsageError(f"--report-to {self.name} cannot begin ({first_line(error)}): {advice}") from error
        self._sends = True

    def send(self, metrics: Mapping[str, Any]) -> None:
        """Send the metrics of a step; those that are None are not known."""
        if self._sends:
            known = {name: value for name, value in metrics.items() if value is not None and name not in RESERVED}
            self._try("receive metrics", lambda: self._accelerator.log(known, step=metrics["step"]))

    def end(self) -> None:
        """Close the run, where one was begun, and the group of processes."""
        if self.name == "trackio" and self._sends and self._accelerator.is_main_process:
            self._try("end", _finish_trackio)
        self._try("end", self._accelerator.end_training)

    def _try(self, what: str, do: Any) -> None:
        try:
            with redirect_stdout(sys.stderr):
                do()
        except Exception as error:
            if not self._sends:
                raise
            self._sends = False
            print_to_log(
                f"warning: --report-to {self.name} could not {what} ({first_line(error)}): training goes on without "
                "it; every step is in metrics.parquet"
            )


def _finish_trackio() -> None:
    """accelerate ends the run but leaves it as the current one, which trackio then ends once more, on stdout."""
    import trackio

    trackio.finish()
