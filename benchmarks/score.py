"""How fast is scoring? Our classifier reward against a loop of padded batches in arrival order, same model and rows.

python -m benchmarks.score --rows 256
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.side_by_side import made_with, ratio_table, seconds_of, timed_in_turns

BATCH = 32
UNIT = 128
"""Texts that `ple-score` hands to the reward model at once: both responses to 64 queries."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--response", type=int, default=66, help="median words of y; their lengths are log-normal")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    import torch

    from ple_data.rewards import load_reward_model

    torch.set_num_threads(options.threads)
    rows = random_rows(options.rows, options.response)
    with tempfile.TemporaryDirectory() as folder:
        model = write_reward_model(Path(folder), options.hidden, options.layers, [x + y for x, y in rows])
        ours, peer = load_reward_model(str(model)), ArrivalOrder(model)
        worst = float(np.abs(np.array(ours.score(rows)) - np.array(peer.score(rows))).max())

        def by_unit() -> None:
            for first in range(0, len(rows), UNIT):
                ours.score(rows[first : first + UNIT])

        contenders = {
            "ours": partial(seconds_of, by_unit),
            "arrival order": partial(seconds_of, partial(peer.score, rows)),
        }
        seconds = timed_in_turns(contenders, options.repeats)
    print(f"{len(rows)} rows; largest difference of a reward {worst:.1e}; {made_with('torch', 'transformers')}")
    print(ratio_table(seconds, len(rows), "rows"))


def random_rows(count: int, median: int) -> list[tuple[str, str]]:
    numbers = np.random.default_rng(0)

    def words(median: int) -> str:
        length = int(np.clip(numbers.lognormal(np.log(median), 0.7), 2, 500))
        return " ".join(f"word{n}" for n in numbers.integers(0, 2000, length))

    return [(words(33), " " + words(median)) for _ in range(count)]


def write_reward_model(directory: Path, hidden: int, layers: int, corpus: list[str]) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from ple_train.demo.scratch import train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer(corpus, 8192)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForSequenceClassification(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


class ArrivalOrder:
    """What a script does: batches as the rows come, padded to their longest."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForSequenceClassification.from_pretrained(model).eval()

    def score(self, rows: list[tuple[str, str]]) -> list[float]:
        import torch

        rewards: list[float] = []
        with torch.inference_mode():
            for first in range(0, len(rows), BATCH):
                texts = [x + y for x, y in rows[first : first + BATCH]]
                batch = self.tokenizer(texts, padding=True, return_tensors="pt")
                rewards += self.model(**batch).logits[:, 0].tolist()
        return rewards


if __name__ == "__main__":
    main()
