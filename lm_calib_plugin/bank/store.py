"""Reading a bank: statistics of any weighting of its sequences, without a forward pass."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lm_calib_plugin import storage
from lm_calib_plugin.bank.layout import (
    FORMAT,
    FORMAT_VERSION,
    HEADER,
    PLAN,
    Header,
    InputRow,
    gram_key,
)
from lm_calib_plugin.bank.packed import unpack
from lm_calib_plugin.errors import CalibError, UserError, listed
from lm_calib_plugin.statistics import Gram, LayerStats, Moments


class Bank:
    """An open statistics bank.

    A calibration set is a vector ``weights`` of one non-negative number per sequence of the bank,
    float64 ``[sequences]``: how many times each counts.
    """

    def __init__(self, folder: Path, header: Header) -> None:
        self.folder, self.header = folder, header
        self._checked: set[int] = set()
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

    def moments(self, row: InputRow, weights: Tensor) -> Moments:
        """Return the second moments under ``weights``."""
        stats = Moments.empty(row.width)
        stats.sum_squares = (weights * self._base) @ self.energy(row).double()
        stats.tokens = self._tokens(weights)
        return stats

    def energies(self, row: InputRow, weights: Tensor) -> Tensor:
        """Return the energies under many weightings ``[n, sequences]``, float64 ``[n, in]``."""
        return (weights * self._base) @ self.energy(row).double()

    def gram(self, row: InputRow, weights: Tensor) -> Gram:
        """Return the Gram matrix under ``weights``, which must be equal inside each group.

        Raises
        ------
        UserError
            When sequences of one group have different weights: the bank keeps one Gram matrix
            for all of them.
        """
        stats = Gram.empty(row.width)
        total: Tensor | None = None
        for (part, group), share in self.cell_weights(weights).items():
            triangle = self._tensor(row, gram_key(row.name, part, group))
            total = triangle * share if total is None else total.add_(triangle, alpha=share)
        if total is not None:
            stats.matrix = unpack(total, row.width)
        stats.tokens = self._tokens(weights)
        return stats

    def statistics(self, row: InputRow, kind: str, weights: Tensor) -> LayerStats | None:
        """Return the statistics of the kind a method asks for; None for ``none``."""
        if kind == "none":
            return None
        return self.moments(row, weights) if kind == "moments" else self.gram(row, weights)

    def cell_weights(self, weights: Tensor) -> dict[tuple[int, int], float]:
        """Return the weight of every (part, group) that counts at all."""
        found: dict[tuple[int, int], float] = {}
        for part, row in enumerate(self.header.parts):
            for group in range(row.groups):
                own = weights[(self._rows == part) & (self._groups == group)]
                if not len(own) or not bool((own != 0).any()):
                    continue
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
        entry = self.header.files[str(row.block)]
        path = self._path(entry["name"])
        if row.block not in self._checked:
            found = storage.file_digest(path)
            if found != entry["sha256"]:
                raise _damaged(path, f"expected sha256 {entry['sha256']}, found {found}")
            self._checked.add(row.block)
        with safe_open(path, "pt") as file:
            return file.get_tensor(key)


def require_sources(bank: Bank, sources: Sequence[str], fold: str) -> None:
    """Raise a UserError for the first source that is not in the bank."""
    for source in sources:
        bank.part(source, fold)


def _damaged(file: Path, what: str) -> CalibError:
    return CalibError(f"{file}: damaged: {what}; delete {file.parent} and build the bank again.")
