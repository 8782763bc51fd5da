"""`ple reward`: LoRA merged into the result, and how often a reward model is right beside "longer wins"."""

import json
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner

import cli
from ple_data.evaluation.accuracy import accuracies, read_held_out, right
from ple_data.rewards import classifier, load_reward_model
from ple_train.model.policy import merged
from ple_train.reward import load_classifier, reward, train_reward, with_adapter
from schemas.errors import UsageError
from schemas.options import Reward, Rewards
from tests import oracle, tiny
from tests.judgeserver import JudgeServer

PAIRS = {"prompt": ["The film"] * 32, "chosen": [" was great."] * 32, "rejected": [" was very bad."] * 32}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    pl.DataFrame(PAIRS).write_parquet(tmp_path / "pairs.parquet")
    return tmp_path / "pairs.parquet"


def function(tmp_path: Path, body: str) -> str:
    (tmp_path / "r.py").write_text(f"def score(xs, ys):\n    return {body}\n")
    return f"{tmp_path / 'r.py'}:score"


def test_lora_trains_adapter_and_head_and_is_merged(request, pairs, tmp_path):
    model, output = request.getfixturevalue("reward"), tmp_path / "rm"
    how = {"epochs": 4, "learning_rate": 1e-2, "lora_rank": 4}
    train_reward(Reward(model=str(model), data=pairs, output=output, **how))
    names = {path.name for path in output.iterdir()}
    assert "model.safetensors" in names
    assert "adapter_config.json" not in names
    chosen, rejected = load_reward_model(str(output)).score(
        [("The film", " was great."), ("The film", " was very bad.")]
    )
    assert chosen > rejected + 1
    before = (output / "model.safetensors").read_bytes()
    train_reward(Reward(model=str(model), data=pairs, output=output, **how))
    assert (output / "model.safetensors").read_bytes() == before
    with pytest.raises(UsageError, match=r"lora_rank: 4 then, 8 now"):
        train_reward(Reward(model=str(model), data=pairs, output=output, **{**how, "lora_rank": 8}))
    with pytest.raises(UsageError, match=r"lora_rank: 4 then, None now"):
        train_reward(Reward(model=str(model), data=pairs, output=output, epochs=4, learning_rate=1e-2))


def encoder(kind: str, tmp_path: Path) -> Path:
    import transformers

    shape = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    own = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64} if kind == "DistilBert" else shape
    config = getattr(transformers, f"{kind}Config")(**{**own, "vocab_size": 60})
    getattr(transformers, f"{kind}ForSequenceClassification")(config).save_pretrained(tmp_path / kind)
    return tmp_path / kind


@pytest.mark.parametrize("kind", ["Roberta", "Bert", "DistilBert"])
def test_lora_leaves_the_head_of_an_encoder_whole(kind: str, tmp_path: Path):
    """Some have linear layers of their own before the last one, which get no adapter and are trained as they are."""
    options = Reward(model=str(encoder(kind, tmp_path)), data="d", output="o", lora_rank=2)
    tuned = with_adapter(load_classifier(options, 2), options)
    trained = [name for name, weight in tuned.named_parameters() if weight.requires_grad]
    assert any(".lora_A." in name for name in trained)
    of_head = [name for name in trained if "classifier." in name]
    assert of_head
    assert not any("lora" in name for name in of_head)
    assert all("lora_" in name or name in of_head for name in trained)
    assert not [name for name, _ in merged(tuned).named_parameters() if "lora" in name or "modules_to_save" in name]


def held_out(tmp_path: Path, rows: dict) -> Path:
    pl.DataFrame(rows).write_ndjson(tmp_path / "held_out.jsonl")
    return tmp_path / "held_out.jsonl"


BENCH = {
    "prompt": [f"q{n // 2}" for n in range(12)],  # two pairs of each query
    "chosen": ["good " * (n % 4) for n in range(12)],
    "rejected": ["bad " * (n % 3) for n in range(12)],
    "subset": ["chat" if n < 6 else "safety" for n in range(12)],
}
SCORES = [1.0, 1, 0, 1, 0.5, 1, 1, 1, 0, 0, 1, 1]


def test_accuracy_and_the_rule_beside_it_are_those_of_the_oracle(tmp_path):
    test = read_held_out(held_out(tmp_path, BENCH))
    assert test.simple == [
        oracle.right(len(a), len(b)) for a, b in zip(BENCH["chosen"], BENCH["rejected"], strict=True)
    ]
    found = {each.group: each for each in accuracies(test, SCORES)}
    assert [each.rows for each in found.values()] == [6, 6, 12]
    for group, each in found.items():
        places = [n for n in range(12) if group in ("all", BENCH["subset"][n])]
        score, simple = ([values[n] for n in places] for values in (SCORES, test.simple))
        assert each.right.mean == pytest.approx(oracle.mean(score), abs=1e-12)
        assert each.simple.mean == pytest.approx(oracle.mean(simple), abs=1e-12)
        assert each.difference.mean == pytest.approx(oracle.mean(score) - oracle.mean(simple), abs=1e-12)
        assert each.right.low <= each.right.mean <= each.right.high
        assert each.right.count == len({BENCH["prompt"][n] for n in places})  # queries are drawn, not pairs


def test_a_tie_is_half():
    assert [right(2, 1), right(1, 2), right(1, 1)] == [1.0, 0.0, 0.5]


def test_pairs_of_one_query_widen_the_interval(tmp_path):
    """32 pairs of one query are one draw, so that nothing beats anything."""
    rows = {name: PAIRS[name] for name in ("prompt", "rejected", "chosen")}
    once = read_held_out(held_out(tmp_path, rows))
    [all_rows] = accuracies(once, [1.0] * 32)
    assert all_rows.difference.count == 1
    assert not all_rows.beats


def test_a_reward_that_is_the_length_does_not_beat_it_and_a_better_one_does(tmp_path):
    rows = {"prompt": [f"q{n}" for n in range(40)], "chosen": ["good" + "!" * (n % 2) for n in range(40)]}
    path = held_out(tmp_path, rows | {"rejected": ["worse"] * 40, "kind": ["a", "b"] * 20})
    length = reward(Reward(measured=function(tmp_path, "[len(y) for y in ys]"), test=path))
    assert 'does not beat "longer wins": the interval of the difference on the same rows does not lie above 0' in length
    better = reward(Reward(measured=function(tmp_path, "[float('good' in y) for y in ys]"), test=path, group="kind"))
    lines = better.splitlines()
    assert lines[0].startswith("r.py:score@")
    assert lines[0].endswith(f"on 40 pairs of {path}")
    assert [line.split()[:2] for line in lines[4:7]] == [["a", "20"], ["b", "20"], ["all", "40"]]
    assert lines[-1].startswith('beats "longer wins"')


def test_rewardbench_goes_by_its_subsets_and_json_is_whole(tmp_path):
    path = held_out(tmp_path, BENCH)
    spec = function(tmp_path, "[float('good' in y) for y in ys]")
    done = CliRunner().invoke(cli.ple, ["reward", "--eval", spec, "--test", str(path), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["beside"] == "longer wins"
    assert [(each["group"], each["rows"]) for each in found["groups"]] == [("chat", 6), ("safety", 6), ("all", 12)]
    assert found["groups"][-1]["right"]["count"] == 6


def test_a_trained_classifier_is_measured_beside_the_most_frequent_label(request, tmp_path, capsys):
    model = request.getfixturevalue("reward")
    texts = [f"The film {n} was {'great' if n % 4 else 'very bad'}." for n in range(40)]
    rows = {"text": texts, "label": [int(n % 4 > 0) for n in range(40)]}
    path = held_out(tmp_path, rows)
    made = Reward(
        model=str(model), data=path, output=tmp_path / "rm", epochs=8, learning_rate=1e-2, test=path, batch_size=8
    )
    said = reward(made).splitlines()
    assert said[3].split("  ")[-2].strip() == "most frequent label" or "most frequent label" in said[3]
    assert "75.0 [" in said[4]
    measured = load_reward_model(str(tmp_path / "rm"), Rewards(output_index=1))
    assert said[0].startswith(measured.name.replace("[1]", ""))
    assert reward(made).splitlines() == said  # complete already, so it is only measured


def test_labels_are_measured_with_one_model_in_memory(tmp_path, monkeypatch):
    model = str(tiny.tiny_reward(tmp_path / "three", num_labels=3))
    path = held_out(tmp_path, {"text": [f"The film {n}" for n in range(6)], "label": [0, 1, 2] * 2})
    loaded = []
    monkeypatch.setattr(classifier, "_load", lambda *a, load=classifier._load, **b: loaded.append(a) or load(*a, **b))
    found = json.loads(reward(Reward(measured=model, test=path, as_json=True)))
    assert len(loaded) == 1
    rows = [("", f"The film {n}") for n in range(6)]
    outputs = [load_reward_model(f"{model}[{label}]").score(rows) for label in range(3)]
    share = sum(max(range(3), key=lambda label: outputs[label][n]) == n % 3 for n in range(6)) / 6
    assert found["groups"][-1]["right"]["mean"] == pytest.approx(share)


def test_a_judge_is_measured_on_what_it_rates_and_paid_once(tmp_path, capsys):
    server = JudgeServer()
    words = ["good and long", "good", "BABBLE", "so"]
    path = held_out(tmp_path, {"prompt": list("abcd"), "chosen": words, "rejected": ["bad", "longer", "bad", "bad!"]})
    made = Reward(measured="judge:m", rubric="hh", reward_endpoint=server.url, test=path, output=tmp_path / "out")
    try:
        said = reward(made)
        assert said.splitlines()[0].endswith(f"on 3 pairs of {path}")
        assert "1 more pairs have a response without a rating" in said
        assert "measure: 8/8 texts" in capsys.readouterr().err
        paid = len(server.requests)
        assert json.loads(reward(made.but(as_json=True)))["unrated"] == 1
        assert len(server.requests) == paid + 2, "the one without a rating, in two answers"
        with pytest.raises(UsageError, match="give --output, the folder in which its answers are kept"):
            reward(made.but(output=None))
    finally:
        server.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give --model, --data and --output to train a reward model, or --eval and --test"),
        ({"measured": "r.py:f"}, "--eval measures on held-out rows: give them with --test"),
        ({"model": "m", "data": "d", "output": "o", "group": "kind"}, "--group and --json .* on --test: give that"),
        ({"measured": "r.py:f", "as_json": True}, "--group and --json .* on --test: give that"),
        ({"measured": "r.py:f", "model": "m", "test": "held_out.jsonl"}, "--model: --eval measures a reward model"),
        ({"measured": "r.py:f", "test": "held_out.jsonl", "group": "kind"}, "has no column kind; it has prompt"),
        ({"measured": "r.py:f", "test": "none.jsonl"}, "none.jsonl does not exist"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message, tmp_path, monkeypatch):
    held_out(tmp_path, BENCH)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        reward(Reward(**options))


def test_a_test_of_another_kind_is_refused_before_the_training(request, pairs, tmp_path):
    model = str(request.getfixturevalue("reward"))
    labelled = held_out(tmp_path, {"text": ["a", "b"], "label": [0, 1]})
    with pytest.raises(UsageError, match=r"has preferences and --test .* labels"):
        reward(Reward(model=model, data=pairs, output=tmp_path / "o", test=labelled))
    with pytest.raises(UsageError, match="say with --output-index which one is the reward"):
        reward(Reward(model=model, data=labelled, output=tmp_path / "o", test=pairs))
    with pytest.raises(UsageError, match=r"has labels, which .* does not give; test on pairs"):
        reward(Reward(measured=function(tmp_path, "ys"), test=labelled))
    with pytest.raises(UsageError, match=r"has labels up to 1, and .* has 1 outputs"):
        reward(Reward(measured=model, test=labelled))
