"""The command line: groups, and one short function a command. Only click is imported, so that --help is instant.

Options come from `schemas.options`, errors and exit codes from `ple_data.common.command`.
"""

import click

from ple_data.common.click_options import SectionedOption, refuse_given
from ple_data.common.command import CONTEXT, command, note_debug, say, version
from schemas import options

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


class _Group(click.Group):
    """Lists the commands in the order in which a user meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Group, context_settings=CONTEXT, epilog=EXIT_CODES)
@version
@click.option("--debug", is_flag=True, expose_value=False, callback=note_debug, help="Show the traceback of an error.")
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


@command("ple-gen", options.Gen, "Sample y and y_prompt to every query.")
def gen(chosen: options.Gen) -> None:
    """Sample a plain and a principle-guided response to every query, and keep them in DATA.

    Finished units are never sampled again: run the same command after any crash. Several processes on the same
    DATA and round share the work.

    \b
    Example:
      ple-gen --model Qwen/Qwen2.5-7B --queries hh.jsonl --principles hh --data data --round 0
    """
    from ple_data.rewards import check_reward_model
    from ple_data.sampling.generate import generate

    if chosen.reward_model is not None:
        check_reward_model(chosen.reward_model, chosen.output_index)
    summary = generate(chosen)
    if summary.dry_run is not None:
        click.echo(summary.dry_run)
    elif chosen.reward_model is not None:
        how = chosen.part(options.Rewards).values()
        _score(options.Score(data=chosen.data, reward_model=chosen.reward_model, round=chosen.round, **how))


@command("ple-score", options.Score, "Score responses with a reward model: pairs.")
def score(chosen: options.Score) -> None:
    """Score responses with a reward model: responses become pairs. Nothing is sampled.

    \b
    Example:
      ple-score --data data --reward-model weqweasdas/RM-Mistral-7B
    """
    _score(chosen)


def _score(chosen: options.Score) -> None:
    from ple_data.rewards import load_reward_model
    from ple_data.scoring.score import score
    from ple_data.storage.store import Store

    reward_model = load_reward_model(chosen.reward_model, chosen)
    output = Store(chosen.output) if chosen.output else None
    score(Store(chosen.data), reward_model, round=chosen.round, output=output)


@command("ple-train", options.Train, "Train the policy on the pairs of all rounds so far.")
def train(chosen: options.Train) -> None:
    """Train the policy on the pairs of all rounds up to T (equation 6), re-partitioned at this round's threshold.

    The output is a standard PEFT adapter, for the next ple-gen and for vLLM. Killed and started again it goes on
    from its last checkpoint.

    \b
    Example:
      ple-train --model Qwen/Qwen2.5-7B --data data --round 0 --output policy/round=000
    """
    from ple_train import train as training

    if chosen.dry_run:
        click.echo(training.dry_run(chosen))
    else:
        training.train(chosen)


@command("sft", options.Sft, "Supervised fine-tuning: makes the start policy.")
def sft(chosen: options.Sft) -> None:
    """Supervised fine-tuning (equation 1), the loss on the response only: makes the start policy.

    \b
    Example:
      ple sft --model Qwen/Qwen2.5-7B --data chosen.jsonl --output sft
    """
    from ple_train.sft import sft as run_sft

    run_sft(chosen)


@command("reward", options.Reward, "Train a reward model from labels or preferences.")
def reward(chosen: options.Reward) -> None:
    """Train a reward model: a classifier from labels, or Bradley-Terry from chosen and rejected responses.

    \b
    Example:
      ple reward --model roberta-base --data labelled.jsonl --output reward
    """
    from ple_train.reward import train_reward

    train_reward(chosen)


@click.group(
    "baseline", cls=_Group, context_settings=CONTEXT, short_help="Another method on the same rows, for comparison."
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


@command("sft", options.BaselineSft, "SFT on the references.")
def baseline_sft(chosen: options.BaselineSft) -> None:
    """SFT (equation 1) on the references that came with the queries, or on the rows of a file.

    \b
    Example:
      ple baseline sft --model Qwen/Qwen2.5-7B --data data --round 0 --output policy/round=000
    """
    from ple_train.baselines.responses import baseline as train_baseline

    train_baseline("sft", chosen)


@command("context-distillation", options.Baseline, "SFT on y_prompt given x alone.")
def context_distillation(chosen: options.Baseline) -> None:
    """SFT on y_prompt given x alone: what the principle did becomes the policy's own. All rounds up to T.

    \b
    Example:
      ple baseline context-distillation --model Qwen/Qwen2.5-7B --data data --round 0 --output policy/round=000
    """
    from ple_train.baselines.responses import baseline as train_baseline

    train_baseline("context-distillation", chosen)


@command("raft", options.Baseline, "SFT on the best response to each query.")
def raft(chosen: options.Baseline) -> None:
    """RAFT: SFT on the response of each query with the highest reward, of round T alone.

    Both arms and all samples compete. For RAFT-4 sample two pairs of plain responses: ple-gen --principles none
    --samples 2.

    \b
    Example:
      ple baseline raft --model Qwen/Qwen2.5-7B --data data --round 0 --output policy/round=000
    """
    from ple_train.baselines.responses import baseline as train_baseline

    train_baseline("raft", chosen)


@command("dpo", options.Dpo, "DPO (TRL) on pairs ranked by the reward.")
def dpo(chosen: options.Dpo) -> None:
    """DPO by TRL's DPOTrainer: the response with the higher reward is chosen. All rounds up to T.

    Pairs with equal rewards are left out. The reference is the start policy: the model without an adapter. Needs
    pip install 'ple-align[trl]'. A killed run starts over.

    \b
    Example:
      ple baseline dpo --model Qwen/Qwen2.5-7B --data data --round 0 --output policy/round=000
    """
    from ple_train.baselines.dpo import dpo as run_dpo

    run_dpo(chosen)


@command("ppo", options.Ppo, "PPO by TRL's PPOTrainer, which samples for itself.")
def ppo(chosen: options.Ppo) -> None:
    """PPO by TRL 1.12.0's PPOTrainer. It samples for itself: queries and a reward model, no rounds.

    The reference is the start policy; the value model is its body with a LoRA adapter of its own. Needs
    pip install 'ple-align[ppo]'. A killed run starts over.

    \b
    Example:
      ple baseline ppo --model Qwen/Qwen2.5-7B --queries hh.jsonl --reward-model weqweasdas/RM-Mistral-7B \\
        --sampled-tokens 1000000 --output ppo
    """
    from ple_train.baselines.ppo import ppo as run_ppo

    run_ppo(chosen)


for _method_command in (baseline_sft, context_distillation, raft, dpo, ppo):
    baseline.add_command(_method_command)


@command("run", options.Run, "Run a whole recipe; goes on where it stopped.")
def run(chosen: options.Run) -> None:
    """Run a whole recipe: reward model and SFT if asked for, then rounds of ple-gen, ple-score and ple-train.

    Each stage is a process of its own. Run the same command again after a stop: it goes on with the stage where it
    was. The run directory keeps the frozen recipe and the record of every stage (stages.json).

    \b
    Example:
      ple run recipes/hh-qwen.yaml --set rounds=3 --dry-run
    """
    from ple_train.run import rounds
    from schemas.recipe import load_recipe

    resolved = load_recipe(chosen.recipe, list(chosen.overrides))
    if chosen.dry_run:
        for stage in rounds.plan(resolved):
            click.echo(stage.shell_line)
    else:
        rounds.run(resolved)


@command("inspect", options.Inspect, "Show DATA by round, or its pairs.")
def inspect(chosen: options.Inspect) -> None:
    """Show what is in DATA: by round the rewards, margins, rank set, lengths, and any warning.

    \b
    Example:
      ple inspect data --sort margin --rows 5
    """
    from ple_data.inspection import inspect as show

    click.echo(show(**chosen.values()))


@command("judge", options.Judge, "Win rates of A against B: LLM, reward model, people.")
def judge(chosen: options.Judge) -> None:
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
    from ple_data.judge.judge import run

    click.echo(run(chosen))


@command("export", options.Export, "Write the pairs for other tools.")
def export(chosen: options.Export) -> None:
    """Write the pairs of DATA for other tools.

    Pairs with equal rewards prefer nothing: trl-preference counts them and leaves them out.

    \b
    Example:
      ple export data --format trl-preference --output preferences.jsonl
    """
    from ple_data.export import export as run_export

    run_export(**chosen.values())


@command("verify", options.Verify, "Check every shard of DATA.")
def verify(chosen: options.Verify) -> None:
    """Check every shard of DATA (hash, schema, rows, duplicates, orphans) and say what to do. Exit code 3 if not whole.

    \b
    Example:
      ple verify data
    """
    from ple_data.storage.verify import check

    for finding in check(chosen.data):
        click.echo(str(finding))
    say(f"{chosen.data}: whole")


def _point_to_policy(_: click.Context, option: click.Parameter, given: str | None) -> None:
    if given is not None:
        raise click.UsageError(
            f"{option.opts[0]}: policies have names here: give --policy NAME=MODEL or --policy NAME=MODEL,ADAPTER for "
            "each, e.g. --policy base=M --policy tuned=M,A"
        )


def _not_here(name: str) -> click.Parameter:
    """An option of other commands in whose place this one has --policy."""
    return SectionedOption([name], hidden=True, expose_value=False, callback=_point_to_policy)


@command(
    "eval",
    options.Evaluate,
    "Compare policies: rewards, perplexity, BLEU, length.",
    _not_here("--model"),
    _not_here("--adapter"),
)
def evaluate(chosen: options.Evaluate) -> None:
    """Compare policies on the same queries: rewards, perplexity, BLEU, length, distinct words, with 95 % intervals.

    The first policy is what the others are compared with. Nothing is sampled or scored twice: run the same command
    after any crash, or with more policies and reward models.

    \b
    Example:
      ple eval --policy sft=run/sft --policy ple=run/sft,run/policy/round=004 --queries unseen.jsonl \\
          --reward-model run/reward --trained-with run/reward --reward-model judge.py:score --output eval
    """
    from ple_data.evaluation.table import format_report
    from ple_train.measure.evaluate import evaluate as measure

    if chosen.data:
        refuse_given(["Queries", "Sampling", "Engine"], "with --data, which takes responses as they are")
    report = measure(chosen)
    click.echo(report.to_json().rstrip() if chosen.as_json else format_report(report))


@command(
    "cases", options.Cases, "Several policies' answers side by side.", _not_here("--model"), _not_here("--adapter")
)
def cases(chosen: options.Cases) -> None:
    """Answer harmful and everyday queries with several policies and show the answers side by side.

    \b
    Example:
      ple cases --policy sft=run/sft --policy ple=run/sft,run/policy/round=004 --queries cases.jsonl --output cases
    """
    from ple_data.evaluation.cases import cases as answer

    click.echo(answer(chosen))


@command("purity", options.Purity, "Does the policy rank y_prompt as the reward does?")
def purity(chosen: options.Purity) -> None:
    """Measure Section 5 of the paper: does the policy rank y_prompt above y where the reward does?

    By policy: agreement with the reward by margin, the smallest e whose level set is pure at 100, 95 and 90 %, and
    Theorem 5.3's bound. Log-probabilities are kept by policy and shard: run the same command again after a stop, or
    after more rounds.

    \b
    Example:
      ple purity --run runs/hh-qwen
    """
    from ple_train.measure.purity import purity as measure

    click.echo(measure(chosen))


@command("report", options.Report, "One HTML page about a run.")
def report(chosen: options.Report) -> None:
    """Make one self-contained HTML page about a run (or a DATA folder): figures, tables and a browser of pairs.

    The page needs no network and no server, prints well, and follows the reader's light or dark theme.

    \b
    Example:
      ple report runs/hh-qwen --eval eval --judge judge
    """
    from ple_data.report.page import report as write

    click.echo(write(**chosen.values()))


@command("demo", options.Demo, "See PLE work on a toy world in minutes.")
def demo(chosen: options.Demo) -> None:
    """See PLE work on a toy world of film reviews: nothing to download, a few minutes on two cores.

    \b
    Example:
      ple demo
    """
    from ple_train.demo.demo import demo as run_demo

    click.echo(run_demo(chosen.output, rounds=chosen.rounds))


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
