"""Generated text kept as readable JSON lines that prove themselves when read back."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lm_calib_plugin.storage import cache_dir, digest, write_text

FORMAT = "lm-calib-plugin self-generated text"


@dataclass(frozen=True)
class Written:
    """One generated text.

    Parameters
    ----------
    text
        What a reader sees; with special tokens where those are used.
    tokens
        Tokens the model wrote.
    finished
        Whether the model ended the text by itself.
    perplexity
        exp of the mean negative log-likelihood by the model; None for a text too short to score.
    dropped
        Why the text is not used (:data:`...guards.REASONS`); empty: it is used.
    ids
        Token ids, of a source whose ids are used as they were written.
    """

    text: str
    tokens: int
    finished: bool
    perplexity: float | None
    dropped: str = ""
    ids: tuple[int, ...] = ()

    @property
    def kept(self) -> bool:
        """Whether the text is used."""
        return not self.dropped

    def plain(self) -> dict[str, Any]:
        """Return the text as JSON values."""
        values = asdict(self)
        ids = values.pop("ids")
        return values | ({"ids": list(ids)} if ids else {})

    @classmethod
    def of(cls, values: dict[str, Any]) -> Written:
        """Return the text of JSON values; TypeError when they are of another kind."""
        return cls(**{**values, "ids": tuple(values.get("ids", ()))})


def cache_path(settings: dict[str, Any]) -> Path:
    """Return the file of generated text with these settings."""
    return cache_dir() / "self-generated" / f"{digest(settings)}.jsonl"


def keep(
    path: Path, settings: dict[str, Any], statistics: dict[str, Any], texts: list[Written]
) -> None:
    """Write a header line and one line per text, atomically."""
    body = "".join(json.dumps(text.plain(), ensure_ascii=False) + "\n" for text in texts)
    header = {
        "format": FORMAT,
        "digest": _digest(settings, statistics, body),
        "settings": settings,
        "statistics": statistics,
    }
    write_text(path, json.dumps(header) + "\n" + body)


def recall(
    path: Path, settings: dict[str, Any]
) -> tuple[tuple[dict[str, Any], list[Written]] | None, str]:
    """Return statistics and texts, or None; and what is wrong with the file, if anything.

    A file that is not there is nothing wrong.
    """
    try:
        head, _, body = path.read_bytes().decode("utf-8").partition("\n")
    except FileNotFoundError:
        return None, ""
    except (OSError, UnicodeDecodeError) as error:
        return None, f"{path.name} cannot be read ({error})"
    try:
        header = json.loads(head)
        expected, statistics = header["digest"], header["statistics"]
        found = _digest(header["settings"], statistics, body)
        if found != expected or header["settings"] != settings:
            return None, f"{path.name} is damaged: expected digest {expected}, found {found}"
        # Not splitlines(): generated text may hold other line separators.
        texts = [Written.of(json.loads(line)) for line in body.split("\n") if line]
    except (ValueError, KeyError, TypeError) as error:
        return None, f"{path.name} is damaged: {type(error).__name__}: {error}"
    return (statistics, texts), ""


def _digest(settings: dict[str, Any], statistics: dict[str, Any], body: str) -> str:
    whole = digest({"settings": settings, "statistics": statistics})
    return hashlib.sha256((whole + body).encode("utf-8")).hexdigest()
