"""Reading a bank: statistics of any weighting of its sequences, without a forward pass."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lm_calib_plugin import storage
from lm_calib_plugin.bank.layout import (
    FORMAT,
    FORMAT_VERSION,
    HEADER,
    PLAN,
    SETS,
    Header,
    InputRow,
    gram_key,
)
from lm_calib_plugin.bank.packed import unpack
from lm_calib_plugin.calibration import CalibrationSet
from lm_calib_plugin.errors import CalibError, UserError, listed
from lm_calib_plugin.statistics import Gram, LayerStats, Moments

REMEMBERED = 256 * 2**20  # bytes of unpacked Gram matrices


class Bank:
    """An open statistics bank.

    A calibration set is a vector ``weights`` of one non-negative number per sequence of the bank,
    float64 ``[sequences]``: how many times each counts.
    """

    def __init__(self, folder: Path, header: Header) -> None:
        self.folder, self.header = folder, header
        self._open: dict[int, Any] = {}
        self._grams: OrderedDict[tuple[str, bytes], Gram] = OrderedDict()
        self._rows = torch.tensor([row.part for row in header.sequences])
        self._groups = torch.tensor([row.group for row in header.sequences])
        self._base = torch.tensor([row.weight for row in header.sequences], dtype=torch.float64)

    @classmethod
    def open(cls, folder: str | Path) -> Bank:
        """Open a finished bank.

        Raises
        ------
        CalibError
            When it is missing, unfinished, damaged or of a newer format.
        """
        folder = Path(folder)
        file = folder / HEADER
        if not file.exists():
            begun = (folder / PLAN).exists()
            raise CalibError(
                f"{folder}: "
                + (
                    "a bank that is not finished; run the same command again."
                    if begun
                    else "no statistics bank; build one with lm-calib bank."
                )
            )
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise KeyError("format")
            version = int(content["format_version"])
            if version > FORMAT_VERSION:
                raise CalibError(
                    f"{file}: written in format {version}, this build reads up to "
                    f"{FORMAT_VERSION}; upgrade lm-calib-plugin."
                )
            header = Header.from_json(content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(file, f"{type(error).__name__}: {error}") from None
        bank = cls(folder, header)
        for index, entry in header.files.items():
            if not bank._path(entry["name"]).is_file():
                raise _damaged(bank._path(entry["name"]), f"the file of block {index} is missing")
        return bank

    def require_model(self, digest: str) -> None:
        """Raise a UserError unless the bank was filled by the model with this digest."""
        if digest != self.header.model:
            raise UserError(
                "bank",
                f"{self.folder} was built with model {self.header.model[:12]}, this one is "
                f"{digest[:12]}",
                "the same weights and configuration",
                "name that model, or build a bank for this one with lm-calib bank",
            )

    # --- what is in it -------------------------------------------------------------------

    @property
    def inputs(self) -> tuple[InputRow, ...]:
        """Every distinct layer input, in the order of the model."""
        return self.header.inputs

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return len(self.header.sequences)

    def part(self, source: str, fold: str) -> int:
        """Return the number of a part.

        Raises
        ------
        UserError
            When the bank does not hold it.
        """
        names = [(part.source, part.fold) for part in self.header.parts]
        if (source, fold) not in names:
            raise UserError(
                "bank",
                f"no `{source}` in fold {fold}",
                f"it holds: {listed(f'{s} ({f})' for s, f in names)}",
            )
        return names.index((source, fold))

    def rows(self, source: str, fold: str) -> Tensor:
        """Return the numbers of the sequences of a part, int64."""
        return (self._rows == self.part(source, fold)).nonzero()[:, 0]

    def mixture(self, shares: Mapping[str, float], fold: str) -> Tensor:
        """Return the weights of a mix: ``shares`` are fractions of the sequences by source."""
        weights = torch.zeros(self.sequences, dtype=torch.float64)
        for source, share in shares.items():
            rows = self.rows(source, fold)
            weights[rows] = share / len(rows) * self.sequences
        return weights

    def spread(self, source: str, fold: str, counts: Tensor) -> Tensor:
        """Return weights of all sequences from those of a part, ``[..., pool]``; others are 0."""
        rows = self.rows(source, fold)
        weights = torch.zeros(*counts.shape[:-1], self.sequences, dtype=torch.float64)
        weights[..., rows] = counts
        return weights

    def calibration(self, source: str, fold: str, counts: Tensor) -> CalibrationSet:
        """Return the sequences of a part that count, weighted, as a set to compress with.

        Parameters
        ----------
        counts
            How many times each sequence of the part counts, ``[pool]``, not all 0.
        """
        stored = CalibrationSet.load(self.folder / SETS / f"{self.part(source, fold):03d}")
        base = torch.tensor(stored.weights or (1.0,) * stored.nsamples, dtype=torch.float64)
        weights = counts.double() * base
        kept = weights.nonzero()[:, 0].tolist()
        return CalibrationSet.of(
            [stored.sequences[i] for i in kept],
            seqlen=stored.seqlen,
            seed=stored.seed,
            tokenizer=stored.tokenizer,
            sources=[{"source": f"{source} ({fold})", "nsequences": len(kept), "indices": kept}],
            weights=[float(weights[i]) for i in kept],
        )

    # --- statistics ----------------------------------------------------------------------

    def energy(self, row: InputRow) -> Tensor:
        """Return ``sum_t x_tj^2`` of every sequence, float32 ``[sequences, in]``."""
        return self._tensor(row, f"{row.name}.energy")

    def maximum(self, row: InputRow) -> Tensor:
        """Return ``max_t |x_tj|`` of every sequence, bfloat16 ``[sequences, in]``."""
        return self._tensor(row, f"{row.name}.maximum")

    def mean(self, row: InputRow) -> Tensor:
        """Return ``mean_t |x_tj|`` of every sequence, bfloat16 ``[sequences, in]``."""
        return self._tensor(row, f"{row.name}.mean")

    def moments(
        self, row: InputRow, weights: Tensor, device: torch.device | str = "cpu"
    ) -> Moments:
        """Return the second moments under ``weights``."""
        stats = Moments.empty(row.width, device)
        stats.sum_squares = self.energies(row, weights).to(device)
        stats.tokens = self._tokens(weights)
        return stats

    def energies(self, row: InputRow, weights: Tensor) -> Tensor:
        """Return the energies under many weightings ``[n, sequences]``, float64 ``[n, in]``."""
        used = (weights != 0).reshape(-1, self.sequences).any(0)
        return (weights * self._base)[..., used] @ self.energy(row)[used].double()

    def gram(self, row: InputRow, weights: Tensor, device: torch.device | str = "cpu") -> Gram:
        """Return the Gram matrix under ``weights``, which must be equal inside each group.

        The matrices of the last calls are kept (up to :data:`REMEMBERED` bytes): leave what comes
        back as it is.

        Raises
        ------
        UserError
            When sequences of one group have different weights: the bank keeps one Gram matrix
            for all of them.
        """
        key = (f"{row.name} {device}", weights.numpy().tobytes())
        if key in self._grams:
            self._grams.move_to_end(key)
            return self._grams[key]
        total: Tensor | None = None
        for cell, share in self.cell_weights(weights).items():
            # The file is mapped: what is read from it must not be changed in place.
            triangle = self._tensor(row, gram_key(row.name, *cell))
            total = triangle * share if total is None else total.add_(triangle, alpha=share)
        if total is None:
            return Gram.empty(row.width, device)
        stats = _gram(unpack(total.to(device), row.width), self._tokens(weights))
        self._grams[key] = stats
        while sum(kept.matrix.nbytes for kept in self._grams.values()) > REMEMBERED:
            self._grams.popitem(last=False)
        return stats

    def grams(
        self,
        row: InputRow,
        shares: Sequence[Mapping[tuple[int, int], float]],
        device: torch.device | str = "cpu",
    ) -> Iterator[Gram]:
        """Yield the Gram matrix of each of many weightings; every triangle is read once.

        ``shares`` are weights of (part, group), as :meth:`cell_weights` returns them, at least
        one each.
        """
        cells = sorted({cell for own in shares for cell in own})
        triangles = torch.stack([self._tensor(row, gram_key(row.name, *cell)) for cell in cells])
        triangles = triangles.to(device)
        for own in shares:
            factors = torch.tensor([own.get(cell, 0.0) for cell in cells], device=device)
            yield _gram(unpack(factors @ triangles, row.width), len(own))

    def statistics(
        self,
        row: InputRow,
        kind: str,
        weights: Tensor | None,
        device: torch.device | str = "cpu",
    ) -> LayerStats | None:
        """Return the statistics of the kind a method asks for; None for ``none``."""
        if kind == "none" or weights is None:
            return None
        if kind == "gram":
            return self.gram(row, weights, device)
        return self.moments(row, weights, device)

    def cell_weights(self, weights: Tensor) -> dict[tuple[int, int], float]:
        """Return the weight of every (part, group) that counts at all."""
        found: dict[tuple[int, int], float] = {}
        used = torch.stack([self._rows, self._groups])[:, weights != 0].unique(dim=1)
        for part, group in used.t().tolist():
            row = self.header.parts[part]
            own = weights[(self._rows == part) & (self._groups == group)]
            if not row.second_order:
                raise UserError(
                    "bank",
                    f"`{row.source}` ({row.fold}) has no Gram matrices in this bank",
                    "methods that need input norms alone, such as wanda",
                    "build the bank for a second-order method",
                )
            if not torch.allclose(own, own[0].expand_as(own)):
                raise UserError(
                    "bank",
                    f"sequences of one group of `{row.source}` ({row.fold}) are weighted "
                    "differently",
                    f"this bank keeps Gram matrices of {row.groups} groups",
                    "build it with more groups (--groups 16)",
                )
            found[part, group] = float(own[0])
        return found

    def _tokens(self, weights: Tensor) -> int:
        counts = torch.tensor([row.tokens for row in self.header.sequences])
        return max(round(float((weights * counts).sum())), int(bool((weights > 0).any())))

    def _path(self, name: str) -> Path:
        # A name from a file must not lead out of the folder.
        return self.folder / Path(name).name

    def _tensor(self, row: InputRow, key: str) -> Tensor:
        if row.block not in self._open:
            entry = self.header.files[str(row.block)]
            path = self._path(entry["name"])
            found = storage.file_digest(path)
            if found != entry["sha256"]:
                raise _damaged(path, f"expected sha256 {entry['sha256']}, found {found}")
            self._open[row.block] = safe_open(path, "pt")
        return self._open[row.block].get_tensor(key)


def _gram(matrix: Tensor, tokens: int) -> Gram:
    stats = Gram.empty(0, matrix.device)
    stats.in_features, stats.matrix, stats.tokens = matrix.shape[0], matrix, tokens
    return stats


def require_sources(bank: Bank, sources: Sequence[str], fold: str) -> None:
    """Raise a UserError for the first source that is not in the bank."""
    for source in sources:
        bank.part(source, fold)


def _damaged(file: Path, what: str) -> CalibError:
    return CalibError(f"{file}: damaged: {what}; delete {file.parent} and build the bank again.")
