"""The calibration set: token ids with an identity, kept in a folder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm_calib_plugin.calibration.set_folder import damaged_identity, read_set, write_set
from lm_calib_plugin.storage import digest

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
        short = [_short(source) for source in self.sources]
        return {
            "calib_id": self.calib_id,
            "sources": short,
            "nsamples": self.nsamples,
            "seqlen": self.seqlen,
            "tokens": self.tokens,
        }

    def save(
        self,
        folder: str | Path,
        *,
        tokenizer: Any = None,
        vocab_size: int | None = None,
        factors: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the set to a new folder; see :mod:`lm_calib_plugin.calibration.set_folder`.

        Raises
        ------
        UserError
            When something is there already.
        """
        write_set(
            self,
            Path(folder),
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            factors=factors,
            overwrite=overwrite,
        )

    @classmethod
    def load(cls, folder: str | Path) -> CalibrationSet:
        """Read a set back; every changed byte is noticed.

        Raises
        ------
        UserError
            When the folder is missing, holds no set, or was written by a newer version.
        CalibError
            When a file is damaged; it is named, with what was expected and found.
        """
        place = Path(folder)
        content, sequences, weights = read_set(place)
        try:
            made = cls.of(
                sequences,
                seqlen=content["seqlen"],
                seed=content["seed"],
                tokenizer=content["tokenizer"],
                sources=content["sources"],
                weights=weights,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise damaged_identity(place, str(content.get("calib_id")), str(error)) from None
        if made.calib_id != content["calib_id"]:
            raise damaged_identity(place, content["calib_id"], made.calib_id)
        return made


def _short(record: dict[str, Any]) -> dict[str, Any]:
    """Leave the long lists out of the record of a term and of the terms inside it."""
    short = {key: value for key, value in record.items() if key not in _LONG_LISTS}
    return short | ({"inner": [_short(r) for r in short["inner"]]} if "inner" in short else {})


def _weights(weights: Iterable[float] | None, count: int) -> tuple[float, ...] | None:
    """Return checked weights; None when all are one, which is the same set."""
    if weights is None:
        return None
    values = tuple(float(w) for w in weights)
    if len(values) != count or not all(0 < w < math.inf for w in values):
        raise ValueError(f"{count} positive weights are needed, got {values}")
    return None if all(w == 1 for w in values) else values
