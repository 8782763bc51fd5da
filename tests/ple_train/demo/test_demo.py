"""The toy world and `ple demo`, the same job in small."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import cli
from ple_data.evaluation.intervals import bootstrap_mean
from ple_train.demo import demo as demo_room
from ple_train.demo import toyworld
from ple_train.measure.perplexity import perplexity
from ple_train.measure.sample import sample_responses
from ple_train.run import rounds
from ple_train.run.child import Ended


def test_grammar_judges_its_own_reviews() -> None:
    for review in itertools.islice(toyworld.reviews(3, toyworld.openings()), 200):
        verdict = toyworld.grade(review.body)
        assert verdict.grammatical == 1
        assert verdict.polarity == pytest.approx(review.polarity)


def test_grammar_judges_other_texts() -> None:
    assert toyworld.grade("  ") == toyworld.Verdict(0.0, 0.0)
    assert toyworld.grade(" The cast was superb. The cast was cast. I hated the music") == toyworld.Verdict(
        1 / 3, 1 / 3
    )
    assert toyworld.grade(" Ten out of ten. Not recommended.") == toyworld.Verdict(0.0, 1.0)


def test_world_is_balanced_and_a_function_of_its_seed() -> None:
    first, second = (list(itertools.islice(toyworld.reviews(5, ["I saw."]), 2000)) for _ in range(2))
    assert first == second
    assert abs(np.mean([review.polarity for review in first])) < 0.05
    praise, blame, told = (set(toyworld.sentences(polarity)) for polarity in (1, -1, 0))
    assert not praise & blame
    assert not (praise | blame) & told


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    """95 % intervals of 60 normal draws, 300 times: 0.95 +- 4 standard deviations of a binomial share."""
    generator = np.random.default_rng(0)
    intervals = [bootstrap_mean(generator.normal(2, 1, 60)) for _ in range(300)]
    share = np.mean([interval.low <= 2 <= interval.high for interval in intervals])
    assert abs(share - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 300)
    assert bootstrap_mean([1.0, 1.0]) == bootstrap_mean([1.0, 1.0], seed=1)
    assert str(bootstrap_mean([1.0, 1.0])) == "1.00 [1.00, 1.00]"


def test_perplexity_is_exp_of_the_mean_token_loss(policy: Path, adapter: Path, tmp_path: Path) -> None:
    """Against transformers' own logits, row by row."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [("the film was", " great."), ("this story seems", " very bad. long?")]
    data = tmp_path / "rows.jsonl"
    toyworld.write_rows(data, [{"x": x, "y": y} for x, y in rows])
    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policy), adapter).eval()
    losses = []
    for x, y in rows:
        prompt, response = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (x, y))
        ids = torch.tensor([[*prompt, *response, tokenizer.eos_token_id]])
        logps = model(ids).logits[0].log_softmax(-1)
        losses += [-logps[at - 1, ids[0, at]].item() for at in range(len(prompt), ids.shape[1])]
    assert perplexity(str(policy), data, adapter=str(adapter)) == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)


def test_responses_do_not_depend_on_their_company(policy: Path) -> None:
    queries = [f"scene {number} was" for number in range(5)]
    every = sample_responses(str(policy), queries, engine="hf", max_new_tokens=6)
    assert every == sample_responses(str(policy), queries, engine="hf", max_new_tokens=6)
    assert every[:2] == sample_responses(str(policy), queries[:2], engine="hf", max_new_tokens=6)
    assert every != sample_responses(str(policy), queries, engine="hf", max_new_tokens=6, seed=1)


def test_demo_in_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_forked: Callable[..., Ended], capfd: pytest.CaptureFixture[str]
) -> None:
    """Too small to learn anything: that every step runs, is measured, and is not run twice."""
    sizes = {"PRETRAINING": 64, "LABELLED": 64, "FINE_TUNING": 32, "HELD_OUT": 16, "UNSEEN": 8, "QUERIES_PER_ROUND": 8}
    for name, size in sizes.items():
        monkeypatch.setattr(demo_room, name, size)
    monkeypatch.setattr(
        demo_room, "run_child", lambda command: Ended(CliRunner().invoke(cli.ple, command[1:]).exit_code, 0)
    )
    monkeypatch.setattr(rounds, "run_child", run_forked)
    output = tmp_path / "demo"
    report = demo_room.demo(output, rounds=1)
    assert (output / "learning-curve.png").read_bytes().startswith(b"\x89PNG")
    for expected in ("round     tau", "start      ", "round=000  ", "import polars as pl", "95 % bootstrap interval"):
        assert expected in report
    script = [line.strip() for line in report.splitlines()[-3:]]
    exec("\n".join(script))  # the three lines of polars
    assert "s_prompt" in capfd.readouterr().out
    stages = json.loads((output / "run" / "stages.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["reward", "sft", "gen", "score", "train"]
    assert demo_room.demo(output, rounds=1) == report
    assert json.loads((output / "run" / "stages.json").read_text())["stages"] == stages
    assert "8/8" not in capfd.readouterr().err
