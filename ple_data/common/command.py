"""How a command ends: its errors as one clear line and a documented exit code. Knows no command."""

import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click

from ple_data.common.click_options import SectionedCommand, SectionedOption, parameters_of, taking
from schemas.errors import PleError
from schemas.options import Options

CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110}
_LESS_MEMORY = {
    "microbatch_tokens": "a lower --microbatch-tokens",
    "gradient_checkpointing": "--gradient-checkpointing",
    "batch_tokens": "a lower --batch-tokens",
    "engine_arg": "a lower --engine-arg batch_size=N (hf) or max_num_seqs=N (vllm)",
}
"""Parameters that lower the memory of a command which has them, and how to say so."""


class Command(SectionedCommand):
    """A command whose errors become one line and a documented exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        if not sys.stderr.isatty():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        with _interruptible():
            try:
                result = super().invoke(ctx)
                sys.stdout.flush()
                return result
            except (click.exceptions.Exit, click.ClickException, SystemExit):
                raise
            except KeyboardInterrupt:
                say("interrupted; run the same command again to go on")
                ctx.exit(130)
            except BaseException as error:
                if isinstance(error, BrokenPipeError) and _reader_is_gone():
                    ctx.exit(0)
                if ctx.meta.get("ple.debug"):
                    raise
                message, code = _explain(error, self)
                say(f"error: {message}")
                ctx.exit(code)


def _explain(error: BaseException, command: click.Command) -> tuple[str, int]:
    """The line that a user reads, and the exit code."""
    if isinstance(error, PleError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}; what was committed before is safe, run the same command again", 1
    if is_out_of_memory(error):
        advice = _less_memory(command)
        return f"out of memory{advice}; what was committed before is safe, run the same command again", 1
    first_line = (str(error).splitlines() or [""])[0]
    return f"unexpected {type(error).__name__}: {first_line} (--debug shows where; please report it)", 1


def _less_memory(command: click.Command) -> str:
    """What of its own options makes the command need less; nothing where it has none."""
    own = [_LESS_MEMORY[parameter.name] for parameter in command.params if parameter.name in _LESS_MEMORY]
    return f"; less is needed with {', or with '.join(own)}" if own else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Torch has an exception of its own for a GPU, and a plain RuntimeError for a CPU."""
    if type(error) is RuntimeError:
        return "DefaultCPUAllocator: can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM is like Ctrl-C."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _reader_is_gone() -> bool:
    """Whether stdout is a closed pipe (`| head`); if so, nothing more is written to it."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLERR)
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def say(message: str) -> None:
    """A message may quote a file: nothing in it steers the terminal."""
    from ple_data.common.terminal import printable

    click.echo("\n".join(map(printable, message.split("\n"))), err=True)


def note_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta["ple.debug"] = True


_debug = click.option(
    "--debug",
    cls=SectionedOption,
    section="Other",
    is_flag=True,
    expose_value=False,
    callback=note_debug,
    help="Show the traceback of an error.",
)
version = click.version_option(package_name="ple-align", prog_name="ple")


def command(
    name: str, kind: type[Options], summary: str, *hidden: click.Parameter
) -> Callable[[Callable[[Any], None]], Command]:
    """A command with the options of its dataclass; summary: its line in the list of commands."""

    def decorate(function: Callable[[Any], None]) -> Command:
        make = click.command(name, cls=Command, context_settings=CONTEXT, short_help=summary)
        made: Command = make(_debug(version(taking(kind, function))))
        made.params[:0] = [*parameters_of(kind), *hidden]
        return made

    return decorate
