"""Finished batches of generated text on disk, so that a killed run goes on where it was."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lm_calib_plugin.calibration.text_cache import Written
from lm_calib_plugin.storage import canonical_json, digest, require_space


@dataclass(frozen=True)
class Batch:
    """Texts written together and what they cost.

    ``first`` is the number of the first text, ``batch_size`` the size in force (smaller than
    asked after the device ran out of memory), ``tokens`` those written, ``seconds`` of writing.
    """

    first: int
    batch_size: int
    tokens: int
    seconds: float
    scoring_seconds: float
    texts: list[Written]


class Journal:
    """One line a batch, each with a digest over itself and the line before.

    Parameters
    ----------
    path
        The file; None keeps nothing. The caller holds the lock that goes with it.
    settings
        What decides the texts; a file of other settings is not read.

    Notes
    -----
    Reading ends at the first line that is torn or damaged, and the file is cut there: what the
    line held is written again, with the same result.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path = path
        self.batches: dict[int, Batch] = {}
        self._chain = digest(settings)
        if path is not None:
            self._read(path)

    def add(self, batch: Batch) -> None:
        """Append a batch; it is on the disk when this returns."""
        self.batches[batch.first] = batch
        if self.path is None:
            return
        body = canonical_json({**asdict(batch), "texts": [text.plain() for text in batch.texts]})
        self._chain = _link(self._chain, body)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        require_space(self.path.parent, 4 * len(body) + 4096, self.path.name)
        with self.path.open("ab") as stream:
            stream.write(f"{self._chain} {body}\n".encode())
            stream.flush()
            os.fsync(stream.fileno())

    def remove(self) -> None:
        """Delete the file, once the finished one is in place."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _read(self, path: Path) -> None:
        good = 0
        with contextlib.suppress(FileNotFoundError):
            content = path.read_bytes()
            for line, batch, chain in _sound_lines(content, self._chain):
                self.batches[batch.first] = batch
                self._chain = chain
                good += len(line)
            if good < len(content):
                os.truncate(path, good)


def journal_path(path: Path) -> Path:
    """Return the journal that belongs to a file of generated text."""
    return path.with_suffix(".partial")


def _link(chain: str, body: str) -> str:
    return hashlib.sha256((chain + body).encode()).hexdigest()


def _sound_lines(content: bytes, chain: str) -> Iterator[tuple[bytes, Batch, str]]:
    """Yield every whole line, its batch and its digest, up to the first that is not sound."""
    for line in content.splitlines(keepends=True):
        try:
            found, _, body = line.decode().removesuffix("\n").partition(" ")
            chain = _link(chain, body)
            if found != chain or not line.endswith(b"\n"):
                return
            values = json.loads(body)
            texts = [Written.of(text) for text in values.pop("texts")]
            batch = Batch(**values, texts=texts)
        except (ValueError, TypeError, AttributeError):
            return
        yield line, batch, chain
