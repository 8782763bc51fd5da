"""A command: its help, its options, and its errors as one clear line and a documented exit code. Knows none."""

import contextlib
import os
import pkgutil
import select
import signal
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from ple_data.common.click_options import parameters_of
from ple_data.common.loading import is_out_of_memory
from ple_data.common.terminal import guarded
from schemas import options
from schemas.errors import PleError, first_line

_HELP = tomllib.loads(Path(options.__file__).with_name("help.toml").read_text(encoding="utf-8"))
_CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110}
_LESS_MEMORY = {
    "microbatch_tokens": "a lower --microbatch-tokens",
    "gradient_checkpointing": "--gradient-checkpointing",
    "batch_tokens": "a lower --batch-tokens",
    "engine_arg": "a lower --engine-arg batch_size=N (hf) or max_num_seqs=N (vllm)",
}
"""Parameters that lower the memory of a command which has them, and how to say so."""


class _Guarded(click.Command):
    """Nothing that a command writes steers the terminal or shows a secret."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        with guarded():
            return super().main(*args, **kwargs)


class Command(_Guarded):
    """A command whose help groups its options, and whose errors become one line and a documented exit code."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under their headings."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and not isinstance(parameter, click.Argument):
                sections.setdefault(getattr(parameter, "section", "Other"), []).append(record)
        for section in sorted(sections, key=lambda name: name == "Other"):
            with formatter.section(section):
                formatter.write_dl(sections[section])

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
                message, code = _explain(error, self)
                say(traceback.format_exc() if ctx.meta.get("ple.debug") else f"error: {message}")
                ctx.exit(code)


def _explain(error: BaseException, command: click.Command) -> tuple[str, int]:
    """The line that a user reads, and the exit code."""
    if isinstance(error, PleError):
        return str(error), error.exit_code
    safe = "what was committed before is safe, run the same command again"
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or first_line(error)}; {safe}", 1
    if is_out_of_memory(error):
        return f"out of memory{_less_memory(command)}; {safe}", 1
    return f"unexpected {type(error).__name__}: {first_line(error)} (--debug shows where; please report it)", 1


def _less_memory(command: click.Command) -> str:
    """What of its own options makes the command need less; nothing where it has none."""
    own = [_LESS_MEMORY[parameter.name] for parameter in command.params if parameter.name in _LESS_MEMORY]
    return f"; less is needed with {', or with '.join(own)}" if own else ""


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM is like Ctrl-C."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
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
    """A message for people."""
    print(message, file=sys.stderr, flush=True)


def _note_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta["ple.debug"] = True


debug = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_note_debug, help="Show the traceback of an error."
)
version = click.version_option(package_name="ple-align", prog_name="ple")


def command(
    name: str,
    kind: type[options.Options],
    run: str | Callable[..., Any],
    hidden: Iterable[click.Parameter] = (),
    *,
    by_name: bool = False,
) -> Command:
    """A command with the options of a dataclass, and the help of its name.

    run: what takes the options and returns the text to print or None, or where it is (`module:function`), so that it
    is imported when the command starts. by_name: it takes them by name, not as the dataclass.
    """

    def callback(**values: Any) -> None:
        chosen = kind(**values)
        function = pkgutil.resolve_name(run) if isinstance(run, str) else run
        text = function(**chosen.values()) if by_name else function(chosen)
        if text is not None and getattr(chosen, "as_json", False):
            sys.stdout.buffer.write(f"{text}\n".encode())
        elif text is not None:
            print(text)

    parameters = [*parameters_of(kind), *hidden]
    made = Command(name.split()[-1], callback=callback, params=parameters, context_settings=_CONTEXT, **_HELP[name])
    return version(debug(made))


class _Group(_Guarded, click.Group):
    """Lists the commands in the order in which a user meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def group(name: str, commands: dict[str, click.Command]) -> click.Group:
    """Commands under one name, with the help of that name."""
    return _Group(name, commands=commands, context_settings=_CONTEXT, **_HELP[name])
