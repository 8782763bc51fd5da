"""`ple convert`: a GGUF file into a plain model folder (safetensors and a tokenizer), with a word on what is lost.

transformers reads the file. What it leaves out and the file still says is mended here; the rest is told. The folder
appears whole, under its name, or not at all. Never trains.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from ple_data.common.command import say
from ple_data.common.extras import need
from ple_data.common.loading import loading
from schemas.errors import UsageError
from schemas.files import TMP_SUFFIX, explained, fsync_dir, fsync_file, is_stale, make_dirs, sha256_file, write_atomic
from schemas.holders import this_process
from schemas.options import Convert

PLAIN = {"F64", "F32", "F16", "BF16"}
"""Number types of GGUF that are not quantized."""
GPT2_SPLITS = {"gpt-2", "gpt2", "default", "jina-v2-code", "phi-2", "roberta-bpe", "mpt", "olmo"}
DIGIT_SPLITS = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
"""Names in `tokenizer.ggml.pre` of GPT-2's way to cut a text into words, and of the same with each digit apart."""
SENTENCE = "In 1994 the film ran 142 minutes; it wasn't dull."
WORDS, WHOLE = 200, 0.9
"""Words of a vocabulary that are looked at, and the share of them that must be tokens of their own."""
CARD = "README.md"


def convert(options: Convert) -> None:
    """Write the model of a GGUF file to a new folder, in float32. Raises UsageError for a file that is no whole GGUF,
    or whose architecture or tokenizer transformers does not read."""
    need("gguf", "a GGUF file is read with")
    file, output = options.gguf, options.output
    _refuse_other(file)
    digest = sha256_file(file)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        card = output / CARD
        if card.is_file() and digest in card.read_text(encoding="utf-8", errors="replace"):
            say(f"{output} is this file's already; nothing to do")
            return
        raise UsageError(f"{output} exists and was not made of this file: give a folder that is not there yet")
    from transformers.utils import logging

    logging.disable_progress_bar()
    with loading(str(file), "it is cut or damaged: get it again"):
        metadata, kinds = _header(file)
    if metadata.get("split.count", 1) > 1:
        raise UsageError(f"{file} is one of {metadata['split.count']} parts: join them first (gguf-split --merge)")
    tokenizer, notes = _tokenizer(file, metadata)
    model = _model(file, metadata, len(tokenizer))
    notes = [*_of_weights(kinds), *_of_positions(model.config, metadata, kinds), *notes]
    with _appearing(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_atomic(folder / CARD, _card(file, digest, metadata, notes))
    say("\n".join([f"{output}: {type(model).__name__}, {model.num_parameters():,} parameters", *notes]))


def _refuse_other(file: Path) -> None:
    if not file.is_file():
        raise UsageError(f"{file} is no file: give a GGUF file")
    with explained(file, "read"), file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise UsageError(f"{file} is no GGUF file: it does not begin with GGUF")


def _header(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Metadata by key (of a list: how long it is), and the number type of each tensor."""
    from gguf import GGUFReader

    reader = GGUFReader(str(file))
    last = max((int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors), default=0)
    if last == 0 or last > file.stat().st_size:
        raise ValueError("it ends before its weights do")
    fields = reader.fields.items()
    metadata = {key: field.contents() if len(field.types) == 1 else len(field.data) for key, field in fields}
    return metadata, {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}


def _model(file: Path, metadata: dict[str, Any], vocabulary: int) -> Any:
    """The model in float32 on the CPU, without a mark of having been quantized."""
    import torch
    from transformers import AutoModelForCausalLM

    from ple_data.common.device import refuse_made_up

    loaded: Any
    architecture = metadata.get("general.architecture")
    advice = f"is its architecture ({architecture}) one of a text model that this version of transformers reads?"
    with loading(str(file), advice), redirect_stderr(io.StringIO()):  # a progress bar that no switch turns off
        loaded = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    model, info = loaded
    refuse_made_up(str(file), model, info, head=False)
    if any(weight.dtype != torch.float32 for weight in model.parameters()):
        raise UsageError(f"{file}: transformers left some weights quantized, which cannot be trained")
    model.hf_quantizer, model.is_quantized = None, False
    for holder in (model.config, model):
        if hasattr(holder, "quantization_config"):
            delattr(holder, "quantization_config")
    rows = model.get_input_embeddings().weight.shape[0]
    if vocabulary > rows:
        raise UsageError(f"{file}: its tokenizer has {vocabulary} tokens, and its embedding {rows} rows")
    more = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    if ends := list(dict.fromkeys(end for end in more if isinstance(end, int) and 0 <= end < rows)):
        model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends
    return model


def _tokenizer(file: Path, metadata: dict[str, Any]) -> tuple[Any, list[str]]:
    """The tokenizer, with what could be mended, and sentences on it. Raises UsageError for one that does not work."""
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, __version__

    how: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    with loading(f"the tokenizer of {file}", "does this version of transformers read its architecture?"):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **how)
        built = json.loads(tokenizer.backend_tokenizer.to_str())
    notes, parts = [], built["model"]
    if parts["type"] == "BPE" and not parts["merges"]:
        raise UsageError(f"{file}: transformers {__version__} loses the merges of its tokenizer: take a newer version")
    known = metadata.get("tokenizer.ggml.tokens", len(tokenizer))
    if len(tokenizer) > known:  # special tokens that the class has and the file has not
        built["added_tokens"] = [token for token in built["added_tokens"] if token["id"] < known]
        names = ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template")
        told = {name: getattr(tokenizer, name) for name in names}
        held = {
            n: v for n, v in told.items() if n == "chat_template" or (v and tokenizer.convert_tokens_to_ids(v) < known)
        }
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(built)), **held)
    pre = metadata.get("tokenizer.ggml.pre")
    cut = built["pre_tokenizer"] or {}
    if metadata.get("tokenizer.ggml.model") == "gpt2" and cut.get("type") == "ByteLevel" and pre not in GPT2_SPLITS:
        if pre in DIGIT_SPLITS:
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
            notes.append(f"mended: each digit is a token of its own, as the file says ({pre})")
        else:
            notes.append(
                f"lost: how texts are cut into words ({pre}); they are cut as GPT-2 does, so some tokens differ"
            )
    notes += [*_mend_end(tokenizer, metadata), *_mend_bos(tokenizer, metadata)]
    if not _keeps_words(built["model"]["vocab"], tokenizer):
        raise UsageError(
            f"{file}: its tokenizer cuts words that are its own tokens: transformers {__version__} loses some of its "
            "merges; take a newer version"
        )
    back: Any = tokenizer.decode(tokenizer(SENTENCE, add_special_tokens=False)["input_ids"])
    if back.strip() != SENTENCE:
        raise UsageError(f"{file}: its tokenizer makes {back[:80]!r} of {SENTENCE!r}: transformers does not read it")
    if tokenizer.eos_token is None:
        raise UsageError(f"{file}: it names no token that ends a response (tokenizer.ggml.eos_token_id)")
    return tokenizer, [*notes, _of_template(tokenizer), f"responses end with {tokenizer.eos_token}"]


def _mend_end(tokenizer: Any, metadata: dict[str, Any]) -> Iterator[str]:
    """Let EOS be the token that the file names; transformers 5.17 takes a default of its own."""
    end = metadata.get("tokenizer.ggml.eos_token_id")
    if end is not None and end != tokenizer.eos_token_id:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
        yield f"mended: {tokenizer.eos_token} ends a response, as the file says"


def _keeps_words(vocabulary: Any, tokenizer: Any) -> bool:
    """Whether most words of its vocabulary are one token (SentencePiece may put a space before it)."""
    words = [word for word in dict(vocabulary) if re.fullmatch("[▁Ġ][a-z]{4,}", word)][:WORDS]
    ids = [tokenizer(f" {word[1:]}", add_special_tokens=False)["input_ids"] for word in words]
    return sum(len(own) <= 2 for own in ids) >= WHOLE * len(words)


def _mend_bos(tokenizer: Any, metadata: dict[str, Any]) -> Iterator[str]:
    """Put BOS before each text where the file says so, and only there. Without its BOS a Gemma writes nonsense."""
    wanted = metadata.get("tokenizer.ggml.add_bos_token", metadata.get("tokenizer.ggml.model") == "llama")
    if tokenizer.bos_token_id is None:
        return
    ids = tokenizer("a")["input_ids"]
    if wanted != (ids[:1] == [tokenizer.bos_token_id]):
        tokenizer.add_bos_token = bool(wanted)
        if wanted != (tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]):
            yield f"lost: {tokenizer.bos_token} {'belongs' if wanted else 'does not belong'} before each text"
        else:
            yield f"mended: {tokenizer.bos_token} {'stands' if wanted else 'does not stand'} before each text"


def _of_template(tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        return "no chat template: prompts are plain text"
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may raise anything
        tokenizer.chat_template = None
        return f"lost: its chat template, which does not render here ({type(error).__name__}); prompts are plain text"
    return "chat template: kept"


def _of_weights(kinds: dict[str, str]) -> list[str]:
    counts = Counter(kind for kind in kinds.values() if kind not in PLAIN)
    if not counts:
        return []
    found = ", ".join(f"{kind}: {count}" for kind, count in counts.most_common())
    return [f"lost: the weights were quantized ({found} of {len(kinds)} tensors); they stay as rounded, in float32"]


def _of_positions(config: Any, metadata: dict[str, Any], kinds: dict[str, str]) -> list[str]:
    """llama.cpp keeps the stretching of positions in places that transformers does not read for each architecture."""
    kind = metadata.get(f"{metadata['general.architecture']}.rope.scaling.type")
    scaled = "rope_freqs.weight" in kinds or kind not in (None, "none")
    kept = json.dumps(getattr(config.get_text_config(), "rope_parameters", None) or {})
    if not scaled or re.search(r'"rope_type": "(?!default)', kept):
        return []
    return [f"lost: its positions are stretched ({kind or 'rope_freqs'}), which is left out; long texts suffer"]


def _card(file: Path, digest: str, metadata: dict[str, Any], notes: list[str]) -> str:
    """A model card that says what the folder was made of; by its digest a rerun knows the file."""
    named = re.fullmatch(r"[\w.-]+", str(metadata.get("general.license", "")))
    licence = f"license: {named[0]}\n" if named else ""
    lines = "\n".join(f"- {note}" for note in notes)
    made = f"Made by `ple convert` of `{file.name}` (SHA-256 `{digest}`)."
    return f"---\n{licence}library_name: transformers\n---\n\n# {file.stem}\n\n{made}\n\n{lines}\n"


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `output` when the block ends well, and is removed when it does not."""
    with explained(output):
        make_dirs(output.parent)
        prefix = f".{output.name}."
        for left in output.parent.glob(f"{prefix}*{TMP_SUFFIX}"):
            if is_stale(left):
                shutil.rmtree(left, ignore_errors=True)
        folder = output.parent / f"{prefix}{this_process().token}-{uuid.uuid4().hex}{TMP_SUFFIX}"
        folder.mkdir()
        try:
            yield folder
            for path in folder.iterdir():
                fsync_file(path)
            fsync_dir(folder)
            os.rename(folder, output)  # an empty folder of that name may be there
            fsync_dir(output.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
