"""Tokens, passwords and keys are taken out of what is published, wherever they were typed."""

from __future__ import annotations

import re
import shlex
from typing import Any

REDACTED = "REDACTED"

_HUB_TOKEN = re.compile(r"(?<!\w)hf_[A-Za-z0-9]{8,}")
_URL_USER = re.compile(r"(\w://)[^/\s@'\"]+@")
_NAME = r"(?<![\w.-])-*([A-Za-z_][\w.-]*)"
# A value inside a word ends where the next NAME= begins, or with the word.
_IN_WORD = re.compile(rf"{_NAME}=(.+?)(?=[,;&][A-Za-z_][\w.-]*=|[\]}})'\"`]*$)", re.S)
_IN_TEXT = re.compile(rf"{_NAME}=(\"[^\"]*\"|'[^']*'|[^\s,;&'\"`]+)")
_IN_JSON = re.compile(
    r"""(\\?["'])([\w.-]+)\1(\s*:\s*)("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|\\"[^"]*\\")"""
)
_FLAG = re.compile(r"--?[A-Za-z][\w.-]*")
_FLAG_IN_TEXT = re.compile(r"(?<!\S)(--?[A-Za-z][\w.-]*)(\s+)(\"[^\"]*\"|'[^']*'|[^\s-]\S*)")
_PARTS = re.compile(r"[^A-Za-z0-9]+|(?<=[a-z])(?=[A-Z])")
_ALWAYS = ("password", "passwd", "passphrase", "pwd", "secret", "credential", "apikey")
# A single token of a text, and not one that opens a door.
_OF_TEXT = re.compile(
    "bos|eos|pad|unk|sep|cls|mask|stop|start|end|first|last|prefix|suffix|special|image|type|ids?"
    "|per|new"
)
_SAYS_NOTHING = re.compile(r"(?i)true|false|none|null|yes|no|on|off|auto")


def without_secrets(value: Any) -> Any:
    """Return plain values in which what opens a door is replaced by ``REDACTED``.

    That are values of names such as ``token``, ``password``, ``client_secret`` and ``api_key``,
    tokens of the hub (``hf_...``), and user and password in a URL. Numbers of tokens
    (``max_new_tokens``) and tokens of a text (``bos_token``) stay.

    Parameters
    ----------
    value
        A text, such as a command with everything nested in it; or numbers, lists and mappings
        of texts. The name ``key`` alone is no secret in a mapping: records have digests there.
    """
    if isinstance(value, dict):
        return {
            without_secrets(name): REDACTED
            if isinstance(part, str) and name != "key" and _secret(str(name), part)
            else without_secrets(part)
            for name, part in value.items()
        }
    if isinstance(value, (list, tuple)):
        return _words(list(value))
    return _text(value) if isinstance(value, str) else value


def _words(words: list[Any]) -> list[Any]:
    """Redact the words of a command line; behind ``--token`` the next one."""
    found = []
    for before, word in zip(["", *words], words, strict=False):
        flag = isinstance(before, str) and _FLAG.fullmatch(before)
        if flag and isinstance(word, str) and not _FLAG.match(word) and _secret(before, word):
            found.append(REDACTED)
        else:
            found.append(_word(word, _IN_WORD) if isinstance(word, str) else without_secrets(word))
    return found


def _text(text: str) -> str:
    try:
        words = shlex.split(text)
    except ValueError:
        words = []
    if shlex.join(words) == text:
        return shlex.join(_words(words))
    return _word(text, _IN_TEXT)


def _word(text: str, assigned: re.Pattern[str]) -> str:
    text = _FLAG_IN_TEXT.sub(
        lambda m: m[1] + m[2] + REDACTED if _secret(m[1], m[3]) else m[0], text
    )
    text = _IN_JSON.sub(
        lambda m: f'{m[1]}{m[2]}{m[1]}{m[3]}"{REDACTED}"' if _secret(m[2], m[4][1:-1]) else m[0],
        text,
    )
    place = 0
    # A value may hold further names: look into those that are shown.
    while match := assigned.search(text, place):
        if _secret(match[1], match[2]):
            text = text[: match.start(2)] + REDACTED + text[match.end(2) :]
            place = match.start(2) + len(REDACTED)
        else:
            place = match.start(2)
    return _HUB_TOKEN.sub(REDACTED, _URL_USER.sub(rf"\1{REDACTED}@", text))


def _secret(name: str, value: str) -> bool:
    """Tell whether a name is one of secrets, and the value may be one."""
    if _SAYS_NOTHING.fullmatch(value):
        return False
    parts = [part.lower() for part in _PARTS.split(name) if part]
    if any(word in part for part in parts for word in _ALWAYS):
        return True
    if any(part.endswith("token") for part in parts):
        return not any(map(_OF_TEXT.fullmatch, parts))
    return bool(parts) and parts[-1] in ("key", "keys")
