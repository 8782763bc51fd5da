"""Packages that a plain install leaves out, and the one sentence that is said where one of them is missing.

Each is imported where it is first needed, after `need`. Knows nothing of what they do.
"""

import importlib.util

from schemas.errors import UsageError

EXTRAS = {
    "datasets": "hub",
    "gguf": "gguf",
    "httpx": "http",
    "matplotlib": "report",
    "mlflow": "mlflow",
    "ray": "ray",
    "sacrebleu": "eval",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "textblob": "demo-real",
    "trl": "trl",
    "vaderSentiment": "demo-real",
    "vllm": "vllm",
    "wandb": "wandb",
}
"""By package: the extra of pyproject.toml that brings it."""


def install_command(extra: str) -> str:
    """The command that adds an extra to an installed ple-align."""
    return f"pip install 'ple-align[{extra}]'"


def missing(package: str, what: str, extra: str | None = None, alone: str | None = None) -> UsageError:
    """The error to raise for a package that is not there.

    what: who needs it, in words that end where its name begins; extra: which brings it, if not the one of `EXTRAS`.
    alone: what is to be installed besides, without the packages that it names.
    """
    how = install_command(extra or EXTRAS[package]) + (f" && pip install --no-deps {alone}" if alone else "")
    return UsageError(f"{what} {package}, which is not installed: {how}")


def need(package: str, what: str) -> None:
    """Raise UsageError, with the command that installs it, where a package is not there."""
    if importlib.util.find_spec(package) is None:
        raise missing(package, what)
