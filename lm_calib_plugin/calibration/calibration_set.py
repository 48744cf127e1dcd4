"""The calibration set: token ids with an identity, kept in one readable file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm_calib_plugin.errors import CalibError
from lm_calib_plugin.storage import digest, write_text

FORMAT = "lm-calib-plugin calibration set"
FORMAT_VERSION = 1
_LONG_LISTS = ("indices", "rows", "chosen")


def identity(
    tokenizer: str, sequences: Iterable[Sequence[int]], weights: Sequence[float] | None = None
) -> str:
    """Return the ``calib_id``: sha256 of the canonical JSON of tokenizer digest and ids.

    Weights count when there are any.
    """
    content: dict[str, Any] = {"tokenizer": tokenizer, "ids": [list(ids) for ids in sequences]}
    if weights is not None:
        content["weights"] = list(weights)
    return digest(content)


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Token-id sequences that a model is calibrated with.

    Parameters
    ----------
    sequences
        CPU int64 tensors of one dimension, 1 to ``seqlen`` ids each. Sequences shorter than
        ``seqlen`` stand as they are; pads are never stored.
    calib_id
        sha256 over tokenizer digest and ids: equal ids have an equal name, whatever file or
        seed they came from.
    sources
        One mapping per term of the calibration expression: ``source`` (canonical text),
        ``nsequences``, ``pack``, ``licence`` (a note or None), ``fingerprint``, ``documents``
        (how many were seen), ``indices`` (what was drawn), ``rows`` (which of ``sequences`` are
        its own), and facts of the source.
    seqlen
        Most tokens of a sequence.
    seed
        Seed of the draw.
    tokenizer
        Digest of the tokenizer; see :func:`~lm_calib_plugin.calibration.tokenizer_digest`.
    weights
        One positive number per sequence: its tokens count so many times in every statistic.
        None: all count once.
    """

    sequences: tuple[Tensor, ...]
    calib_id: str
    sources: tuple[dict[str, Any], ...]
    seqlen: int
    seed: int
    tokenizer: str = ""
    weights: tuple[float, ...] | None = None

    @classmethod
    def of(
        cls,
        sequences: Iterable[Sequence[int] | Tensor],
        *,
        seqlen: int,
        seed: int = 0,
        tokenizer: str = "",
        sources: Iterable[dict[str, Any]] = (),
        weights: Iterable[float] | None = None,
    ) -> CalibrationSet:
        """Make a set from ids and name it.

        Raises
        ------
        ValueError
            When a sequence is empty, longer than ``seqlen``, or not one-dimensional, or when
            there is not one positive finite weight for each.
        """
        tensors = tuple(torch.as_tensor(ids, dtype=torch.int64).cpu() for ids in sequences)
        for number, ids in enumerate(tensors):
            if ids.dim() != 1 or not 1 <= len(ids) <= seqlen:
                raise ValueError(
                    f"sequence {number} has shape {tuple(ids.shape)}; 1 to {seqlen} ids are needed"
                )
        shares = _weights(weights, len(tensors))
        calib_id = identity(tokenizer, (ids.tolist() for ids in tensors), shares)
        return cls(tensors, calib_id, tuple(sources), seqlen, seed, tokenizer, shares)

    @property
    def nsamples(self) -> int:
        """Number of sequences."""
        return len(self.sequences)

    @property
    def tokens(self) -> int:
        """Number of tokens of all sequences."""
        return sum(len(ids) for ids in self.sequences)

    def summary(self) -> dict[str, Any]:
        """Return plain values for a report: everything but ids and long lists of indices."""
        short = [{k: v for k, v in s.items() if k not in _LONG_LISTS} for s in self.sources]
        return {
            "calib_id": self.calib_id,
            "sources": short,
            "nsamples": self.nsamples,
            "seqlen": self.seqlen,
            "tokens": self.tokens,
        }

    def save(self, path: str | Path) -> None:
        """Write the set to one JSON file; the file appears whole or not at all."""
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "calib_id": self.calib_id,
            "tokenizer": self.tokenizer,
            "seqlen": self.seqlen,
            "seed": self.seed,
            "sources": list(self.sources),
            "sequences": [ids.tolist() for ids in self.sequences],
            "weights": self.weights,
        }
        text = json.dumps({"digest": digest(content), **content}, allow_nan=False)
        write_text(Path(path), text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> CalibrationSet:
        """Read a set back.

        Raises
        ------
        CalibError
            When the file is missing, damaged (expected and found digest are named) or written
            by a newer version.
        """
        file = Path(path)
        content = _read(file)
        expected = content.pop("digest", None)
        version = content.get("format_version")
        if content.get("format") != FORMAT or not isinstance(version, int):
            raise CalibError(f"{file}: not a calibration set.")
        if version > FORMAT_VERSION:
            raise CalibError(
                f"{file}: written in format {version}, this build reads up to {FORMAT_VERSION}; "
                "upgrade lm-calib-plugin."
            )
        found = digest(content)
        if found != expected:
            raise _damaged(file, f"expected digest {expected}, found {found}")
        made = cls.of(
            content["sequences"],
            seqlen=content["seqlen"],
            seed=content["seed"],
            tokenizer=content["tokenizer"],
            sources=content["sources"],
            weights=content["weights"],
        )
        if made.calib_id != content["calib_id"]:
            raise _damaged(file, f"expected calib_id {content['calib_id']}, found {made.calib_id}")
        return made


def _weights(weights: Iterable[float] | None, count: int) -> tuple[float, ...] | None:
    """Return checked weights; None when all are one, which is the same set."""
    if weights is None:
        return None
    values = tuple(float(w) for w in weights)
    if len(values) != count or not all(0 < w < math.inf for w in values):
        raise ValueError(f"{count} positive weights are needed, got {values}")
    return None if all(w == 1 for w in values) else values


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise CalibError(f"{file}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise _damaged(file, "expected JSON text, found other bytes") from None
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        what = f"expected one JSON object, found none ({error.msg}, character {error.pos})"
        raise _damaged(file, what) from None
    if not isinstance(content, dict):
        raise _damaged(file, f"expected a JSON object, found a {type(content).__name__}")
    return content


def _damaged(file: Path, what: str) -> CalibError:
    return CalibError(f"{file}: damaged: {what}; delete it and make it again.")
