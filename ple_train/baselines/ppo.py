"""`ple baseline ppo`: TRL's PPOTrainer with any of our reward models, up to a budget of sampled tokens.

PPO samples for itself, so it takes queries and a reward model instead of a store, and has no rounds. The reference is
the start policy: the model with its adapter off. The value model is the start policy's body with a LoRA adapter of its
own and a linear head. A killed run starts over: TRL's checkpoints are pickles, which this project does not read.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ple_data.common.models import check_model, load_tokenizer, positions_of, refuse_unknown, vocabulary_of
from ple_data.common.progress import Progress
from ple_data.common.tokens import text_after
from ple_data.inputs.chat import to_text
from ple_data.inputs.principles import Form, render_all
from ple_data.inputs.queries import load_queries
from ple_data.inputs.templates import instructed, response_form, uses_chat
from ple_data.rewards import RewardModel, as_read, load_reward_model, recorded_spec
from ple_data.sampling.thoughts import Thoughts
from ple_train.baselines import trl_tools
from ple_train.engine.checkpoint import History
from ple_train.engine.session import Session
from ple_train.log import print_to_log
from ple_train.model.policy import switch_off_dropout
from ple_train.reward import load_classifier
from schemas.errors import PleError, UsageError
from schemas.options import Ppo


def ppo(options: Ppo) -> None:
    """Proximal Policy Optimization (Schulman et al. 2017; for language models Ziegler et al. 2019); writes `output`.

    Samples `batch_size` responses a step to the queries in shuffled order, until `sampled_tokens` response tokens have
    been sampled: the step that reaches them is the last. Each batch is trained on `ppo_epochs` times. `kl_coef` weighs
    the penalty per token for leaving the start policy.
    Raises UsageError, LockedError (another process writes `output`), PleError (a loss or reward that is not finite).
    """
    version = trl_tools.require_trl("ppo")
    check_model(options.model)
    tokenizer = instructed(load_tokenizer(options.model, options.revision, note=print_to_log), options)
    query_set = load_queries(options.queries, options, chat=uses_chat(tokenizer, options.prompt_format))
    xs = [query.x for query in query_set.queries]
    rendered = zip(render_all(tokenizer, xs, how=Form(options.prompt_format)), xs, strict=True)
    texts = {tuple(ids): to_text(x) for ids, x in rendered if len(ids) <= options.max_query_tokens}
    if len(texts) < options.batch_size:
        raise UsageError(
            f"{options.queries} has {len(texts)} different queries of at most {options.max_query_tokens} tokens, fewer "
            f"than one batch; lower --batch-size ({options.batch_size}) or raise --max-query-tokens"
        )
    rewards = load_reward_model(options.reward_model, options)
    more = {"method": "ppo", "trl": version, "queries_digest": query_set.digest, "reward": rewards.name}
    recorded = options.but(reward_model=recorded_spec(options.reward_model))
    with Session("baseline", recorded, more=more) as session:
        trl_tools.refuse_many_processes(session.accelerator)
        if session.finished:
            return
        print_to_log(f"ppo: {len(texts)} queries, {options.sampled_tokens:,} tokens to sample")
        policy = session.load_causal_lm()
        refuse_unknown(texts, vocabulary_of(policy.config), options.model)
        longest = max(map(len, texts)) + options.max_new_tokens
        positions = positions_of(policy.config)
        if positions is not None and longest > positions:
            raise UsageError(
                f"the longest query and --max-new-tokens are {longest} tokens together, over the {positions} positions "
                f"of {options.model}; lower --max-new-tokens or --max-query-tokens"
            )
        chat = uses_chat(tokenizer, options.prompt_format)
        texts = dict(zip(texts, as_read(rewards, list(texts.values()), chat=chat), strict=True))
        end = response_form(tokenizer, options.prompt_format).end
        thoughts = Thoughts(tokenizer, options.strip_thoughts) if options.strip_thoughts is not None else None
        scorer = RewardScorer(rewards, session.load_tokenizer(), end, texts, thoughts)
        batching = trl_tools.micro_batching(options.batch_size, options.microbatch_tokens // longest)
        scratch = session.private / "trl"
        arguments = trl_tools.training_arguments(scratch, options) | batching
        arguments |= {
            "local_rollout_forward_batch_size": batching["per_device_train_batch_size"],
            "num_sample_generations": 0,
            "total_episodes": options.sampled_tokens,
            "num_ppo_epochs": options.ppo_epochs,
            "kl_coef": options.kl_coef,
            "temperature": options.temperature,
            "response_length": options.max_new_tokens,
            "stop_token": "eos",
        }
        with trl_tools.quiet_trl():
            value = value_model(options)
            ended = copy.deepcopy(tokenizer)  # TRL knows one end of a response: the EOS
            ended.eos_token = ended.convert_ids_to_tokens(end)
            history = _train(policy, value, scorer, ended, options.sampled_tokens, arguments)
        shutil.rmtree(scratch, ignore_errors=True)
        trained = options.ppo_epochs * scorer.tokens
        session.finish(policy, history, "ppo", sampled={None: scorer.tokens}, trained=trained)


class RewardScorer(nn.Module):
    """One of our reward models in the shape of the sequence classifiers that TRL's PPO scores with.

    TRL hands over ids of [query, response], padded on both sides, and reads one number at the response's end: the
    backbone here decodes the response, asks the reward model, and gives its number at every position. `tokens` counts
    the response tokens that were scored, each response's end included.
    """

    base_model_prefix = "backbone"

    def __init__(
        self,
        rewards: RewardModel,
        tokenizer: Any,
        end: int,
        texts: Mapping[tuple[int, ...], str],
        thoughts: Thoughts | None = None,
    ) -> None:
        """end: the id that ends a response; texts: x as the reward model reads it, by the token ids of x."""
        super().__init__()
        self.rewards, self.tokenizer, self.end, self.texts, self.thoughts = rewards, tokenizer, end, texts, thoughts
        self.lengths = sorted({len(ids) for ids in texts})
        self.tokens = 0
        self.score = nn.Identity()

    def backbone(self, input_ids: Tensor, attention_mask: Tensor, **unused: Any) -> SimpleNamespace:
        """input_ids, attention_mask [b, n] → hidden_states of one layer, [b, n, 1]."""
        rows = [(row.tolist(), mask.tolist()) for row, mask in zip(input_ids, attention_mask.bool(), strict=True)]
        starts = [mask.index(True) for _, mask in rows]
        width = self._query_width([ids for ids, _ in rows], starts)
        pairs = []
        for (ids, mask), start in zip(rows, starts, strict=True):
            end = mask.index(False, width) if False in mask[width:] else len(mask)
            self.tokens += end - width
            x_ids, y_ids = tuple(ids[start:width]), ids[width:end]
            said = y_ids[:-1] if y_ids and y_ids[-1] == self.end else y_ids
            y = text_after(self.tokenizer, x_ids, said)
            pairs.append((self.texts[x_ids], self.thoughts.of(x_ids, said, y).answer if self.thoughts else y))
        values = self.rewards.score(pairs)
        for (x, _), value in zip(pairs, values, strict=True):
            if not math.isfinite(value):
                raise PleError(f"reward model {self.rewards.name} gave {value} to a response to the query {x[:80]!r}")
        scores = torch.tensor(values, dtype=torch.float32, device=input_ids.device)
        return SimpleNamespace(hidden_states=(scores[:, None, None].expand(*input_ids.shape, 1),))

    def _query_width(self, rows: Sequence[list[int]], starts: Sequence[int]) -> int:
        """Where the responses begin, the same in all rows: every row must hold a query up to there."""
        found = [
            {start + n for n in self.lengths if tuple(ids[start : start + n]) in self.texts}
            for ids, start in zip(rows, starts, strict=True)
        ]
        return max(set.intersection(*found))  # a query may begin with another one


def value_model(options: Ppo) -> Any:
    """The critic: the start policy's body with a fresh LoRA adapter, and a linear head to one number a token."""
    from peft import LoraConfig, inject_adapter_in_model

    critic = load_classifier(options, 1)
    config = LoraConfig(r=options.lora_rank, lora_alpha=cast(int, options.lora_alpha), target_modules="all-linear")
    inject_adapter_in_model(config, getattr(critic, critic.base_model_prefix))
    switch_off_dropout(critic)
    return critic


def with_own_pad(tokenizer: Any, policy: Any, queries: Sequence[tuple[int, ...]]) -> Any:
    """A tokenizer whose pad token has a row in the embedding and is not its EOS: TRL's PPO tells padding by its id, and
    would lose every end.

    Where there is none, the vocabulary's token that the start policy expects least stands in (of those in no query).
    """
    size = min(len(tokenizer), policy.get_output_embeddings().weight.shape[0])
    if tokenizer.pad_token_id != tokenizer.eos_token_id and tokenizer.pad_token_id < size:
        return tokenizer
    used = {token for ids in queries for token in (*ids, *tokenizer.all_special_ids) if token < size}
    likelihood = torch.zeros(size)
    with torch.no_grad(), policy.disable_adapter():
        for ids in queries[:32]:
            logits = policy(input_ids=torch.tensor([ids], device=policy.device)).logits[0]
            likelihood += logits.float().softmax(-1).amax(0)[:size].cpu()
    likelihood[list(used)] = torch.inf
    own = copy.deepcopy(tokenizer)
    own.pad_token = tokenizer.convert_ids_to_tokens(int(likelihood.argmin()))
    print_to_log(f"note: the tokenizer pads with its EOS; PPO pads with {own.pad_token!r} instead, which is unlikely")
    return own


def _train(
    policy: Any, value: Any, scorer: RewardScorer, tokenizer: Any, budget: int, arguments: dict[str, Any]
) -> History:
    """Run TRL's trainer until the budget is spent, in place → metrics of every step."""
    from datasets import Dataset
    from transformers import GenerationConfig, set_seed
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    queries = list(scorer.texts)
    padded = with_own_pad(tokenizer, policy, queries)
    # generate() fills what a call leaves open from here: a model's own sampling defaults must not slip in
    policy.generation_config = GenerationConfig(pad_token_id=padded.pad_token_id, eos_token_id=padded.eos_token_id)
    rows = Dataset.from_dict({"input_ids": [list(ids) for ids in queries]})

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in batch)
        ids = [[padded.pad_token_id] * (width - len(row["input_ids"])) + row["input_ids"] for row in batch]
        return {"input_ids": torch.tensor(ids)}

    set_seed(arguments["seed"])  # TRL's loop draws from numpy and seeds it nowhere
    make_trainer: Any = PPOTrainer  # its signature asks for classes where it uses what they do
    trainer = make_trainer(
        args=trl_tools.one_device(PPOConfig(**arguments)),
        processing_class=padded,
        model=trl_tools.with_float32_logits(policy),
        ref_model=None,
        reward_model=scorer,
        train_dataset=rows,
        eval_dataset=rows.select([0]),
        value_model=value,
        data_collator=collate,
    )
    optimizer = trainer.optimizer.optimizer
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(weights, trainer.args.max_grad_norm) and None)
    # else the last batch of a pass over the queries would take a step after every micro-batch
    trainer.accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
    trainer.accelerator.print = lambda *_: None  # a banner
    progress = Progress("sampling and training", budget, "tokens")
    return trl_tools.run_trainer(trainer, progress, lambda: scorer.tokens, budget)
