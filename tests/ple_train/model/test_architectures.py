"""Sampling and training agree to 1e-5 nats, alone as in a batch, on some of the architectures of docs/models.md."""

import re

import pytest

from ple_data.common.models import load_tokenizer
from ple_data.engines import EngineSpec, make_engine
from ple_train.model.policy import load_policy
from schemas.errors import UsageError
from schemas.options import Trainable
from tests import architectures

ONE_BY_ONE = ["rwkv"]
SOME = [
    "bloom",
    "falcon",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "mixtral",
    "mpt",
    "opt",
    "phi",
    "qwen3",
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*SOME, "phimoe", *ONE_BY_ONE])
def test_log_probabilities_of_sampling_are_those_of_training(kind, tmp_path):
    architectures.make(kind, tmp_path / "model")
    assert architectures.difference(tmp_path / "model") <= architectures.TOLERANCE


@pytest.mark.filterwarnings("ignore")
def test_a_model_whose_tokens_see_those_to_come_is_refused(tmp_path):
    architectures.make("bert-generation", tmp_path / "model")
    spec = EngineSpec(str(tmp_path / "model"), None, None, load_tokenizer(tmp_path / "model"), (1,), 64, "float32")
    with pytest.raises(UsageError, match="this architecture is not supported"):
        make_engine("hf", spec, {})
    with pytest.raises(UsageError, match="not supported"):
        load_policy(str(tmp_path / "model"), Trainable(full=True))


def test_the_page_names_at_least_forty_that_agree():
    page = architectures.PAGE.read_text()
    agree = re.findall(r"^\| (\S+) \| agrees \|$", page, re.MULTILINE)
    assert len(agree) >= 40
    assert {*SOME, *ONE_BY_ONE} <= {*agree}
