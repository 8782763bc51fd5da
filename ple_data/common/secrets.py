"""What in a text may be a secret, for messages and files: keys in the environment and inside addresses.

Reads nothing but its text and the environment.
"""

import os
import re
from collections.abc import Callable
from urllib.parse import unquote

_KEY_VARIABLE, _SHORTEST = re.compile(r"(API_KEY|_TOKEN|_SECRET|PASSWORD)$"), 8
"""Variables whose values, from so many characters on, are struck out wherever they stand."""
_ADDRESS = re.compile(r"\b(https?://)([^\s/?#'\"<>]*)([^\s?#'\"<>]*)(\?[^\s#'\"<>]*)?", re.IGNORECASE)
_DIGEST, _DIGEST_OF_PART = re.compile(r"\?[0-9a-f]{12}\W*"), re.compile(r"^\[[0-9a-f]{12}\]$")
_IN_USED_ADDRESSES: set[str] = set()
"""What may be a key in the addresses that this process uses: `remember` adds to it, and nothing is taken out."""
_TURNS = re.compile(r"\d+|[A-Z]?[a-z]+|[A-Z]+|[^\dA-Za-z]+")
_SAYS_KEY = re.compile(r"^(sk|pk|rk|hf|key|token|bearer|api[-_]?key|bot\d+)[-_:=.]|secret|passw|(key|token)=", re.I)


def public(text: str, instead: Callable[[str], str] = lambda _: "key") -> str:
    """The text with what may be a key or a password in its addresses put as `[instead(it)]`.

    >>> public("asked https://me:pass@host/v1/sk-0a1b2c3d4e/score")
    'asked https://[key]@host/v1/[key]/score'
    """

    def struck(found: re.Match[str]) -> str:
        scheme, host, path, query = found.groups("")
        if "@" in host:
            host = f"[key]@{host.rpartition('@')[2]}"
        path = "/".join(f"[{instead(part)}]" if may_be_key(part) else part for part in path.split("/"))
        return scheme + host + path + (query if not query or _DIGEST.fullmatch(query) else "?[key]")

    return _ADDRESS.sub(struck, text) if "://" in text else text


def may_be_key(part: str) -> bool:
    """Whether a part of an address's path may be a key, and not a word such as `score` or `llama-3-8b`: it says so, or
    a piece of it is long, or long with digits, or turns between words, capitals and digits. `[0a1b2c3d4e5f]` is none.
    """
    part = unquote(part)
    return bool(_SAYS_KEY.search(part)) or any(
        len(piece) >= (10 if re.search(r"\d", piece) else 20) or len(_TURNS.findall(piece)) >= 5
        for piece in re.split(r"[-_.:~,+@%=]", _DIGEST_OF_PART.sub("", part))
    )


def remember(address: str) -> None:
    """Let `strike` know what may be a key in an address that is used: its server may repeat it."""
    for found in _ADDRESS.finditer(address):
        values = [value for pair in found[4][1:].split("&") for value in pair.split("=")[-1:]] if found[4] else []
        parts = [*filter(may_be_key, found[3].split("/")), *values]
        _IN_USED_ADDRESSES.update(way for part in parts for way in (part, unquote(part)) if len(way) >= _SHORTEST)


def strike(text: str) -> str:
    """The text as people may see it: without the environment's keys and known ones, and with public addresses."""
    keys = [value for name, value in os.environ.items() if _KEY_VARIABLE.search(name.upper())]
    secrets = {line for key in keys for line in key.splitlines()} | _IN_USED_ADDRESSES
    for secret in sorted(secrets, key=len, reverse=True):  # one may hold another
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, "[key]")
    return public(text)
