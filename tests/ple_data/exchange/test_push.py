"""`ple push`: what reaches a hub by the real client, what stays here, what the card says, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

import cli
from ple_data.exchange.cards import fenced
from ple_data.storage.store import Store
from ple_data.storage.verify import verify
from schemas.records import RoundManifest
from tests.hub import TOKEN, Hub, Repository
from tests.tables import table

PRINCIPLE = "Be kind.\n```\n# no heading of the card\n````\n| no | table |"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two rounds of pairs with their responses, whose settings name a place of this machine."""
    store = Store(tmp_path / "data")
    for t in (0, 1):
        notes = {"queries": str(tmp_path / "private" / "q.jsonl"), "model": "owner/model"}
        settings = {"policy": "owner/model@0123456789ab", "samples": 1}
        store.save_manifest(RoundManifest(round=t, settings=settings, counts={"queries_taken": 2}, notes=notes))
        rows = [
            {"s": -1.0, "s_prompt": 2.0, "principle": PRINCIPLE},
            {"s": 0.5, "s_prompt": 0.25, "principle": PRINCIPLE},
        ]
        made = {"principle": {"name": "kind.txt", "digest": "0"}, "sampling": {"temperature": 0.7}}
        for kind in ("responses", "pairs"):
            store.commit(kind, t, f"00000-{t}", table(kind, rows, t), made)
            store.finish(kind, t)
    return store.root


@pytest.fixture(scope="module")
def trained(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that ple-train made, in a run."""
    root = tmp_path_factory.mktemp("run")
    Store(root / "data").commit("pairs", 0, "00000-0", table("pairs", [{"s_prompt": 1.0}, {"s_prompt": -1.0}]), {})
    words = ["--model", policy, "--data", root / "data", "--round", 0, "--output", root / "policy" / "round=000"]
    assert ple("train", *words).exit_code == 0
    return root


def ple(*words: object) -> Result:
    return CliRunner().invoke(cli.ple, list(map(str, words)))


def head(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_store_arrives_whole_and_loads_both_ways(hub: Hub, data: Path, tmp_path: Path):
    from datasets import load_dataset

    found = ple("push", data, "--to", "me/pairs", "--license", "cc-by-4.0")
    assert found.exit_code == 0, found.output
    assert f"{hub.url}/datasets/me/pairs/commit/" in found.stderr
    assert "private" in found.stderr
    repository = hub.repositories["datasets/me/pairs"]
    assert repository.private
    assert sorted(name for name in repository.files if name.endswith(".parquet")) == [
        f"{kind}/round=00{t}/part-00000-{t}.parquet" for kind in ("pairs", "responses") for t in (0, 1)
    ]
    there = hub.write("datasets/me/pairs", tmp_path / "there")
    assert list(verify(Store(there))) == []
    mine, theirs = (Store(root).scan("pairs").collect() for root in (data, there))
    assert mine.equals(theirs)
    assert str(tmp_path) not in "".join(content.decode(errors="replace") for content in repository.files.values())
    assert Store(there).load_manifest(0).notes == {"model": "owner/model"}
    for kind in ("pairs", "responses"):
        rows = load_dataset(str(there), kind, split="train", cache_dir=str(tmp_path / "cache"))
        assert rows["y_prompt"] == ["very good"] * 4


def test_the_card_of_a_store_says_what_is_in_it(hub: Hub, data: Path):
    assert ple("push", data, "--to", "me/pairs", "--license", "cc-by-4.0").exit_code == 0
    card = hub.repositories["datasets/me/pairs"].files["README.md"].decode()
    assert head(card) == {
        "license": "cc-by-4.0",
        "tags": ["ple", "preference", "synthetic"],
        "task_categories": ["text-generation"],
        "size_categories": ["n<1K"],
        "configs": [
            {"config_name": "pairs", "data_files": "pairs/**/*.parquet", "default": True},
            {"config_name": "responses", "data_files": "responses/**/*.parquet"},
        ],
    }
    assert "| pairs | 4 | 2 |" in card
    # margins of a round: 3 and -0.25; one of two is below 0
    assert "| 0 | 2 | -0.25 | 1.125 | 1.375 |" in card
    assert "| 0.5 |\n| 1 |" in card
    assert f"`````text\n{PRINCIPLE}\n`````" in card
    assert "Principle `kind.txt`:" in card
    assert "`judge@0123456789ab`" in card
    assert "temperature `0.7`" in card
    assert 'load_dataset("me/pairs", "pairs", split="train")' in card


def test_a_dry_run_sends_nothing_and_shows_all(hub: Hub, data: Path):
    found = ple("push", data, "--to", "me/pairs", "--dry-run", "--no-private")
    assert found.exit_code == 0, found.output
    assert hub.asked == []
    assert "nothing is sent; 15 files" in found.stdout
    assert "me/pairs, a public dataset repository" in found.stdout
    (shard, _) = Store(data).shards("pairs")
    assert f"{shard.bytes:>14,}  pairs/round=000/part-00000-0.parquet" in found.stdout
    assert "# pairs" in found.stdout
    assert "note: the card names no licence" in found.stderr


def test_a_repository_that_is_there_stays_as_private_as_it_is(hub: Hub, data: Path):
    assert ple("push", data, "--to", "me/pairs").exit_code == 0
    found = ple("push", data, "--to", "me/pairs", "--no-private")
    assert found.stderr.endswith(" files, private\n")
    assert ple("push", data, "--to", "me/open", "--no-private").stderr.endswith(" files, public\n")


def test_what_is_there_is_not_sent_twice_and_a_lost_connection_is_made_good(hub: Hub, data: Path):
    hub.drop = 1
    assert ple("push", data, "--to", "me/pairs").exit_code == 0
    sent = [path for path in hub.asked if path.startswith("PUT")]
    assert len(sent) == 4  # the one that was lost is not in the list
    hub.asked.clear()
    assert ple("push", data, "--to", "me/pairs").exit_code == 0
    assert [path for path in hub.asked if path.startswith("PUT")] == []


def test_the_token_is_never_written_or_shown(hub: Hub, data: Path, monkeypatch):
    found = ple("push", data, "--to", "me/pairs")
    assert found.exit_code == 0, found.output
    assert TOKEN not in found.output
    assert not any(TOKEN.encode() in content for content in hub.repositories["datasets/me/pairs"].files.values())
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    refused = ple("push", data, "--to", "me/other")
    assert refused.exit_code == 1
    assert "the hub said no" in refused.stderr
    assert "log in with `hf auth login`, or set HF_TOKEN" in refused.stderr
    assert "hf_another" not in refused.output


def test_what_is_refused_before_anything_is_sent(hub: Hub, data: Path, tmp_path: Path):
    (shard, _) = Store(data).shards("pairs")
    broken = Path(shutil.copytree(data, tmp_path / "broken"))
    path = broken / shard.path.relative_to(data)
    path.write_bytes(path.read_bytes()[:-1])
    found = ple("push", broken, "--to", "me/pairs")
    assert found.exit_code == 3
    assert f"{path}: {shard.bytes - 1} bytes, but {shard.bytes} were committed" in found.stderr
    for words, why in (
        ([tmp_path / "none"], "there is no such folder"),
        ([data, "--eval", data], "are for the card of a model"),
    ):
        found = ple("push", *words, "--to", "me/pairs")
        assert found.exit_code == 2, found.output
        assert why in found.stderr
    assert "is no OWNER/NAME" in ple("push", data, "--to", "pairs").stderr
    assert hub.asked == []


def test_a_repository_that_is_public_or_holds_other_rows_is_left_as_it_is(hub: Hub, data: Path):
    hub.repositories["datasets/me/open"] = Repository(private=False)
    found = ple("push", data, "--to", "me/open")
    assert found.exit_code == 2
    assert "me/open is there already and is public: say --no-private" in found.stderr
    hub.repositories["datasets/me/full"] = Repository(private=True, files={"pairs/round=007/part-x.parquet": b""})
    found = ple("push", data, "--to", "me/full")
    assert found.exit_code == 2
    assert "me/full holds 1 files that are not of" in found.stderr
    assert [hub.repositories[f"datasets/me/{name}"].commits for name in ("open", "full")] == [0, 0]


def test_an_adapter_with_a_card_and_without_places_of_this_machine(hub: Hub, trained: Path, tmp_path: Path):
    adapter = trained / "policy" / "round=000"
    found = ple("push", adapter, "--to", "me/tuned", "--license", "apache-2.0", "--base-model", "owner/base")
    assert found.exit_code == 0, found.output
    files = hub.repositories["models/me/tuned"].files
    assert files["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "owner/base"
    card = files["README.md"].decode()
    expected = {"license": "apache-2.0", "base_model": "owner/base", "library_name": "peft"}
    assert head(card) == expected | {"tags": ["ple", "alignment"], "pipeline_tag": "text-generation"}
    assert "by `ple` on `owner/base`" in card
    assert "| tokens trained |" in card
    assert "| learning_rate | `0.0001` |" in card
    assert 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("owner/base"), "me/tuned")' in card
    text = "".join(content.decode(errors="replace") for name, content in files.items() if name != "tokenizer.json")
    assert str(trained) not in text
    assert "ple.json" not in files


def test_a_run_is_its_newest_policy_with_its_evaluation(hub: Hub, trained: Path, policy: Path, tmp_path: Path):
    root = Path(shutil.copytree(trained, tmp_path / "run"))
    (root / "policy" / "round=001").mkdir()  # not finished
    (tmp_path / "q.jsonl").write_text('{"x": "The film"}\n{"x": "A story"}\n')
    words = ["--policy", f"tuned={policy},{root / 'policy' / 'round=000'}", "--queries", tmp_path / "q.jsonl"]
    words += ["--engine", "hf", "--max-new-tokens", 4, "--output", root / "eval"]
    assert ple("eval", *words).exit_code == 0
    found = ple("push", root, "--to", "me/tuned")
    assert found.exit_code == 0, found.output
    assert "name it with --base-model" in found.stderr
    files = hub.repositories["models/me/tuned"].files
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    card = files["README.md"].decode()
    assert "base_model" not in head(card)
    assert "## Evaluation" in card
    assert "| `tuned` |" in card


def test_a_folder_with_a_relative_name_is_no_model_on_the_hub_wherever_one_stands(
    hub: Hub, policy: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "demo-real").mkdir()
    (tmp_path / "demo-real" / "smol").symlink_to(policy)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    made = ple("train", "--model", "demo-real/smol", "--data", "data", "--round", 0, "--output", "tuned")
    assert made.exit_code == 0, made.output
    notes = {"queries": "demo-real/openings.jsonl", "model": "demo-real/smol"}
    settings = {"policy": "smol@0123456789ab", "samples": 1}
    Store(data).save_manifest(RoundManifest(round=2, settings=settings, counts={}, notes=notes))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert ple("push", tmp_path / "tuned", "--to", "me/tuned").exit_code == 0
    assert ple("push", data, "--to", "me/pairs").exit_code == 0
    for repository in hub.repositories.values():
        assert "demo-real" not in "".join(c.decode(errors="replace") for c in repository.files.values())


def test_an_altered_or_unfinished_training_is_refused(hub: Hub, trained: Path, adapter: Path, tmp_path: Path):
    altered = Path(shutil.copytree(trained / "policy" / "round=000", tmp_path / "altered"))
    (altered / "adapter_model.safetensors").write_bytes(b"x")
    found = ple("push", altered, "--to", "me/tuned")
    assert found.exit_code == 3
    assert "adapter_model.safetensors: missing, or changed since it was trained" in found.stderr
    found = ple("push", adapter, "--to", "me/tuned")
    assert found.exit_code == 2
    assert "has no ple.json: it is unfinished, or was not trained by ple" in found.stderr
    found = ple("push", trained / "policy" / "round=000", "--to", "me/tuned", "--base-model", tmp_path)
    assert "is no OWNER/NAME of a model" in found.stderr
    assert hub.asked == []


def test_a_fence_is_longer_than_any_in_the_text():
    assert fenced("a") == "```text\na\n```"
    assert fenced("a ```` b").startswith("`````text\n")
