"""What a round is sampled under beside its options: ends of turns, the principle's form, the day; and old rounds."""

import json
import os
from datetime import date
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from ple_data.common.models import end_ids, load_tokenizer
from ple_data.inputs.templates import Response
from ple_data.sampling import terms
from ple_data.sampling.generate import generate
from ple_data.storage.store import Store
from schemas.errors import DamagedError, UsageError
from schemas.options import Gen
from tests import tiny

SPECIAL = ("<|turn|>", "<|over|>")
OWN_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|turn|>system\nBe brief.<|over|>\n{% endif %}" + tiny.TURNS
DATED = "<|turn|>system\n{{ strftime_now('%d %b %Y') }}<|over|>\n" + tiny.TURNS


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Policies whose generation configuration does not know the end of their turns."""
    folder = tmp_path_factory.mktemp("models")
    templates = {"turns": tiny.TURNS, "own": OWN_SYSTEM, "dated": DATED, "plain": False}
    return {
        name: tiny.policy_of(folder / name, tiny.tiny_tokenizer(chat=template, special=SPECIAL))
        for name, template in templates.items()
    }


@pytest.fixture
def run(models: dict[str, Path], tmp_path: Path) -> Any:
    queries = tmp_path / "q.jsonl"
    queries.write_text("".join(json.dumps({"id": f"q{at}", "x": x}) + "\n" for at, x in enumerate(tiny.corpus()[:6])))

    def call(model: str, data: str = "data", **options: Any) -> Any:
        asked = {"principles": "imdb", "round": 0, "max_new_tokens": 8, "engine": "hf", "unit_size": 3} | options
        return generate(Gen(model=str(models[model]), queries=str(queries), data=tmp_path / data, **asked))

    return call


def rows(data: Path) -> pl.DataFrame:
    return Store(data).scan("responses").collect()


def begun_before(data: Path, *names: str) -> None:
    """As an older version would have left the settings of round 0: without these."""
    path = Store(data).manifest_path(0)
    manifest = {name: value for name, value in json.loads(path.read_text()).items() if name != "seal"}
    for name in names:
        del manifest["settings"][name]
    path.write_text(json.dumps({**manifest, "version": 1}))


@pytest.mark.parametrize(("model", "stop"), [("turns", ()), ("plain", ("<|over|>",)), ("plain", (" <|over|>\n",))])
def test_the_end_of_a_turn_and_a_stop_that_is_a_token_end_a_response(run, models, tmp_path, model, stop):
    over = load_tokenizer(models[model]).convert_tokens_to_ids("<|over|>")
    run(model, max_new_tokens=300, temperature=3.0, stop=stop)
    found = rows(tmp_path / "data")["y_ids"].to_list()
    assert any(ids[-1] == over for ids in found)
    assert not any(over in ids[:-1] for ids in found)
    assert Store(tmp_path / "data").load_manifest(0).settings["end_tokens"] == ["<|over|>"]


def test_a_model_that_ends_its_turns_with_known_tokens_has_the_rounds_that_it_had(run, models, tmp_path):
    run("plain", dry_run=False)
    assert (
        not {"end_tokens", "principle_form", "template_date"}
        & Store(tmp_path / "data").load_manifest(0).settings.keys()
    )
    config = models["turns"] / "generation_config.json"
    before = config.read_text()
    over = load_tokenizer(models["turns"]).convert_tokens_to_ids("<|over|>")
    config.write_text(json.dumps(json.loads(before) | {"eos_token_id": [1, over]}))
    assert over in end_ids(models["turns"], load_tokenizer(models["turns"]))
    run("turns", "known")
    config.write_text(before)
    assert "end_tokens" not in Store(tmp_path / "known").load_manifest(0).settings


def test_a_round_that_an_older_version_began_goes_on_as_it_was_made(run, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as older:  # no such rules
        older.setattr(terms, "response_form", lambda tokenizer, _: Response(tokenizer.eos_token_id))
        older.setattr(terms, "own_system", lambda *_: "")
        run("own", principle_form="replace")
    before = rows(tmp_path / "data")
    unit = sorted((tmp_path / "data/.ple/commits/responses/round=000").glob("*.json"))[0]
    (tmp_path / "data/responses/round=000" / f"part-{unit.stem}.parquet").unlink()
    unit.unlink()
    run("own")
    said = capsys.readouterr().err
    assert "begun by an older version and goes on as it was made" in said
    assert rows(tmp_path / "data").sort("query_id").equals(before.sort("query_id"))


def test_the_form_of_the_principle_is_a_setting_of_the_round(run, tmp_path):
    shown = {form: run("own", dry_run=True, principle_form=form).dry_run for form in ("add", "replace")}
    assert "Be brief." in shown["add"].split("guided prompt")[1]
    assert "Be brief." not in shown["replace"].split("guided prompt")[1]
    assert "the principle is added to the system message" in shown["add"]
    run("own", principle_form="replace")
    with pytest.raises(UsageError, match="principle_form: 'add', there 'replace'"):
        run("own")
    run("turns", "without")
    run("turns", "without", principle_form="replace")  # its template has no system message of its own: the same round


def test_dry_run_shows_what_ends_a_response(run, models):
    shown = run("turns", dry_run=True, stop=("\n\n",)).dry_run
    over = load_tokenizer(models["turns"]).convert_tokens_to_ids("<|over|>")
    assert f"a response ends with the token {tiny.EOS} (1) or <|over|> ({over})" in shown
    assert "or before the text '\\n\\n'" in shown


def test_a_stop_that_holds_a_special_token_is_said(run, capsys):
    run("turns", dry_run=True, stop=("<|over|>\n<|turn|>",))
    assert "holds the special token <|" in capsys.readouterr().err


def on(day: date, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(date):
        @classmethod
        def today(cls) -> date:
            return day

    monkeypatch.setattr(terms, "date", Clock)


def test_a_round_has_one_day_and_reuse_finds_its_rows_on_another(run, models, tmp_path, monkeypatch, capsys):
    on(date(2031, 1, 1), monkeypatch)
    run("dated")
    assert "in the whole of round 0 it is 2031-01-01" in capsys.readouterr().err
    [x_ids] = rows(tmp_path / "data").filter(pl.col("query_id") == "q0")["x_ids"].to_list()
    assert "01 Jan 2031" in load_tokenizer(models["dated"]).decode(x_ids)
    on(date(2031, 1, 2), monkeypatch)
    assert "01 Jan 2031" in run("dated", dry_run=True).dry_run
    assert "02 Jan 2031" in run("dated", "new", dry_run=True).dry_run
    assert run("dated", "new", reuse=[tmp_path / "data"], seed=1).rows_reused == 6


def test_a_round_of_an_older_version_has_the_day_of_its_first_start(run, tmp_path, monkeypatch):
    run("dated")
    begun_before(tmp_path / "data", "template_date")
    path = Store(tmp_path / "data").manifest_path(0)
    os.utime(path, (0, 86400 * 365.25 * 30))
    on(date(2031, 1, 2), monkeypatch)
    assert "Jan 2000" in run("dated", dry_run=True).dry_run
    run("dated")


@pytest.mark.parametrize(("name", "value"), [("template_date", "abc"), ("template_date", 5), ("sampling", "abc")])
@pytest.mark.parametrize("again", [{}, {"data": "new", "reuse": True}])
def test_a_setting_of_a_round_that_does_not_read_is_damage(run, tmp_path, name, value, again):
    run("dated")
    begun_before(tmp_path / "data")
    path = Store(tmp_path / "data").manifest_path(0)
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"settings": manifest["settings"] | {name: value}}))
    more = {"reuse": [tmp_path / "data"]} if again else {}
    with pytest.raises(DamagedError, match=r"round=000\.json: not a readable RoundManifest.*run `ple verify`"):
        run("dated", again.get("data", "data"), **more)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"temperature": 0.5}, "temperature: 1.0 there, 0.5 here"),
        ({"principles": "hh"}, "principle: another text there"),
        ({"prompt_format": "plain"}, "end_tokens: ['<|over|>'] there, None here"),
        ({"samples": 1, "reader": "imdb", "query_column": "x", "prefix_words": 2}, "became other tokens"),
    ],
)
def test_reuse_that_finds_nothing_says_which_setting_differs(run, tmp_path, capsys, other, reason):
    run("turns", "old")
    assert run("turns", "new", reuse=[tmp_path / "old"], **other).rows_reused == 0
    [said] = [line for line in capsys.readouterr().err.splitlines() if "--reuse" in line]
    assert "no row there fits this round" in said
    assert reason in said


CHANGES = {
    **{"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "system": "Be brave."},
    "chat_template_arg": ("role=1",),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_sampled_with_is_a_setting_of_the_round(run, tmp_path, name):
    """Of a round that an older version began too; both ways."""
    run("own", limit=1)
    before = Store(tmp_path / "data").load_manifest(0).settings
    assert not CHANGES.keys() & before.keys()
    with pytest.raises(UsageError, match=rf"begun with other settings: {name}: .*, there "):
        run("own", limit=1, **{name: CHANGES[name]})
    run("own", "changed", limit=1, **{name: CHANGES[name]})
    assert run("own", "changed", limit=1, **{name: CHANGES[name]}).rows_done_before == 1
    with pytest.raises(UsageError, match=f"{name}: "):
        run("own", "changed", limit=1)
    units = [sorted((tmp_path / data / "responses/round=000").iterdir())[0].name for data in ("data", "changed")]
    assert units[0] != units[1]
    assert run("own", "other", limit=1, reuse=[tmp_path / "changed"]).rows_reused == (name == "chat_template_arg")


def test_a_value_of_the_template_is_the_same_in_every_spelling(run, tmp_path):
    run("own", limit=1, chat_template_arg=("role=true", "content=1"))
    again = run("own", limit=1, chat_template_arg=("content=1", "role=True"))
    assert again.rows_done_before == 1
    assert Store(tmp_path / "data").load_manifest(0).settings["chat_template_arg"] == ["content=1", "role=true"]
    with pytest.raises(UsageError, match=r"chat_template_arg: \['role=false'\], there \['content=1', 'role=true'\]"):
        run("own", limit=1, chat_template_arg=("role=false",))


def test_dry_run_shows_the_system_message(run):
    shown = run("turns", dry_run=True, system="Be brave.").dry_run
    assert shown.count("Be brave.") == 2
    with pytest.raises(UsageError, match="--system and --chat-template-arg are for a chat template"):
        run("plain", dry_run=True, system="Be brave.")
