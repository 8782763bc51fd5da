"""The command line: parse, call one function, turn the project's errors into one clear line and an exit code.

Only click is imported at the top, so that --help is instant; there is no logic here.
"""

import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

EXIT_CODES = """\b
Exit codes:
  0    done
  1    failed, and the message says why
  2    wrong usage: an option, a recipe, a query file or a model directory
  3    data damaged: a shard cut short, changed, or of a newer version
  4    locked by another process
  130  interrupted (Ctrl-C or SIGTERM); the same command goes on from there

\b
stdout carries data only; progress and messages go to stderr.
Shell completion (bash; also zsh and fish): eval "$(_PLE_COMPLETE=bash_source ple)"
"""

_LESS_MEMORY = {
    "microbatch_tokens": "a lower --microbatch-tokens",
    "gradient_checkpointing": "--gradient-checkpointing",
    "batch_tokens": "a lower --batch-tokens",
    "engine_arg": "a lower --engine-arg batch_size=N (hf) or max_num_seqs=N (vllm)",
}
"""Parameters that lower the memory of a command which has them, and how to say so."""
Function = TypeVar("Function", bound=Callable[..., Any])


class _Option(click.Option):
    """An option that --help shows under a heading."""

    def __init__(self, *args: Any, section: str = "Options", **more: Any) -> None:
        super().__init__(*args, **more)
        self.section = section
        if isinstance(self.type, click.IntRange | click.FloatRange):
            self.metavar = "N" if isinstance(self.type, click.IntRange) else "X"


class _Command(click.Command):
    """A command with grouped options, whose errors become one line and a documented exit code."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
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
                _say("interrupted; run the same command again to go on")
                ctx.exit(130)
            except BaseException as error:
                if isinstance(error, BrokenPipeError) and _reader_is_gone():
                    ctx.exit(0)
                if ctx.meta.get("ple.debug"):
                    raise
                message, code = _explain(error, self)
                _say(f"error: {message}")
                ctx.exit(code)


class _Group(click.Group):
    """Lists the commands in the order in which a user meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def _explain(error: BaseException, command: click.Command) -> tuple[str, int]:
    """The line that a user reads, and the exit code."""
    from schemas.errors import PleError

    if isinstance(error, PleError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}; what was committed before is safe, run the same command again", 1
    if _is_out_of_memory(error):
        advice = _less_memory(command)
        return f"out of memory{advice}; what was committed before is safe, run the same command again", 1
    first_line = (str(error).splitlines() or [""])[0]
    return f"unexpected {type(error).__name__}: {first_line} (--debug shows where; please report it)", 1


def _less_memory(command: click.Command) -> str:
    """What of its own options makes the command need less; nothing where it has none."""
    own = [_LESS_MEMORY[parameter.name] for parameter in command.params if parameter.name in _LESS_MEMORY]
    return f"; less is needed with {', or with '.join(own)}" if own else ""


def _is_out_of_memory(error: BaseException) -> bool:
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


def _say(message: str) -> None:
    """A message may quote a file: nothing in it steers the terminal."""
    from ple_data.textwidth import printable

    click.echo("\n".join(map(printable, message.split("\n"))), err=True)


def _note_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta["ple.debug"] = True


_debug = click.option(
    "--debug",
    cls=_Option,
    section="Other",
    is_flag=True,
    expose_value=False,
    callback=_note_debug,
    help="Show the traceback of an error.",
)
_version = click.version_option(package_name="ple-align", prog_name="ple")
_CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110}


def _command(name: str, summary: str | None = None) -> Callable[[Callable[..., Any]], _Command]:
    """summary: its line in the list of commands; the first sentence of its help where that is short enough."""

    def decorate(function: Callable[..., Any]) -> _Command:
        return click.command(name, cls=_Command, context_settings=_CONTEXT, short_help=summary)(
            _debug(_version(function))
        )

    return decorate


def _option(*names: str, section: str = "Options", **more: Any) -> Callable[[Function], Function]:
    return click.option(*names, cls=_Option, section=section, **more)


def _all(*decorators: Callable[[Function], Function]) -> Callable[[Function], Function]:
    def decorate(function: Function) -> Function:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


_method = partial(_option, section="Method")
_safeguard = partial(_option, section="Safeguards (off: the paper)")
_queries = partial(_option, section="Queries")
_sampling = partial(_option, section="Sampling")
_engine = partial(_option, section="Engine")
_judging = partial(_option, section="Reward model")
_llm = partial(_option, section="Language model")
_people = partial(_option, section="People")
_learning = partial(_option, section="Training")
_SAMPLED = ("Queries", "Sampling", "Engine")
"""Headings of the options that matter where something is sampled."""
_size = partial(_option, section="Model")
_machine = partial(_option, section="Machine")

_DTYPES = click.Choice(["auto", "float32", "bfloat16", "float16"])
_PATH = click.Path(path_type=Path)
_POSITIVE = click.IntRange(min=1)
_COUNT = click.IntRange(min=0)
_ABOVE_ZERO = click.FloatRange(min=0, min_open=True)
_ALPHA = click.FloatRange(0, 1, min_open=True, max_open=True)

_model = _all(
    _option("--model", required=True, help="Model: a directory or a hub id."),
    _option("--revision", help="Branch, tag or commit of a hub model."),
)
_adapter = _option("--adapter", help="LoRA adapter of the policy: the last round's --output.")
_round = _option("--round", type=_COUNT, required=True, help="Round T, counted from 0.")
_seed = _option("--seed", type=_COUNT, default=0, help="Seed of everything that is drawn.")
_threshold = _all(
    _method("--tau0", type=click.FloatRange(min=0), default=0.2, help="Threshold of round 0 on s_prompt - s."),
    _method("--alpha", type=_ALPHA, default=0.9, help="Decay: the threshold of round t is tau0 * alpha^t."),
)
_prompt_format = _queries(
    "--prompt-format",
    type=click.Choice(["auto", "plain", "chat"]),
    default="auto",
    help="auto: the tokenizer's chat template where it has one.",
)
_query_reading = _all(
    _queries(
        "--reader",
        type=click.Choice(["auto", "hh", "imdb", "tldr"]),
        default="auto",
        help="How a row becomes a query: HH dialogues, IMDb reviews (their first words), TL;DR posts.",
    ),
    _queries("--query-column", help="Column of the queries, if neither x, prompt nor messages."),
    _queries("--prefix-words", type=_POSITIVE, help="Words of a review that are the query (imdb reader)."),
    _queries("--split", help="Split of a hub dataset."),
    _prompt_format,
    _queries("--max-query-tokens", type=_POSITIVE, default=256, help="Drop longer queries, and count them."),
)
_query_options = _all(
    _query_reading,
    _queries("--shuffle/--no-shuffle", default=False, help="Take the queries in an order drawn from --seed."),
    _queries(
        "--skip",
        type=_COUNT,
        default=0,
        help="Leave out the first N queries; past the end it starts over.",
    ),
    _queries("--limit", type=_POSITIVE, help="Take at most N queries."),
    _queries(
        "--unit-size",
        type=_POSITIVE,
        help="Queries of one unit of work, which is one file; a round that was begun keeps its own.  "
        "[default: a 64th of the round, but 64 to 2048]",
    ),
)
_sampling_options = _all(
    _sampling("--max-new-tokens", type=_POSITIVE, default=1024, help="Longest response."),
    _option(
        "--temperature",
        section="Sampling",
        type=click.FloatRange(min=0),
        default=1.0,
        help="0 takes the likeliest token.",
    ),
    _option(
        "--top-p", section="Sampling", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="Nucleus sampling."
    ),
    _sampling("--stop", multiple=True, help="Text that ends a response; may be repeated."),
)
_engine_options = _all(
    _option(
        "--engine",
        section="Engine",
        type=click.Choice(["vllm", "hf"]),
        help="Default: vllm where it is installed, else hf.",
    ),
    _engine(
        "--engine-arg",
        multiple=True,
        metavar="NAME=VALUE",
        help="Pass an option to the engine, e.g. tensor_parallel_size=2; may be repeated.",
    ),
    _option(
        "--dtype",
        section="Engine",
        type=_DTYPES,
        default="auto",
        help="Number type of the weights; auto: bfloat16 where the device computes in it, never float16.",
    ),
)
_REWARD_OPTIONS = ("output_index", "join", "batch_tokens", "reward_device", "reward_dtype")
_reward_options = _all(
    _judging("--output-index", type=_COUNT, help="Which output of a classifier is the reward."),
    _judging(
        "--join",
        type=click.Choice(["auto", "text", "pair", "chat"]),
        default="auto",
        help="How a classifier reads x and y; auto: its chat template where it has one, else one text.",
    ),
    _judging("--batch-tokens", type=_POSITIVE, help="Tokens of one batch, padding counted."),
    _judging("--reward-device", default="auto", help="auto: a GPU where there is one, else the CPU."),
    _judging(
        "--reward-dtype",
        type=click.Choice(["float32", "bfloat16"]),
        default="float32",
        help="Number type of its weights.",
    ),
)


def _training(
    learning_rate: float, batch_size: int, unit: str, max_length: int | None = None
) -> Callable[[Function], Function]:
    """Options that every training command has."""
    return _all(
        _learning("--learning-rate", type=_ABOVE_ZERO, default=learning_rate, help="AdamW's learning rate."),
        _learning("--epochs", type=_POSITIVE, default=1, help="Passes over the data."),
        _learning("--batch-size", type=_POSITIVE, default=batch_size, help=f"{unit} of one step, over all processes."),
        _learning(
            "--max-length",
            type=_POSITIVE,
            default=max_length,
            help="Keep the last N token ids." if max_length else "Leave out longer rows (token ids), and count them.",
        ),
        _machine(
            "--precision",
            type=click.Choice(["auto", "float32", "bf16"]),
            default="auto",
            help="auto: bf16 on a GPU that computes in it, else float32.",
        ),
        _machine(
            "--microbatch-tokens",
            type=_POSITIVE,
            default=8192,
            help="Tokens in memory at once; what is learned does not depend on it.",
        ),
        _machine("--checkpoint-every", type=_POSITIVE, default=100, help="Steps between two checkpoints."),
        _machine("--resume/--no-resume", default=True, help="Go on from the last checkpoint, or start over."),
        _machine("--metrics", type=_PATH, help="Parquet file of every step's metrics; in --output if not given."),
        _machine("--report-to", type=click.Choice(["tensorboard", "wandb"]), help="Also report the metrics there."),
    )


_lora = _all(
    _size("--lora-rank", type=_POSITIVE, default=8, help="Rank of the LoRA adapter."),
    _size("--lora-alpha", type=_ABOVE_ZERO, default=16, help="Scale of the LoRA adapter."),
    _size("--full/--no-full", default=False, help="Train all weights instead of an adapter."),
    _machine(
        "--attention",
        default="auto",
        help="ple_varlen, ple_packed, or a name of transformers; auto: the cheapest that the model keeps.",
    ),
    _machine("--gradient-checkpointing/--no-gradient-checkpointing", default=False, help="Less memory, more time."),
)
_trl = _all(
    _size("--lora-rank", type=_POSITIVE, default=8, help="Rank of the LoRA adapter."),
    _size("--lora-alpha", type=_ABOVE_ZERO, default=16, help="Scale of the LoRA adapter."),
    _machine(
        "--precision",
        type=click.Choice(["auto", "float32", "bf16"]),
        default="auto",
        help="auto: bf16 on a GPU that computes in it, else float32.",
    ),
    _machine("--microbatch-tokens", type=_POSITIVE, default=8192, help="Tokens in memory at once, padding counted."),
    _machine("--resume/--no-resume", default=True, help="Keep a finished --output, or start over."),
    _machine("--metrics", type=_PATH, help="Parquet file of every step's metrics; in --output if not given."),
)
_schedule = _all(
    _learning("--warmup-steps", type=_COUNT, default=0, help="Steps of linear warm-up."),
    _learning(
        "--schedule",
        type=click.Choice(["constant", "cosine"]),
        default="constant",
        help="Learning rate after the warm-up.",
    ),
    _learning("--weight-decay", type=click.FloatRange(min=0), default=0.0, help="AdamW's weight decay."),
)


_gradient_clipping = _learning("--max-grad-norm", type=_ABOVE_ZERO, default=1.0, help="Gradient clipping.")


@click.group(cls=_Group, context_settings=_CONTEXT, epilog=EXIT_CODES)
@_version
@click.option("--debug", is_flag=True, expose_value=False, callback=_note_debug, help="Show the traceback of an error.")
def ple() -> None:
    """Align a language model by Progressively Label Enhancement (PLE).

    Each round samples a plain and a principle-guided response to every query, scores both with a reward
    model, and trains the policy on all pairs so far.

    \b
    See it work, nothing to download:   ple demo
    A whole run from one file:          ple run recipe.yaml
    One round by hand:
      ple-gen   --model M --queries q.jsonl --principles hh --data DATA --round 0
      ple-score --data DATA --reward-model R
      ple-train --model M --data DATA --round 0 --output policy/round=000
    """


@_command("ple-gen", "Sample y and y_prompt to every query.")
@_model
@_adapter
@_option("--queries", required=True, help="Queries: Parquet, JSONL, JSON, CSV or a hub dataset id.")
@_option("--principles", required=True, help="hh, imdb or tldr (the paper's), a text file, or none (an ablation).")
@_option("--reward-model", help="Score the responses as well, as ple-score does; without it, stop after sampling.")
@_option("--data", type=_PATH, required=True, help="Folder of the responses and pairs.")
@_round
@_seed
@_option("--dry-run", is_flag=True, help="Show one rendered prompt of each arm with its token ids; sample nothing.")
@_query_options
@_sampling("--samples", type=_POSITIVE, default=1, help="Pairs of responses a query.")
@_sampling_options
@_option(
    "--logprobs/--no-logprobs", section="Sampling", default=True, help="Keep the log-probability of each sampled token."
)
@_sampling(
    "--reuse",
    type=_PATH,
    multiple=True,
    help="Take rows of this DATA where policy, query, principle and sampling match; may be repeated.",
)
@_engine_options
@_reward_options
def gen(reward_model: str | None, **options: Any) -> None:
    """Sample a plain and a principle-guided response to every query, and keep them in DATA.

    Finished units are never sampled again: run the same command after any crash. Several processes on the same
    DATA and round share the work.

    \b
    Example:
      ple-gen --model Qwen/Qwen2.5-7B --queries hh.jsonl --principles hh --data data --round 0
    """
    from ple_data.generate import generate
    from ple_data.rewards import check_reward_model

    rewards = _reward_keywords(options)
    if reward_model is not None:
        check_reward_model(reward_model, rewards["output_index"])
    summary = generate(**_parsed(options))
    if summary.dry_run is not None:
        click.echo(summary.dry_run)
    elif reward_model is not None:
        _score(options["data"], reward_model, options["round"], None, rewards)


def _parsed(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a sampling command as generate() takes them."""
    from ple_data.engines import Sampling, parse_engine_args

    chosen = {name: options.pop(name) for name in ("max_new_tokens", "temperature", "top_p", "stop")}
    sampling = Sampling(**chosen, logprobs=options.pop("logprobs", False))
    engine_args = parse_engine_args(options.pop("engine_arg"))
    return {**options, "sampling": sampling, "engine_args": engine_args}


def _reward_keywords(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a scoring command as load_reward_model() takes them; they are removed from `options`."""
    return {name.removeprefix("reward_"): options.pop(name) for name in _REWARD_OPTIONS}


@_command("ple-score", "Score responses with a reward model: pairs.")
@_option("--data", type=_PATH, required=True, help="Folder of the responses.")
@_option(
    "--reward-model",
    required=True,
    help="Classifier (directory or hub id; MODEL[1] for one of its outputs), file.py:function, module:function, "
    "or http(s)://address.",
)
@_option("--round", type=_COUNT, help="Score this round only.")
@_option("--output", type=_PATH, help="Write the pairs to another DATA, so that two reward models stay apart.")
@_reward_options
def score(data: Path, reward_model: str, round: int | None, output: Path | None, **options: Any) -> None:
    """Score responses with a reward model: responses become pairs. Nothing is sampled.

    \b
    Example:
      ple-score --data data --reward-model weqweasdas/RM-Mistral-7B
    """
    _score(data, reward_model, round, output, _reward_keywords(options))


def _score(data: Path, reward_model: str, round: int | None, output: Path | None, rewards: dict[str, Any]) -> None:
    from ple_data.rewards import load_reward_model
    from ple_data.score import score
    from ple_data.store import Store

    loaded = load_reward_model(reward_model, **rewards)
    score(Store(data), loaded, round=round, output=Store(output) if output else None)


@_command("ple-train", "Train the policy on the pairs of all rounds so far.")
@_model
@_adapter
@_option("--data", type=_PATH, multiple=True, required=True, help="Folder of pairs; may be repeated.")
@_round
@_option("--output", type=_PATH, required=True, help="Folder of the new adapter.")
@_seed
@_option("--dry-run", is_flag=True, help="Show rows, margins and the partition by round; train nothing.")
@_threshold
@_safeguard(
    "--trust-region",
    type=_ABOVE_ZERO,
    help="Stop pushing a response whose mean log-probability has drifted this many nats a token.",
)
@_safeguard("--normalize-wsft/--no-normalize-wsft", default=False, help="Divide weighted SFT by the response's length.")
@_safeguard(
    "--sft-anchor", type=click.FloatRange(min=0), default=0.0, help="Weight of an SFT term on the better response."
)
@_method(
    "--without",
    type=click.Choice(["rank", "wsft"]),
    help="Ablation: leave out a term of equation 6. rank: every pair is weighted SFT; wsft: rank pairs alone.",
)
@_training(1e-4, 16, "Pairs")
@_gradient_clipping
@_lora
def train(data: tuple[Path, ...], dry_run: bool, **options: Any) -> None:
    """Train the policy on the pairs of all rounds up to T (equation 6), re-partitioned at this round's threshold.

    The output is a standard PEFT adapter, for the next ple-gen and for vLLM. Killed and started again it goes on
    from its last checkpoint.

    \b
    Example:
      ple-train --model Qwen/Qwen2.5-7B --data data --round 0 --output policy/round=000
    """
    from ple_train import train as training

    if dry_run:
        selected = {name: options[name] for name in ("round", "tau0", "alpha", "max_length")}
        click.echo(training.dry_run(data=list(data), **selected))
    else:
        training.train(data=list(data), **options)


@_command("sft", "Supervised fine-tuning: makes the start policy.")
@_model
@_option("--data", type=_PATH, required=True, help="Rows with x and y (or prompt and response).")
@_option("--output", type=_PATH, required=True, help="Folder of the new model.")
@_seed
@_option("--merge/--no-merge", default=True, help="Merge the adapter into the model, or keep it apart.")
@_prompt_format
@_training(1e-4, 32, "Rows")
@_schedule
@_lora
def sft(**options: Any) -> None:
    """Supervised fine-tuning (equation 1), the loss on the response only: makes the start policy.

    \b
    Example:
      ple sft --model Qwen/Qwen2.5-7B --data chosen.jsonl --output sft
    """
    from ple_train.sft import sft as run_sft

    run_sft(**options)


@_command("reward", "Train a reward model from labels or preferences.")
@_model
@_option("--data", type=_PATH, required=True, help="Rows with text and label, or with prompt, chosen and rejected.")
@_option("--output", type=_PATH, required=True, help="Folder of the reward model.")
@_seed
@_training(5e-5, 32, "Rows", max_length=512)
@_schedule
def reward(**options: Any) -> None:
    """Train a reward model: a classifier from labels, or Bradley-Terry from chosen and rejected responses.

    \b
    Example:
      ple reward --model roberta-base --data labelled.jsonl --output reward
    """
    from ple_train.reward import train_reward

    train_reward(**options)


@click.group(
    "baseline", cls=_Group, context_settings=_CONTEXT, short_help="Another method on the same rows, for comparison."
)
def baseline() -> None:
    """Train by another method, for comparison: what it writes is what ple-train writes.

    A baseline takes the place of ple-train on the same store and policy: ple-gen, ple-score, ple baseline METHOD. In
    a recipe of ple run: baseline: {method: raft}. Each records tokens sampled, tokens trained on and seconds in
    ple.json.

    \b
    Example:
      ple baseline raft --model Qwen/Qwen2.5-7B --data data --round 0 --output policy/round=000
    """


_baseline_data = _all(
    _model,
    _adapter,
    _option("--data", type=_PATH, multiple=True, required=True, help="Folder of pairs; may be repeated."),
    _round,
    _option("--output", type=_PATH, required=True, help="Folder of the new adapter."),
    _seed,
)


@_command("sft", "SFT on the references.")
@_model
@_adapter
@_option(
    "--data",
    type=_PATH,
    multiple=True,
    required=True,
    help="Folder of pairs whose queries came with references, or a file of (x, y) rows; may be repeated.",
)
@_option("--round", type=_COUNT, help="Round T of a folder: its pairs of rounds up to T.")
@_option("--output", type=_PATH, required=True, help="Folder of the new adapter.")
@_seed
@_prompt_format
@_training(1e-4, 16, "Responses")
@_gradient_clipping
@_lora
def baseline_sft(data: tuple[Path, ...], **options: Any) -> None:
    """SFT (equation 1) on the references that came with the queries, or on the rows of a file.

    \b
    Example:
      ple baseline sft --model Qwen/Qwen2.5-7B --data data --round 0 --output policy/round=000
    """
    from ple_train.baseline import baseline as train_baseline

    train_baseline("sft", data=list(data), **options)


@_command("context-distillation", "SFT on y_prompt given x alone.")
@_baseline_data
@_training(1e-4, 16, "Responses")
@_gradient_clipping
@_lora
def context_distillation(data: tuple[Path, ...], **options: Any) -> None:
    """SFT on y_prompt given x alone: what the principle did becomes the policy's own. All rounds up to T.

    \b
    Example:
      ple baseline context-distillation --model Qwen/Qwen2.5-7B --data data --round 0 --output policy/round=000
    """
    from ple_train.baseline import baseline as train_baseline

    train_baseline("context-distillation", data=list(data), **options)


@_command("raft", "SFT on the best response to each query.")
@_baseline_data
@_training(1e-4, 16, "Responses")
@_gradient_clipping
@_lora
def raft(data: tuple[Path, ...], **options: Any) -> None:
    """RAFT: SFT on the response of each query with the highest reward, of round T alone.

    Both arms and all samples compete. For RAFT-4 sample two pairs of plain responses: ple-gen --principles none
    --samples 2.

    \b
    Example:
      ple baseline raft --model Qwen/Qwen2.5-7B --data data --round 0 --output policy/round=000
    """
    from ple_train.baseline import baseline as train_baseline

    train_baseline("raft", data=list(data), **options)


@_command("dpo", "DPO (TRL) on pairs ranked by the reward.")
@_baseline_data
@_method("--beta", type=_ABOVE_ZERO, default=0.1, help="Weight of the log-ratio to the start policy.")
@_learning("--learning-rate", type=_ABOVE_ZERO, default=1e-4, help="AdamW's learning rate.")
@_learning("--epochs", type=_POSITIVE, default=1, help="Passes over the data.")
@_learning("--batch-size", type=_POSITIVE, default=16, help="Pairs of one step.")
@_learning("--max-length", type=_POSITIVE, help="Leave out longer rows (token ids), and count them.")
@_gradient_clipping
@_machine("--gradient-checkpointing/--no-gradient-checkpointing", default=False, help="Less memory, more time.")
@_trl
def dpo(data: tuple[Path, ...], **options: Any) -> None:
    """DPO by TRL's DPOTrainer: the response with the higher reward is chosen. All rounds up to T.

    Pairs with equal rewards are left out. The reference is the start policy: the model without an adapter. Needs
    pip install 'ple-align[trl]'. A killed run starts over.

    \b
    Example:
      ple baseline dpo --model Qwen/Qwen2.5-7B --data data --round 0 --output policy/round=000
    """
    from ple_train.dpo import dpo as run_dpo

    run_dpo(data=list(data), **options)


@_command("ppo")
@_model
@_adapter
@_option("--queries", required=True, help="Queries: Parquet, JSONL, JSON, CSV or a hub dataset id.")
@_option(
    "--reward-model",
    required=True,
    help="Classifier (directory or hub id), file.py:function, module:function, or http(s)://address.",
)
@_option("--output", type=_PATH, required=True, help="Folder of the new adapter.")
@_option("--sampled-tokens", type=_POSITIVE, required=True, help="Stop with the step that has sampled so many tokens.")
@_seed
@_query_reading
@_sampling("--max-new-tokens", type=_POSITIVE, default=1024, help="Longest response.")
@_sampling("--temperature", type=_ABOVE_ZERO, default=1.0, help="Of the responses it trains on.")
@_method("--kl-coef", type=click.FloatRange(min=0), default=0.05, help="Penalty for leaving the start policy.")
@_method("--ppo-epochs", type=_POSITIVE, default=4, help="Passes over each batch of responses.")
@_learning("--learning-rate", type=_ABOVE_ZERO, default=1e-4, help="AdamW's learning rate.")
@_learning("--batch-size", type=_POSITIVE, default=64, help="Responses of one step.")
@_gradient_clipping
@_trl
@_reward_options
def ppo(**options: Any) -> None:
    """PPO by TRL 1.12.0's PPOTrainer. It samples for itself: queries and a reward model, no rounds.

    The reference is the start policy; the value model is its body with a LoRA adapter of its own. Needs
    pip install 'ple-align[ppo]'. A killed run starts over.

    \b
    Example:
      ple baseline ppo --model Qwen/Qwen2.5-7B --queries hh.jsonl --reward-model weqweasdas/RM-Mistral-7B \\
        --sampled-tokens 1000000 --output ppo
    """
    from ple_train.ppo import ppo as run_ppo

    rewards = {name: options.pop(name) for name in _REWARD_OPTIONS}
    run_ppo(**options, reward_options={name.removeprefix("reward_"): value for name, value in rewards.items()})


for _method_command in (baseline_sft, context_distillation, raft, dpo, ppo):
    baseline.add_command(_method_command)


@_command("run", "Run a whole recipe; goes on where it stopped.")
@click.argument("recipe", type=_PATH)
@_option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key, e.g. train.epochs=2; may be repeated.",
)
@_option("--dry-run", is_flag=True, help="Print the commands as shell lines; start nothing.")
def run(recipe: Path, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Run a whole recipe: reward model and SFT if asked for, then rounds of ple-gen, ple-score and ple-train.

    Each stage is a process of its own. Run the same command again after a stop: it goes on with the stage where it
    was. The run directory keeps the frozen recipe and the record of every stage (stages.json).

    \b
    Example:
      ple run recipes/hh-qwen.yaml --set rounds=3 --dry-run
    """
    from ple_train import rounds
    from schemas.recipe import load_recipe

    resolved = load_recipe(recipe, list(overrides))
    if dry_run:
        for stage in rounds.plan(resolved):
            click.echo(stage.shell_line)
    else:
        rounds.run(resolved)


@_command("inspect", "Show DATA by round, or its pairs.")
@click.argument("data", type=_PATH)
@_threshold
@_option("--sort", type=click.Choice(["margin"]), help="Show pairs, the largest margin first.")
@_option("--rows", type=_COUNT, default=0, help="Show this many pairs.")
@_option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(**options: Any) -> None:
    """Show what is in DATA: by round the rewards, margins, rank set, lengths, and any warning.

    \b
    Example:
      ple inspect data --sort margin --rows 5
    """
    from ple_data.inspect import inspect as show

    click.echo(show(**options))


@_command("judge", "Win rates of A against B: LLM, reward model, people.")
@click.argument("a")
@click.argument("b")
@_option(
    "--judge",
    "spec",
    metavar="SPEC",
    help="openai:MODEL, anthropic:MODEL or reward:SPEC (as --reward-model of ple-score).",
)
@_option("--human", is_flag=True, help="Write a page on which people compare blindly, instead of asking a judge.")
@_option("--output", type=_PATH, required=True, help="Folder of the verdicts, or of the page.")
@_option("--limit", type=_POSITIVE, help="Judge at most N queries, drawn by --seed.")
@_option(
    "--seed",
    type=_COUNT,
    help="Seed of everything that is drawn. Default: 0; a page's order and sides are drawn at random.",
)
@_llm("--endpoint", help="Address of an OpenAI-compatible or Anthropic-compatible server, up to and with /v1.")
@_llm("--template", type=_PATH, help="File of the question with {query}, {response_1} and {response_2}.")
@_llm("--concurrency", type=_POSITIVE, default=8, help="Requests in flight at once.")
@_llm(
    "--request-arg",
    "request_args",
    multiple=True,
    metavar="NAME=VALUE",
    help="Put a field into every request, e.g. reasoning_effort=low; null leaves one out; may be repeated.",
)
@_people(
    "--read",
    "exports",
    type=_PATH,
    multiple=True,
    help="Read an annotator's export, or a folder of them, back; may be repeated.",
)
@_people(
    "--label-studio", type=_PATH, help="Also write the tasks for Label Studio here (JSON), and its labelling config."
)
@_reward_options
@click.pass_context
def judge(ctx: click.Context, a: str, b: str, spec: str | None, human: bool, **options: Any) -> None:
    """Compare the responses of A and B to the same queries: win, tie or lose, each asked in both orders.

    A and B are files with query_id, x and y, policies of an evaluation (eval/eval.parquet#label=NAME), or data
    directories (DATA#round=N and DATA#arm=y_prompt choose). Killed and started again, it pays for no answer twice.
    Keys: OPENAI_API_KEY, ANTHROPIC_API_KEY.

    \b
    Example:
      ple judge tuned.jsonl base.jsonl --judge openai:gpt-4o --output judged
      ple judge tuned.jsonl base.jsonl --human --output page
      ple judge tuned.jsonl base.jsonl --human --output page --read exports
    """
    from ple_data.judge import llm, people
    from ple_data.judge.judge import judge as run_judge
    from schemas.errors import UsageError

    rewards = {name.removeprefix("reward_"): options.pop(name) for name in _REWARD_OPTIONS}
    exports, label_studio, seed = (options.pop(name) for name in ("exports", "label_studio", "seed"))
    if human == (spec is not None):
        raise UsageError("give either --judge SPEC or --human")
    if spec is not None:
        _refuse_given(ctx, ["People"], "without --human")
        if spec.startswith("reward:"):
            _refuse_given(ctx, ["Language model"], "by a reward model")
        else:
            _refuse_given(ctx, ["Reward model"], "by a language model")
        options["request_args"] = llm.parse_request_args(options["request_args"])
        click.echo(run_judge(a, b, spec, **options, seed=seed or 0, reward_options=rewards))
        return
    _refuse_given(ctx, ["Language model", "Reward model"], "with --human")
    if exports:
        _refuse_given(
            ctx, [], "with --read, which goes by what the page was made with", "limit", "seed", "label_studio"
        )
        click.echo(people.read_exports(a, b, exports, options["output"]))
    else:
        selected = {name: options[name] for name in ("output", "limit")}
        click.echo(people.write_page(a, b, **selected, seed=seed, label_studio=label_studio))


@_command("export", "Write the pairs for other tools.")
@click.argument("data", type=_PATH)
@_option(
    "--format",
    type=click.Choice(["trl-preference", "sft", "messages", "alpacaeval"]),
    required=True,
    help="prompt, chosen, rejected; prompt, completion (the best response); the same as chat; instruction, output.",
)
@_option("--round", type=_COUNT, help="This round only; alpacaeval: the newest if not given.")
@_option("--output", required=True, help="File: .jsonl or .parquet (alpacaeval: .json), or - for stdout.")
def export(**options: Any) -> None:
    """Write the pairs of DATA for other tools.

    Pairs with equal rewards prefer nothing: trl-preference counts them and leaves them out.

    \b
    Example:
      ple export data --format trl-preference --output preferences.jsonl
    """
    from ple_data.export import export as run_export

    run_export(**options)


@_command("verify", "Check every shard of DATA.")
@click.argument("data", type=_PATH)
def verify(data: Path) -> None:
    """Check every shard of DATA (hash, schema, rows, duplicates, orphans) and say what to do. Exit code 3 if not whole.

    \b
    Example:
      ple verify data
    """
    from ple_data.store import Store
    from ple_data.verify import verify as find_problems
    from schemas.errors import DamagedError

    findings = find_problems(Store(data))
    for finding in findings:
        click.echo(str(finding))
    errors = sum(finding.severity == "error" for finding in findings)
    if errors:
        raise DamagedError(f"{data}: {errors} {'problem' if errors == 1 else 'problems'}, listed above with what to do")
    _say(f"{data}: whole")


def _refuse_given(ctx: click.Context, sections: Sequence[str], why: str, *names: str) -> None:
    """Refuse options on the command line that would not be heeded: those under some headings, and others by name."""
    from schemas.errors import UsageError

    given = [
        parameter.opts[0]
        for parameter in ctx.command.params
        if (getattr(parameter, "section", None) in sections or parameter.name in names)
        and ctx.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
    ]
    if given:
        raise UsageError(f"{', '.join(given)}: not heeded {why}; leave {'it' if len(given) == 1 else 'them'} out")


def _point_to_policy(_: click.Context, option: click.Parameter, given: str | None) -> None:
    if given is not None:
        raise click.UsageError(
            f"{option.opts[0]}: policies have names here: give --policy NAME=MODEL or --policy NAME=MODEL,ADAPTER for "
            "each, e.g. --policy base=M --policy tuned=M,A"
        )


def _not_here(name: str) -> Callable[[Function], Function]:
    """An option of other commands in whose place this one has --policy."""
    return _option(name, hidden=True, expose_value=False, callback=_point_to_policy)


_policies = _all(
    _option(
        "--policy",
        multiple=True,
        required=True,
        metavar="NAME=MODEL[,ADAPTER]",
        help="A policy and its name in the tables; may be repeated. A hub id may end with @ and a revision.",
    ),
    _not_here("--model"),
    _not_here("--adapter"),
)
_reward_models = _judging(
    "--reward-model",
    multiple=True,
    help="Classifier (one of its outputs: MODEL[1]), file.py:function, module:function or http(s)://address; "
    "may be repeated.",
)
_trained_with = _judging(
    "--trained-with", multiple=True, help="The --reward-model that trained a policy: it is marked; may be repeated."
)


@_command("eval", "Compare policies: rewards, perplexity, BLEU, length.")
@_policies
@_option("--queries", help="Queries to sample responses to: Parquet, JSONL, JSON, CSV or a hub dataset id.")
@_option(
    "--data", type=_PATH, multiple=True, help="Take each policy's plain responses from this DATA; may be repeated."
)
@_option("--round", type=_COUNT, help="Take those of this round only.")
@_option("--output", type=_PATH, required=True, help="Folder of the results, and of all that is kept for a rerun.")
@_seed
@_option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@_option(
    "--references",
    help="File with id and reference, or a column of the queries; else what the reader finds beside a query.",
)
@_query_options
@_sampling("--samples", type=_POSITIVE, default=1, help="Responses a query.")
@_sampling_options
@_engine_options
@_reward_models
@_trained_with
@_reward_options
@_machine(
    "--precision",
    type=click.Choice(["auto", "float32", "bf16"]),
    default="auto",
    help="Number type of the perplexity; auto: bf16 on a GPU that computes in it, else float32.",
)
@_machine(
    "--microbatch-tokens",
    type=_POSITIVE,
    default=8192,
    help="Tokens of the perplexity in memory at once; its value does not depend on it.",
)
@click.pass_context
def evaluate(ctx: click.Context, as_json: bool, **options: Any) -> None:
    """Compare policies on the same queries: rewards, perplexity, BLEU, length, distinct words, with 95 % intervals.

    The first policy is what the others are compared with. Nothing is sampled or scored twice: run the same command
    after any crash, or with more policies and reward models.

    \b
    Example:
      ple eval --policy sft=run/sft --policy ple=run/sft,run/policy/round=004 --queries unseen.jsonl \\
          --reward-model run/reward --trained-with run/reward --reward-model judge.py:score --output eval
    """
    from ple_data.eval_table import format_report
    from ple_train.evaluate import evaluate as measure

    if options["data"]:
        _refuse_given(ctx, _SAMPLED, "with --data, which takes responses as they are")
        sampled = {parameter.name for parameter in ctx.command.params if getattr(parameter, "section", "") in _SAMPLED}
        options = {name: value for name, value in options.items() if name not in sampled}
    else:
        options = _parsed(options)
    report = measure(reward_options=_reward_keywords(options), **options)
    click.echo(report.to_json().rstrip() if as_json else format_report(report))


@_command("cases", "Several policies' answers side by side.")
@_policies
@_option("--queries", required=True, help="Rows with query, x or prompt, and id and kind where there are any.")
@_option("--output", type=_PATH, required=True, help="Folder of cases.parquet, and of all that is kept for a rerun.")
@_seed
@_query_options
@_sampling_options
@_engine_options
@_reward_models
@_trained_with
@_reward_options
def cases(**options: Any) -> None:
    """Answer harmful and everyday queries with several policies and show the answers side by side.

    \b
    Example:
      ple cases --policy sft=run/sft --policy ple=run/sft,run/policy/round=004 --queries cases.jsonl --output cases
    """
    from ple_data.cases import cases as answer

    click.echo(answer(reward_options=_reward_keywords(options), **_parsed(options)))


@_command("purity", "Does the policy rank y_prompt as the reward does?")
@_option("--run", type=_PATH, help="Directory of ple run: its start policy and that of every round, and its data.")
@_option("--model", help="Start policy: a directory or a hub id. Instead of --run.")
@_option("--revision", help="Branch, tag or commit of a hub model.")
@_option("--adapter", multiple=True, help="LoRA adapter of a later policy, in the order of training; may be repeated.")
@_option("--data", type=_PATH, multiple=True, help="Folder of pairs; may be repeated. Default: RUN/data.")
@_option("--round", type=_COUNT, multiple=True, help="Take the pairs of this round only; may be repeated.")
@_option("--output", type=_PATH, help="Folder of the results. Default: RUN/purity.")
@_option(
    "--normalized/--sum", default=False, help="Compare mean log-probabilities of a token, or sums as in the paper."
)
@_machine(
    "--precision",
    type=click.Choice(["auto", "float32", "bf16"]),
    default="auto",
    help="auto: bf16 on a GPU that computes in it, else float32.",
)
@_machine("--microbatch-tokens", type=_POSITIVE, default=8192, help="Tokens in memory at once.")
def purity(**options: Any) -> None:
    """Measure Section 5 of the paper: does the policy rank y_prompt above y where the reward does?

    By policy: agreement with the reward by margin, the smallest e whose level set is pure at 100, 95 and 90 %, and
    Theorem 5.3's bound. Log-probabilities are kept by policy and shard: run the same command again after a stop, or
    after more rounds.

    \b
    Example:
      ple purity --run runs/hh-qwen
    """
    from ple_train.purity import purity as measure

    click.echo(measure(**options))


@_command("report", "One HTML page about a run.")
@click.argument("run", type=_PATH)
@_option("--eval", "evals", type=_PATH, multiple=True, help="Folder of ple eval; may be repeated.")
@_option("--judge", "judges", type=_PATH, multiple=True, help="Folder of ple judge; may be repeated.")
@_option("--purity", type=_PATH, help="Folder of ple purity. Default: RUN/purity where it is there.")
@_option("--cases", type=_PATH, help="Folder of ple cases.")
@_option(
    "--output", type=_PATH, help="The page; NAME-figures/ beside it takes the PNG files. Default: RUN/report.html."
)
@_method("--tau0", type=click.FloatRange(min=0), help="Threshold of round 0. Default: the recipe's, else 0.2.")
@_method("--alpha", type=_ALPHA, help="Decay of the threshold. Default: the recipe's, else 0.9.")
def report(**options: Any) -> None:
    """Make one self-contained HTML page about a run (or a DATA folder): figures, tables and a browser of pairs.

    The page needs no network and no server, prints well, and follows the reader's light or dark theme.

    \b
    Example:
      ple report runs/hh-qwen --eval eval --judge judge
    """
    from ple_data.report.page import report as write

    click.echo(write(**options))


@_command("demo", "See PLE work on a toy world in minutes.")
@_option("--output", type=_PATH, default=Path("demo"), help="Folder of everything that the demo makes.")
@_option("--rounds", type=_POSITIVE, default=3, help="Rounds of PLE.")
def demo(output: Path, rounds: int) -> None:
    """See PLE work on a toy world of film reviews: nothing to download, a few minutes on two cores.

    \b
    Example:
      ple demo
    """
    from ple_train.demo import demo as run_demo

    click.echo(run_demo(output, rounds=rounds))


_commands: dict[str, click.Command] = {
    "demo": demo,
    "run": run,
    "gen": gen,
    "score": score,
    "train": train,
    "sft": sft,
    "reward": reward,
    "eval": evaluate,
    "cases": cases,
    "baseline": baseline,
    "judge": judge,
    "inspect": inspect,
    "export": export,
    "verify": verify,
    "purity": purity,
    "report": report,
}
for _name, _member in _commands.items():
    ple.add_command(_member, _name)


if __name__ == "__main__":
    ple(prog_name="ple")
