"""The project's errors. Each message says what is wrong, where, and what to do; a command prints it as one line.

Anything that is not a `PleError` is a bug of ours. This room raises nothing itself.
"""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line of at most 200 characters; a heading takes what follows it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:200]


class PleError(Exception):
    """A failure that the user can act on (exit code 1)."""

    exit_code = 1


class UsageError(PleError):
    """A bad option, recipe, query file or model directory (exit code 2)."""

    exit_code = 2


class DamagedError(PleError):
    """Stored data that is cut short, altered, of a newer version or not ours (exit code 3)."""

    exit_code = 3


class NewerError(DamagedError):
    """A file of a newer version: whole, but not for this program to read, replace or remove."""


class LockedError(PleError):
    """Another process holds what is needed; the message contains 'locked by pid N on HOST' (exit code 4)."""

    exit_code = 4


class ClaimLostError(LockedError):
    """A unit that this process had claimed is another's now, since it did not renew its claim."""
