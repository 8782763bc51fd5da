"""`ple sft` and `ple reward` on tiny real models: Eq. 1, what a row becomes, what is learned, saved and refused."""

import json
from pathlib import Path

import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ple_data.inputs.principles import render
from ple_data.inputs.templates import instructed
from ple_data.rewards import load_reward_model
from ple_train.reward import train_reward
from ple_train.sft import read_sequences, sft
from schemas.errors import UsageError
from schemas.options import Reward, Rewards, Sft
from tests import oracle, tiny


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "sft.jsonl"
    lines = [{"x": f"The film {n}", "y": " was great." if n % 2 else " was very bad."} for n in range(24)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_rows_become_prompt_response_and_an_end_unless_cut(policy, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    path = tmp_path / "rows.parquet"
    finish = ["stop", "length", "stop"]
    pl.DataFrame(
        {"x": ["the film", "the film", ""], "y": [" great.", " great.", "bad"], "finish": finish}
    ).write_parquet(path)
    ended, cut, free = read_sequences(path, tokenizer, None)
    x, y = (tokenizer(text, add_special_tokens=False).input_ids for text in ("the film", " great."))
    assert ended.ids.tolist() == [*x, *y, tokenizer.eos_token_id]
    assert cut.ids.tolist() == [*x, *y]
    assert (ended.prompt, free.prompt) == (len(x), 0)


def test_prompts_are_rendered_as_the_rounds_render_them(chat_policy, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(chat_policy)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"x": "the film", "y": " great."}')
    for prompt_format in ("auto", "chat", "plain"):
        [row] = read_sequences(path, tokenizer, None, prompt_format)
        assert row.ids[: row.prompt].tolist() == render(tokenizer, "the film", prompt_format=prompt_format)
    assert row.prompt < read_sequences(path, tokenizer, None, "chat")[0].prompt


def test_prompts_have_the_system_message_and_the_tokenizer_that_is_saved_has_not(tmp_path):
    template = tiny.TURNS + "{% if loud is defined %}!{% endif %}"
    model = tiny.policy_of(tmp_path / "m", tiny.tiny_tokenizer(chat=template, special=("<|turn|>", "<|over|>")))
    (tmp_path / "rows.jsonl").write_text('{"x": "the film", "y": "great"}')
    how = {"data": tmp_path / "rows.jsonl", "system": "Be brave.", "chat_template_arg": ["loud=1"]}
    sft(Sft(model=str(model), output=tmp_path / "out", **how))
    plain, told = (
        AutoTokenizer.from_pretrained(model),
        instructed(AutoTokenizer.from_pretrained(model), Sft(model=str(model), output=tmp_path / "out", **how)),
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == plain.chat_template
    [row] = read_sequences(how["data"], told, None)
    trained = pl.read_parquet(tmp_path / "out" / "metrics.parquet")["trained_tokens"][0]
    assert (
        tiny_text(told, row)
        == "<|turn|>system\nBe brave.<|over|>\n<|turn|>user\nthe film<|over|>\n<|turn|>assistant\n!"
    )
    assert trained == row.response
    with pytest.raises(UsageError, match=r"system: 'Be brave\.' then, None now"):
        sft(Sft(model=str(model), output=tmp_path / "out", data=how["data"], chat_template_arg=["loud=1"]))


def tiny_text(tokenizer, row) -> str:
    return tokenizer.decode(row.ids[: row.prompt])


def test_rows_with_tools_or_images_are_refused(policy, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "x"}], "tools": [{"name": "f"}], "y": "great"}')
    with pytest.raises(UsageError, match="line 1 has tools: prompts are text alone"):
        read_sequences(path, AutoTokenizer.from_pretrained(policy), None)


def test_an_empty_prompt_is_what_begins_a_text_and_never_its_end(tmp_path):
    from tokenizers import processors

    path = tmp_path / "rows.jsonl"
    path.write_text('{"x": "", "y": "the film"}')
    for single, first in ((f"{tiny.BOS} $A {tiny.EOS}", [2]), (f"$A {tiny.EOS}", []), (f"{tiny.BOS} $A", [2])):
        tokenizer = tiny.tiny_tokenizer()
        named = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (tiny.BOS, tiny.EOS)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=named)
        [row] = read_sequences(path, tokenizer, None)
        assert row.ids[: row.prompt].tolist() == first
        assert tokenizer.decode(row.ids[row.prompt :]) == f"the film{tiny.EOS}"


def test_a_chat_response_ends_as_its_template_ends_a_turn(tmp_path):
    tokenizer = tiny.tiny_tokenizer(chat=tiny.TURNS, special=("<|turn|>", "<|over|>"))
    path = tmp_path / "rows.jsonl"
    lines = [("the film", "good", "stop"), ("", "good", "stop"), ("a", "b", "length")]
    path.write_text("\n".join(json.dumps(dict(zip(("x", "y", "finish"), line, strict=True))) for line in lines))
    asked, free, cut = read_sequences(path, tokenizer, None)
    turns = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "good"}]
    assert tokenizer.decode(asked.ids) + "\n" == tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer.decode(free.ids) == f"good{tiny.EOS}"
    assert tokenizer.decode(cut.ids).endswith("\nb")
    [plain, *_] = read_sequences(path, tokenizer, None, "plain")
    assert tokenizer.decode(plain.ids) == f"the filmgood{tiny.EOS}"


def test_a_response_with_a_space_in_front_has_the_ids_of_the_whole_text(tmp_path):
    """As a SentencePiece policy samples them, and `ple export` gives them back."""
    tokenizer = tiny.spm_tokenizer()
    path = tmp_path / "rows.jsonl"
    path.write_text('{"x": "the film", "y": " was great."}')
    [row] = read_sequences(path, tokenizer, None)
    assert row.ids[:-1].tolist() == tokenizer("the film was great.").input_ids


def test_rows_that_changed_are_not_taken_for_the_ones_that_were_trained_on(policy, rows, tmp_path):
    sft(Sft(model=str(policy), data=rows, output=tmp_path / "out"))
    rows.write_text(rows.read_text() + '\n{"x": "more", "y": "rows"}')
    with pytest.raises(UsageError, match="data_digest"):
        sft(Sft(model=str(policy), data=rows, output=tmp_path / "out"))


def test_rows_over_the_positions_are_counted(policy, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"x": "a", "y": "word " * 3000}))
    with pytest.raises(UsageError, match="1 rows are longer than the 2048 positions"):
        sft(Sft(model=str(policy), data=path, output=tmp_path / "out"))


def test_rows_over_max_length_are_counted(policy, rows, capsys):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    lengths = [len(s.ids) for s in read_sequences(rows, tokenizer, None)]
    limit = sorted(lengths)[len(lengths) // 2]
    kept = read_sequences(rows, tokenizer, limit)
    assert len(kept) == sum(length <= limit for length in lengths) < len(lengths)
    said = f"{len(lengths) - len(kept)} of 24 rows left out: empty, or longer than --max-length {limit}"
    assert said in capsys.readouterr().err


def test_without_max_length_rows_are_left_out_as_empty_alone(policy, tmp_path, capsys):
    tokenizer, path = AutoTokenizer.from_pretrained(policy), tmp_path / "rows.jsonl"
    empty = '{"x": "the film", "y": "", "finish": "length"}\n'
    path.write_text(empty + empty.replace('""', '" great."'))
    assert len(read_sequences(path, tokenizer, None)) == 1
    assert "1 of 2 rows left out: empty\n" in capsys.readouterr().err
    path.write_text(empty)
    with pytest.raises(UsageError, match=r"no row to train on \(1 rows are empty\)"):
        read_sequences(path, tokenizer, None)


def test_the_first_loss_is_eq_1_per_response_token(policy, rows, tmp_path):
    sft(Sft(model=str(policy), data=rows, output=tmp_path / "out", batch_size=24))
    model = AutoModelForCausalLM.from_pretrained(policy).double()
    logps = []
    for s in read_sequences(rows, AutoTokenizer.from_pretrained(policy), None):
        ids = torch.from_numpy(s.ids).long()
        with torch.no_grad():
            scores = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        logps.append(scores[s.prompt - 1 : -1].gather(1, ids[s.prompt :, None]).squeeze(1).tolist())
    expected = oracle.sft_loss(logps) / sum(map(len, logps))
    assert pl.read_parquet(tmp_path / "out" / "metrics.parquet")["loss"][0] == pytest.approx(expected, rel=1e-5)


def test_lora_is_merged_into_a_start_policy_that_has_learned(policy, rows, tmp_path):
    merged, kept = tmp_path / "merged", tmp_path / "kept"
    options = {"model": str(policy), "data": rows, "epochs": 8, "learning_rate": 1e-2, "batch_size": 8}
    sft(Sft(**options, output=merged))
    sft(Sft(**options, output=kept, merge=False))
    assert (kept / "adapter_config.json").is_file()
    assert not (merged / "adapter_config.json").exists()
    for output, library in ((merged, "transformers"), (kept, "peft")):
        assert f"\nlibrary_name: {library}\n" in (output / "README.md").read_text()
    losses = pl.read_parquet(merged / "metrics.parquet")["loss"]
    assert losses[-1] < 0.5 * losses[0]
    ids = torch.arange(3, 40)[None]
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policy), kept)
    with torch.no_grad():
        a, b = AutoModelForCausalLM.from_pretrained(merged)(ids).logits, adapted(ids).logits
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"x": "a"}', r"no column y or response or completion or reference; it has x"),
        ('{"x": "a", "y": null}\n{"x": "a", "y": "b"}', r"line 1: y is missing"),
        ('{"x": "a", "y": "b"}\n{"x": ', r"line 2 is no valid JSON"),
        ("", r"is empty"),
        ('{"x": "a", "y": "b", "finish": "Stop"}', r"line 1: finish is 'Stop'; it must be stop or length"),
    ],
)
def test_bad_rows_are_named(policy, tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        sft(Sft(model=str(policy), data=path, output=tmp_path / "out"))


def test_a_classifier_learns_labels_and_scores_what_it_learned(reward, tmp_path):
    texts = [f"The film {n} was {'great' if n % 2 else 'very bad'}." for n in range(40)]
    pl.DataFrame({"text": texts, "label": [n % 2 for n in range(40)]}).write_parquet(tmp_path / "labels.parquet")
    train_reward(
        Reward(
            model=str(reward), data=tmp_path / "labels.parquet", output=tmp_path / "rm", epochs=6, learning_rate=1e-2
        )
    )
    assert pl.read_parquet(tmp_path / "rm" / "metrics.parquet")["accuracy"][-1] > 0.9
    judge = load_reward_model(str(tmp_path / "rm"), Rewards(output_index=1))
    good, bad = judge.score([("The film 3", " was great."), ("The film 3", " was very bad.")])
    assert good > bad


def test_preferences_train_a_model_with_one_output(reward, tmp_path):
    rows = {"prompt": ["The film"] * 32, "chosen": [" was great."] * 32, "rejected": [" was very bad."] * 32}
    pl.DataFrame(rows).write_parquet(tmp_path / "pairs.parquet")
    output = tmp_path / "rm"
    train_reward(
        Reward(model=str(reward), data=tmp_path / "pairs.parquet", output=output, epochs=4, learning_rate=1e-2)
    )
    chosen, rejected = load_reward_model(str(output)).score(
        [("The film", " was great."), ("The film", " was very bad.")]
    )
    assert chosen > rejected + 1


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a", "b"]}, "needs columns text, label or prompt, chosen, rejected; it has text"),
        ({"text": ["a", "b"], "label": [0, 0]}, "every label is 0"),
        ({"text": ["a", "b"], "label": ["pos", "neg"]}, "row 1: label 'pos' is not a whole number"),
    ],
)
def test_bad_labels_are_named(reward, tmp_path, columns, message):
    pl.DataFrame(columns).write_parquet(tmp_path / "bad.parquet")
    with pytest.raises(UsageError, match=message):
        train_reward(Reward(model=str(reward), data=tmp_path / "bad.parquet", output=tmp_path / "out"))
