"""The options of every command: the groups that it takes, and its own, each stated once."""

from dataclasses import MISSING
from pathlib import Path
from typing import Literal

from schemas.options.combination import RULES, Combination, combination
from schemas.options.form import Options, option
from schemas.options.groups import *

LLM, PEOPLE, TEST = "Language model", "People", "Test"
HUB_OR_FILE = "Queries: Parquet, JSONL, JSON, CSV or a hub dataset id."
PAIRS_DATA = "Folder of pairs; may be repeated."


class Stores(Options):
    """The pairs that a training sees."""

    data: tuple[Path, ...] = option(MISSING, PAIRS_DATA, place=True)
    round: int = option(MISSING, "Round T, counted from 0.", least=0, most=2**31 - 1)


class Scored(Options):
    """What scores responses, of a kind that is stated in docs/rewards.md."""

    reward_model: tuple[str, ...] = option(
        MISSING,
        "Classifier (directory or hub id; MODEL[1] for one of its outputs), file.py:function, module:function, "
        "http(s)://address, or judge:MODEL; may be repeated.",
    )
    combine: str = option(
        "mean",
        f"How several rewards become one: {RULES}.",
        REWARD,
        metavar="RULE",
    )
    normalize_rewards: bool = option(
        False,
        "First take from each reward its mean over the round's responses, and divide by their standard deviation.",
        REWARD,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.combination()

    def combination(self) -> Combination | None:
        """How several rewards are put together; None where there is one. Raises UsageError."""
        return combination(self.combine, len(self.reward_model), self.normalize_rewards)


class Gen(Policy, Asked, Spread, Rewards, Scored):
    queries: str = option(MISSING, HUB_OR_FILE, place=True)
    principles: str | None = option(MISSING, "hh, imdb or tldr (the paper's), a text file, or none (an ablation).")
    principle_form: PrincipleForm = option(
        "add",
        "add: in front of the system message that a chat template writes by itself; replace: in place of it.",
        QUERIES,
    )
    reward_model: tuple[str, ...] = option(
        (), "Score the responses as well, as ple-score does; without it, stop after sampling; may be repeated."
    )
    data: Path = option(MISSING, "Folder of the responses and pairs.", machine=True)
    round: int = option(MISSING, "Round T, counted from 0.", least=0, most=2**31 - 1)
    reuse: tuple[Path, ...] = option(
        (),
        "Take rows of this DATA where policy, query, principle and sampling match; may be repeated.",
        RESPONSES,
        machine=True,
    )
    dry_run: bool = option(
        False,
        "Show one rendered prompt of each arm with its token ids; sample nothing.",
        names="--dry-run",
        machine=True,
    )


class Score(Spread, Rewards, Scored):
    data: Path = option(MISSING, "Folder of the responses.", machine=True)
    reward_endpoint: str | None = option(None, JUDGE_SERVER, REWARD, names="--reward-endpoint --endpoint", machine=True)
    round: int | None = option(None, "Score this round only.", least=0)
    output: Path | None = option(
        None, "Write the pairs to another DATA, so that two reward models stay apart.", machine=True
    )


class Train(Policy, Stores, Threshold, PairObjectives, Safeguards, Loop, Trainable, Tracked):
    without: Without | None = option(
        None,
        "Leave out a term of ple or ple-residual. rank: every pair is weighted SFT; wsft: rank pairs alone.",
        METHOD,
    )
    dry_run: bool = option(
        False, "Show rows, margins and the partition by round; train nothing.", names="--dry-run", machine=True
    )


class Sft(Model, Prompting, Loop, Trainable, Tracked):
    data: Path = option(MISSING, "Rows with x and y (or prompt and response).", place=True)
    output: Path = option(MISSING, "Folder of the new model.", machine=True)
    merge: bool = option(True, "Merge the adapter into the model, or keep it apart.")
    batch_size: int = option(32, "Rows of one step, over all processes.", TRAINING, least=1)


class RewardTraining(Loop, Tracked):
    """What of `ple reward` decides what is learned, or how."""

    model: str = option(None, "Model to train: a directory or a hub id.", place=True)
    revision: str | None = option(None, "Branch, tag or commit of a hub model.", place=True)
    data: Path = option(None, "Rows with text and label, or with prompt, chosen and rejected.", place=True)
    output: Path = option(None, "Folder of the reward model; of a judge under --eval, of its answers.", machine=True)
    learning_rate: float = option(5e-5, "AdamW's learning rate.", TRAINING, above=0, most=1e30)
    batch_size: int = option(32, "Rows of one step, over all processes.", TRAINING, least=1)
    max_length: int = option(512, "Keep the last N token ids.", TRAINING, least=1)
    lora_rank: int | None = option(
        None, "Train a LoRA adapter of this rank and the head, merged at the end; else all weights.", MODEL, least=1
    )
    lora_alpha: float = option(16, "Scale of the LoRA adapter.", MODEL, above=0, most=1_000_000)


class RewardTest(Rewards):
    test: Path | None = option(
        None,
        "Print how often the model is right on these held-out rows, beside the rule 'longer wins'.",
        TEST,
        machine=True,
    )
    group: str | None = option(
        None, "Print it by this column of --test as well; subset, where it has one.", TEST, machine=True
    )
    as_json: bool = option(False, "Print it as one JSON object.", TEST, names="--json", machine=True)


class Reward(RewardTraining, RewardTest):
    measured: str | None = option(
        None,
        "Measure this reward model (as --reward-model of ple-score) on --test, and train nothing.",
        TEST,
        names="--eval",
        metavar="MODEL",
        machine=True,
    )


class Baseline(Policy, Stores, Loop, Trainable, Tracked):
    batch_size: int = option(16, "Responses of one step, over all processes.", TRAINING, least=1)


class ContextDistillation(Baseline):
    on_policy: bool = option(
        False,
        "Reverse KL to the start policy under the principle on the plain responses of round T, or SFT on y_prompt.",
        METHOD,
    )


class BaselineSft(Prompting, Baseline):
    data: tuple[Path, ...] = option(
        MISSING,
        "Folder of pairs whose queries came with references, or a file of (x, y) rows; may be repeated.",
        place=True,
    )
    round: int = option(None, "Round T of a folder: its pairs of rounds up to T.", least=0, most=2**31 - 1)


class Dpo(Policy, Stores, Seed, Passes, Lora, Computing, Written):
    via: Literal["ple", "trl"] | None = option(
        None,
        "ple: our own loop, as ple-train --objective dpo; trl: TRL's DPOTrainer, which starts over after a kill.  "
        "[default: ple, or what --output was made with]",
        METHOD,
        machine=True,
    )
    beta: float = option(0.1, "Weight of the log-ratio to the start policy.", METHOD, above=0)
    batch_size: int = option(16, "Pairs of one step.", TRAINING, least=1)
    gradient_checkpointing: bool = option(False, "Less memory, more time.", MACHINE, machine=True)


class Ppo(Policy, Seed, Reading, Thoughts, Steps, Lora, Rewards, Computing, Written):
    queries: str = option(MISSING, HUB_OR_FILE, place=True)
    reward_model: str = option(
        MISSING,
        "Classifier (directory or hub id), file.py:function, module:function, http(s)://address, or judge:MODEL.",
    )
    sampled_tokens: int = option(MISSING, "Stop with the step that has sampled so many tokens.", least=1)
    max_new_tokens: int = option(1024, "Longest response.", RESPONSES, least=1)
    temperature: float = option(1.0, "Of the responses it trains on.", RESPONSES, above=0)
    resume: bool = option(True, "Keep a finished --output, or start over.", MACHINE, machine=True)
    kl_coef: float = option(0.05, "Penalty for leaving the start policy.", METHOD, least=0)
    ppo_epochs: int = option(4, "Passes over each batch of responses.", METHOD, least=1)
    batch_size: int = option(64, "Responses of one step.", TRAINING, least=1)
    microbatch_tokens: int = option(
        8192, "Tokens in memory at once; TRL samples and averages by these, so it matters a little.", MACHINE, least=1
    )


class Run(Options):
    recipe: Path = option(MISSING, "The recipe, a YAML file.", positional=True)
    overrides: tuple[str, ...] = option(
        (), "Change a key, e.g. train.epochs=2; may be repeated.", names="--set", metavar="KEY=VALUE"
    )
    dry_run: bool = option(False, "Print the commands as shell lines; start nothing.", names="--dry-run")


class Inspect(Threshold):
    data: Path = option(MISSING, "Folder of pairs.", positional=True)
    sort: Literal["margin"] | None = option(None, "Show pairs, the largest margin first.")
    rows: int = option(0, "Show this many pairs.", least=0)
    as_json: bool = option(False, "Print one JSON object.", names="--json")
    beta: float | None = option(
        None, "Say where the median margin comes to rest under ple-residual and rebel.", METHOD, above=0, most=1e6
    )


class Judge(Rewards):
    a: str = option(MISSING, "Responses of A.", positional=True)
    b: str = option(MISSING, "Responses of B.", positional=True)
    spec: str | None = option(
        None,
        "openai:MODEL, anthropic:MODEL or reward:SPEC (as --reward-model of ple-score).",
        names="--judge",
        metavar="SPEC",
    )
    human: bool = option(
        False, "Write a page on which people compare blindly, instead of asking a judge.", names="--human"
    )
    output: Path = option(MISSING, "Folder of the verdicts, or of the page.")
    limit: int | None = option(None, "Judge at most N queries, drawn by --seed.", least=1)
    seed: int | None = option(
        None, "Seed of everything that is drawn. Default: 0; a page's order and sides are drawn at random.", least=0
    )
    endpoint: str | None = option(
        None, "Address of an OpenAI-compatible or Anthropic-compatible server, up to and with /v1.", LLM
    )
    template: Path | None = option(None, "File of the question with {query}, {response_1} and {response_2}.", LLM)
    concurrency: int = option(8, "Requests in flight at once.", LLM, least=1, most=1000)
    request_args: tuple[str, ...] = option(
        (),
        "Put a field into every request, e.g. reasoning_effort=low; null leaves one out; may be repeated.",
        LLM,
        names="--request-arg",
        metavar="NAME=VALUE",
    )
    exports: tuple[Path, ...] = option(
        (), "Read an annotator's export, or a folder of them, back; may be repeated.", PEOPLE, names="--read"
    )
    label_studio: Path | None = option(
        None, "Also write the tasks for Label Studio here (JSON), and its labelling config.", PEOPLE
    )


class Export(Options):
    data: Path = option(MISSING, "Folder of pairs.", positional=True)
    format: Literal["trl-preference", "trl-kto", "distilabel", "argilla", "sft", "messages", "alpacaeval"] = option(
        MISSING,
        "prompt, chosen, rejected; prompt, completion, label; generations with ratings; records to annotate; prompt, "
        "completion (the best response); the same as chat; instruction, output.",
    )
    round: int | None = option(None, "This round only; alpacaeval: the newest if not given.", least=0)
    output: str = option(MISSING, "File: .jsonl or .parquet (alpacaeval: .json), or - for stdout.")


class Import(Model, Prompting):
    files: tuple[str, ...] = option(
        MISSING,
        "Preferences of TRL, Online-RLHF or distilabel: Parquet, JSONL, JSON, CSV or a hub dataset id.",
        positional=True,
        metavar="FILE...",
    )
    data: Path = option(MISSING, "Folder that takes the rows.", positional=True)
    round: int = option(0, "Round that the rows become.", least=0, most=2**31 - 1)
    scored_by: str | None = option(
        None,
        "Name of what gave the scores, so that several imports of its scores share DATA.  "
        "[default: imported, with a digest of the files]",
    )


class Push(Options):
    source: Path = option(
        MISSING,
        "Folder of pairs, an adapter or model that ple trained, or a run (its newest policy).",
        positional=True,
        metavar="DATA|ADAPTER|RUN",
    )
    to: str = option(MISSING, "Repository on the hub; made where it is not there.", metavar="OWNER/NAME")
    license: str | None = option(None, "Licence that the card names, as the hub writes it: apache-2.0, cc-by-4.0, ...")
    base_model: str | None = option(None, "The adapter's base model on the hub, where it was a folder here.")
    eval: Path | None = option(None, "Folder of ple eval for the card. Default: RUN/eval where it is there.")
    private: bool = option(True, "Only you and those you name see it, or everybody.")
    dry_run: bool = option(False, "Show the files, their sizes and the card; send nothing.", names="--dry-run")


class Verify(Options):
    data: Path = option(MISSING, "Folder of responses and pairs.", positional=True)


class Judged(Rewards):
    """Several reward models, of which some trained a policy."""

    reward_model: tuple[str, ...] = option(
        (),
        "Classifier (one of its outputs: MODEL[1]), file.py:function, module:function, http(s)://address or "
        "judge:MODEL; may be repeated.",
        REWARD,
    )
    trained_with: tuple[str, ...] = option(
        (), "The --reward-model that trained a policy: it is marked; may be repeated.", REWARD
    )


class Answering(Asked):
    """How several policies are asked the same queries."""

    policy: tuple[str, ...] = option(
        MISSING,
        "A policy and its name in the tables; may be repeated. A hub id may end with @ and a revision.",
        metavar="NAME=MODEL[,ADAPTER]",
    )
    logprobs: bool = option(False, "Not kept.", RESPONSES, offered=False)


class Evaluate(Answering, Judged, Computing):
    queries: str | None = option(None, "Queries to sample responses to: Parquet, JSONL, JSON, CSV or a hub dataset id.")
    data: tuple[Path, ...] = option((), "Take each policy's plain responses from this DATA; may be repeated.")
    round: int | None = option(None, "Take those of this round only.", least=0)
    output: Path = option(MISSING, "Folder of the results, and of all that is kept for a rerun.")
    references: str | None = option(
        None, "File with id and reference, or a column of the queries; else what the reader finds beside a query."
    )
    samples: int = option(1, "Responses a query.", RESPONSES, least=1, most=10_000)
    precision: Precision = option(
        "auto", "Of perplexity and KL; auto: bf16 on a GPU that computes in it, else float32.", MACHINE
    )
    microbatch_tokens: int = option(
        8192,
        "Tokens of perplexity and KL in memory at once; their values do not depend on it.",
        MACHINE,
        least=1,
        machine=True,
    )
    as_json: bool = option(False, "Print the report as one JSON object.", names="--json")


class Cases(Answering, Judged):
    queries: str = option(MISSING, "Rows with query, x or prompt, and id and kind where there are any.")
    output: Path = option(MISSING, "Folder of cases.parquet, and of all that is kept for a rerun.")
    samples: int = option(1, "Responses a query.", RESPONSES, offered=False)


class Purity(Computing):
    run: Path | None = option(None, "Directory of ple run: its start policy and that of every round, and its data.")
    model: str | None = option(None, "Start policy: a directory or a hub id. Instead of --run.")
    revision: str | None = option(None, "Branch, tag or commit of a hub model.")
    adapter: tuple[str, ...] = option((), "LoRA adapter of a later policy, in the order of training; may be repeated.")
    data: tuple[Path, ...] = option((), "Folder of pairs; may be repeated. Default: RUN/data.")
    round: tuple[int, ...] = option((), "Take the pairs of this round only; may be repeated.", least=0)
    output: Path | None = option(None, "Folder of the results. Default: RUN/purity.")
    microbatch_tokens: int = option(8192, "Tokens in memory at once.", MACHINE, least=1, machine=True)
    normalized: bool = option(
        False, "Compare mean log-probabilities of a token, or sums as in the paper.", names="--normalized/--sum"
    )


class Report(Options):
    run: Path = option(MISSING, "Directory of ple run, or a DATA folder.", positional=True)
    evals: tuple[Path, ...] = option((), "Folder of ple eval; may be repeated.", names="--eval")
    judges: tuple[Path, ...] = option((), "Folder of ple judge; may be repeated.", names="--judge")
    purity: Path | None = option(None, "Folder of ple purity. Default: RUN/purity where it is there.")
    cases: Path | None = option(None, "Folder of ple cases.")
    output: Path | None = option(
        None, "The page; NAME-figures/ beside it takes the PNG files. Default: RUN/report.html."
    )
    watch: bool = option(False, "Write nothing: serve the page on this machine, with all pairs, and follow the run.")
    port: int | None = option(None, "Port of --watch; 0 takes any free one. Default: 8765.", least=0, most=65535)
    tau0: float | None = option(None, "Threshold of round 0. Default: the recipe's, else 0.2.", METHOD, least=0)
    alpha: float | None = option(
        None, "Decay of the threshold. Default: the recipe's, else 0.9.", METHOD, above=0, below=1
    )


class Convert(Options):
    gguf: Path = option(MISSING, "The GGUF file.", positional=True)
    output: Path = option(MISSING, "Folder of the model; it must not be there yet.", positional=True)


class Demo(Options):
    output: Path | None = option(
        None, "Folder of everything that the demo makes.  [default: demo; demo-real with --real]"
    )
    rounds: int | None = option(None, "Rounds of PLE.  [default: 3; 2 with --real]", least=1, most=10_000)
    real: bool = option(
        False, "A pretrained model of 135M parameters and lexicons, from Python packages.", names="--real"
    )
