"""The tokenizer, seen from here: encoding without surprises, special ids, identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.storage import digest

# Texts are joined and tokenized in pieces of about this many characters, which bounds memory and
# lets a fast tokenizer use its threads. Ids can differ from one single call only at the borders.
PIECE = 1 << 18
# Digests of tokenizers by the sha256 of what they were read from.
_KNOWN: dict[str, str] = {}
MOST_KNOWN = 256


def encode(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    """Return the token ids of a text, never cut and never padded.

    Parameters
    ----------
    special
        Add what the tokenizer adds by default (often a start token).
    """
    found = tokenizer(
        text, add_special_tokens=special, truncation=False, padding=False, verbose=False
    )
    return list(found["input_ids"])


def encode_joined(tokenizer: Any, texts: Sequence[str], joiner: str) -> list[int]:
    """Return the ids of all texts joined into one, without special tokens."""
    ids: list[int] = []
    piece: list[str] = []
    size = 0
    for number, text in enumerate(texts):
        last = number == len(texts) - 1
        piece.append(text if last else text + joiner)
        size += len(piece[-1])
        if last or size >= PIECE:
            ids.extend(encode(tokenizer, "".join(piece)))
            piece, size = [], 0
    return ids


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids that stand for structure rather than text (start, end, chat marks...)."""
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(marked | set(tokenizer.all_special_ids))


def text_ids(tokenizer: Any, vocab_size: int) -> list[int]:
    """Return the ids that stand for text, sorted.

    Ids without a token (rows added to round the table up) and ids beyond the table are left out.
    """
    known = set(tokenizer.get_vocab().values()) - special_ids(tokenizer)
    return sorted(i for i in known if 0 <= i < vocab_size)


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raise when an id has no row in the embedding table of ``vocab_size`` rows."""
    for i in (max(ids, default=0), min(ids, default=0)):
        if not 0 <= i < vocab_size:
            raise UserError(
                "tokenizer",
                f"id {i} >= {vocab_size} rows of the embedding" if i > 0 else f"id {i} < 0",
                "wrong tokenizer for this model?",
            )


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the sha256 (hex) of everything that decides which ids a text becomes.

    The vocabulary, merges, normalization, added tokens and what is put around a text count. The
    padding and truncation state does not: it changes with every call and never touches our ids.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return _backend_digest(backend.to_str())
    probe = "A \u00e9\n  1,234 \u6f22 <unk>"
    return digest(
        {
            "class": type(tokenizer).__name__,
            "vocab": tokenizer.get_vocab(),
            "special": sorted(special_ids(tokenizer)),
            "probe": encode(tokenizer, probe, special=True),
        }
    )


def _backend_digest(text: str) -> str:
    """Return the digest of a tokenizer that was written out; texts seen before are not read again.

    Reading millions of characters of JSON takes several times as long as writing and hashing them.
    """
    name = hashlib.sha256(text.encode("utf-8")).hexdigest()
    if name not in _KNOWN:
        content = json.loads(text)
        content.pop("padding", None)
        content.pop("truncation", None)
        if len(_KNOWN) >= MOST_KNOWN:
            _KNOWN.clear()
        _KNOWN[name] = digest({"backend": content})
    return _KNOWN[name]
