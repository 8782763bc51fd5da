"""Groups of options that several commands take, each option stated once."""

from dataclasses import MISSING
from pathlib import Path
from typing import Literal

from schemas.options.form import Options, option
from schemas.options.objectives import Form, ObjectiveName

Precision = Literal["auto", "float32", "bf16"]
PromptFormat = Literal["auto", "plain", "chat"]
PrincipleForm = Literal["add", "replace"]
Reader = Literal["auto", "hh", "imdb", "tldr"]
Join = Literal["auto", "text", "pair", "chat"]
RewardFormat = Literal["ple", "openrlhf", "vllm-classify", "vllm-pooling"]
Without = Literal["rank", "wsft"]
EngineName = Literal["vllm", "hf", "server"]
ENGINES: dict[EngineName, str] = {"vllm": "vllm", "hf": "transformers", "server": "httpx"}
"""Modules of `ple_data.engines` and the package that each needs; the first whose package is there is the default."""
RESPONSES, QUERIES, MODEL = "Sampling", "Queries", "Model"
REWARD, METHOD, TRAINING, MACHINE = "Reward model", "Method", "Training", "Machine"
JUDGE_SERVER = "Address of a judge's OpenAI-compatible server, up to and with /v1.  [default: OpenAI's]"
SAFEGUARDS, ENGINE = "Safeguards (off: the paper)", "Engine"


class Model(Options):
    model: str = option(MISSING, "Model: a directory or a hub id.", place=True)
    revision: str | None = option(None, "Branch, tag or commit of a hub model.", place=True)


class Policy(Model):
    adapter: str | None = option(None, "LoRA adapter of the policy: the last round's --output.", place=True)


class Seed(Options):
    seed: int = option(0, "Seed of everything that is drawn.", least=0, below=2**63)


class Threshold(Options):
    tau0: float = option(0.2, "Threshold of round 0 on s_prompt - s.", METHOD, least=0)
    alpha: float = option(0.9, "Decay: the threshold of round t is tau0 * alpha^t.", METHOD, above=0, below=1)


class Prompting(Options):
    prompt_format: PromptFormat = option("auto", "auto: the tokenizer's chat template where it has one.", QUERIES)
    system: str | None = option(
        None,
        "System message of chats that have none of their own, in place of that which the chat template writes.",
        QUERIES,
        metavar="TEXT",
    )
    chat_template_arg: tuple[str, ...] = option(
        (),
        "Give the chat template a value, e.g. enable_thinking=false; may be repeated.",
        QUERIES,
        metavar="NAME=VALUE",
    )


class Reading(Prompting):
    """How rows become queries."""

    reader: Reader = option(
        "auto", "How a row becomes a query: HH dialogues, IMDb reviews (their first words), TL;DR posts.", QUERIES
    )
    query_column: str | None = option(None, "Column of the queries, if neither x, prompt nor messages.", QUERIES)
    prefix_words: int | None = option(None, "Words of a review that are the query (imdb reader).", QUERIES, least=1)
    split: str | None = option(None, "Split of a hub dataset.", QUERIES, place=True)
    max_query_tokens: int = option(256, "Drop longer queries, and count them.", QUERIES, least=1)


class Queries(Reading):
    """Which queries are taken, and in which order."""

    shuffle: bool = option(False, "Take the queries in an order drawn from --seed.", QUERIES)
    skip: int = option(0, "Leave out the first N queries; past the end it starts over.", QUERIES, least=0)
    limit: int | None = option(None, "Take at most N queries.", QUERIES, least=1)
    unit_size: int | None = option(
        None,
        "Queries of one unit of work, which is one file; a round that was begun keeps its own.  "
        "[default: a 64th of the round, but 64 to 2048]",
        QUERIES,
        least=1,
        machine=True,
    )


class Sampling(Options):
    """How responses are sampled."""

    max_new_tokens: int = option(1024, "Longest response.", RESPONSES, least=1)
    temperature: float = option(1.0, "0 takes the likeliest token.", RESPONSES, least=0)
    top_p: float = option(1.0, "Nucleus sampling.", RESPONSES, above=0, most=1)
    top_k: int = option(0, "Take one of the K likeliest tokens; 0: of all.", RESPONSES, least=0, below=2**31)
    min_p: float = option(
        0.0, "Leave out tokens below this share of the likeliest one's probability.", RESPONSES, least=0, most=1
    )
    repetition_penalty: float = option(
        1.0, "Above 1: tokens that prompt and response have become less likely.", RESPONSES, above=0, most=100
    )
    stop: tuple[str, ...] = option((), "Text that ends a response; may be repeated.", RESPONSES)
    logprobs: bool = option(True, "Keep the log-probability of each sampled token.", RESPONSES)


class Thoughts(Options):
    strip_thoughts: str | None = option(
        None,
        "The response y is the answer behind the model's thought; training sees both. think: the marks <think> and "
        "</think>; auto: those of the chat template; else both marks with a space between.",
        RESPONSES,
        metavar="MARKS",
    )


class Engine(Options):
    engine: EngineName | None = option(
        None, "Default: vllm where it is installed, else hf; server where --endpoint is given.", ENGINE
    )
    endpoint: tuple[str, ...] = option(
        (),
        "Address of a running vLLM server (http://host:8000) that samples; may be repeated.",
        ENGINE,
        machine=True,
    )
    engine_arg: tuple[str, ...] = option(
        (), "Pass an option to the engine, e.g. tensor_parallel_size=2; may be repeated.", ENGINE, metavar="NAME=VALUE"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Number type of the weights; auto: bfloat16 where the device computes in it, never float16.", ENGINE
    )


class Spread(Options):
    """Where work is done that several machines or GPUs share."""

    workers: int | None = option(
        None, "Work on N workers of Ray, each with its own GPU where there are some.", MACHINE, least=1, machine=True
    )
    ray: str | None = option(
        None,
        "Address of a cluster of Ray (auto, host:port); else RAY_ADDRESS, else this machine.",
        MACHINE,
        machine=True,
    )


class Asked(Seed, Queries, Sampling, Thoughts, Engine):
    """All that decides which responses are sampled, beside the policy, the principle and the round."""

    samples: int = option(1, "Pairs of responses a query.", RESPONSES, least=1, most=10_000)


class Rewards(Options):
    """How a reward model reads and computes."""

    output_index: int | None = option(None, "Which output of a classifier is the reward.", REWARD, least=0)
    join: Join = option(
        "auto", "How a classifier reads x and y; auto: its chat template where it has one, else one text.", REWARD
    )
    batch_tokens: int | None = option(None, "Tokens of one batch, padding counted.", REWARD, least=1, machine=True)
    reward_device: str = option("auto", "auto: a GPU where there is one, else the CPU.", REWARD, machine=True)
    reward_dtype: Literal["float32", "bfloat16"] = option("float32", "Number type of its weights.", REWARD)
    reward_format: RewardFormat = option(
        "ple", "How a reward model at an address is asked: our own form, or that of another server.", REWARD
    )
    rubric: str | None = option(
        None,
        "What a judge goes by: hh, imdb or tldr (the paper's principles), or a text file.",
        REWARD,
        place=True,
    )
    reward_endpoint: str | None = option(None, JUDGE_SERVER, REWARD, machine=True)
    reward_arg: tuple[str, ...] = option(
        (),
        "Put a field into every request to a judge, e.g. reasoning_effort=low; null leaves one out; may be repeated.",
        REWARD,
        metavar="NAME=VALUE",
    )
    reward_concurrency: int | None = option(
        None,
        "Requests to a reward model that are in flight at once.  [default: 4; judge: 8; of one chat each: 32]",
        REWARD,
        least=1,
        most=1000,
        machine=True,
    )


class Lora(Options):
    lora_rank: int = option(8, "Rank of the LoRA adapter.", MODEL, least=1, most=65_536)
    lora_alpha: float = option(16, "Scale of the LoRA adapter.", MODEL, above=0, most=1_000_000)


class Trainable(Lora):
    """What of the model is trained, and how it computes."""

    full: bool = option(False, "Train all weights instead of an adapter.", MODEL)
    attention: str = option(
        "auto",
        "ple_varlen, ple_packed, or a name of transformers; auto: the cheapest that the model keeps.",
        MACHINE,
        machine=True,
    )
    gradient_checkpointing: bool = option(False, "Less memory, more time.", MACHINE, machine=True)
    shard: bool = option(
        False, "Under torchrun: each process holds a part of every weight, not the whole model.", MACHINE, machine=True
    )


class Steps(Options):
    learning_rate: float = option(1e-4, "AdamW's learning rate.", TRAINING, above=0, most=1e30)
    batch_size: int = option(16, "Pairs of one step, over all processes.", TRAINING, least=1)
    max_grad_norm: float = option(1.0, "Gradient clipping.", TRAINING, above=0)


class Passes(Steps):
    epochs: int = option(1, "Passes over the data.", TRAINING, least=1)
    max_length: int | None = option(None, "Leave out longer rows (token ids), and count them.", TRAINING, least=1)


class Schedule(Options):
    warmup_steps: int = option(0, "Steps of linear warm-up.", TRAINING, least=0)
    schedule: Literal["constant", "cosine"] = option("constant", "Learning rate after the warm-up.", TRAINING)
    weight_decay: float = option(0.0, "AdamW's weight decay.", TRAINING, least=0, most=1000)


class PairObjectives(Options):
    """What pairs are trained by."""

    objective: ObjectiveName = option(
        "ple",
        "The loss on pairs. ple: as the paper prints it. ple-residual --without rank: what we recommend, held "
        "near the start policy by --beta, as most others.",
        METHOD,
    )
    beta: float | None = option(
        None,
        "The objective's brake; larger: nearer the start policy. Of ple-residual and rebel: units of the reward a nat. "
        "Default by objective and form: docs/objectives.md.",
        METHOD,
        above=0,
        most=1e6,
    )
    form: Form | None = option(
        None,
        "Whether an objective with --beta sees log-probabilities of responses (sums) or of a token (means).",
        METHOD,
    )
    label_smoothing: float = option(
        0.0, "Conservative dpo: the share of preferences that may be wrong.", METHOD, least=0, below=0.5
    )


class Safeguards(Options):
    stable: bool = option(False, "Short for --normalize-wsft --trust-region 0.3.", SAFEGUARDS)
    trust_region: float | None = option(
        None,
        "Stop pushing a response whose mean log-probability has drifted this many nats a token.",
        SAFEGUARDS,
        above=0,
    )
    normalize_wsft: bool = option(False, "Divide weighted SFT by the response's length.", SAFEGUARDS)
    sft_anchor: float = option(0.0, "Weight of an SFT term on the better response.", SAFEGUARDS, least=0)


class Computing(Options):
    """How a training fits the machine; of these only the precision changes what is learned."""

    precision: Precision = option("auto", "auto: bf16 on a GPU that computes in it, else float32.", MACHINE)
    microbatch_tokens: int = option(
        8192, "Tokens in memory at once; what is learned does not depend on it.", MACHINE, least=1, machine=True
    )


class Loop(Passes, Schedule, Computing, Seed):
    """What our own training loop is told."""

    checkpoint_every: int = option(100, "Steps between two checkpoints.", MACHINE, least=1, machine=True)


class Written(Options):
    """Where a training's result goes."""

    output: Path = option(MISSING, "Folder of the new adapter.", machine=True)
    resume: bool = option(True, "Go on from what is there, or start over.", MACHINE, machine=True)
    metrics: Path | None = option(
        None, "Parquet file of every step's metrics; in --output if not given.", MACHINE, machine=True
    )


class Tracked(Written):
    """Written, and followed on the way."""

    report_to: Literal["tensorboard", "wandb", "mlflow", "trackio"] | None = option(
        None, "Also report the metrics there.", MACHINE, machine=True
    )
