"""What another draw would have done: masks and errors of resampled calibration sets."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lm_calib_plugin import engine
from lm_calib_plugin.bank.errors import layers_by_input, spread_rows
from lm_calib_plugin.bank.layout import InputRow
from lm_calib_plugin.bank.store import Bank
from lm_calib_plugin.calibration import CalibrationSet
from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.method import Method
from lm_calib_plugin.statistics import LayerStats, Moments, output_error

DRAWS = 200
ROWS = 16  # output rows of a layer that are looked at, when rows do not depend on each other
FEWEST_GROUPS = 16
_ELEMENTS = 2**21  # weights of several draws compressed at a time, where that is possible


@dataclass(frozen=True)
class LayerDraws:
    """One layer over all draws.

    ``flip`` is the probability that two draws disagree about a weight (kept or removed; or its
    level), averaged over the weights looked at and over neighboring draws; ``jaccard`` the mean
    overlap of what two draws remove (None for quantization); ``errors`` the relative output error
    on every judged domain, float64 ``[draws, domains]``.
    """

    name: str
    flip: float
    jaccard: float | None
    errors: Tensor


@dataclass(frozen=True, eq=False)
class Draws:
    """Resampled calibration sets of one source.

    Parameters
    ----------
    source, fold
        What was resampled.
    nsamples
        Sequences of each draw, as asked. Second-order methods draw whole groups of sequences.
    domains
        What the errors were judged on.
    layers
        One entry per layer.
    rows
        Output rows looked at in each layer; None: all.
    counts
        How often each sequence of the pool stands in each draw, float64 ``[draws, pool]``.
    seed
        Of the resampling.
    seconds
        What it took.
    """

    source: str
    fold: str
    nsamples: int
    domains: tuple[str, ...]
    layers: tuple[LayerDraws, ...]
    rows: int | None
    counts: Tensor
    seed: int
    seconds: float

    @property
    def draws(self) -> int:
        """Number of draws."""
        return int(self.counts.shape[0])

    @property
    def pool(self) -> int:
        """Number of sequences that were resampled."""
        return int(self.counts.shape[1])

    @property
    def flip(self) -> float:
        """Mean over layers of the probability that two draws disagree about a weight."""
        return sum(layer.flip for layer in self.layers) / len(self.layers)

    @property
    def jaccard(self) -> float | None:
        """Mean over layers of the overlap of what two draws remove."""
        values = [layer.jaccard for layer in self.layers if layer.jaccard is not None]
        return sum(values) / len(values) if values else None

    def errors(self, domain: str) -> Tensor:
        """Return E_g of every draw: relative errors summed over layers, ``[draws]``."""
        column = self.domains.index(domain)
        return torch.stack([layer.errors[:, column] for layer in self.layers]).nansum(0)

    def relative_spread(self, domain: str) -> float:
        """Return the standard deviation over draws of E_g, relative to its mean.

        Exactly 0 when all draws give the same errors.
        """
        errors = self.errors(domain)
        # Rounding in the mean would make a tiny spread of equal numbers.
        same = bool((errors == errors[0]).all())
        return 0.0 if same else float(errors.std() / errors.mean())

    def percentile_draw(self, domain: str, percent: float) -> int:
        """Return the number of the draw at a percentile of E_g, for a full evaluation."""
        order = self.errors(domain).argsort(stable=True)
        return int(order[round(percent / 100 * (len(order) - 1))])

    def calibration(self, bank: Bank, number: int) -> CalibrationSet:
        """Return a draw as a calibration set: the sequences it holds, weighted by their count."""
        return bank.calibration(self.source, self.fold, self.counts[number])

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "source": self.source,
            "fold": self.fold,
            "pool": self.pool,
            "nsamples": self.nsamples,
            "draws": self.draws,
            "seed": self.seed,
            "rows": self.rows,
            "seconds": round(self.seconds, 3),
            "flip": self.flip,
            "jaccard": self.jaccard,
            "domains": {
                d: {
                    "mean": float(self.errors(d).mean()),
                    "relative_spread": self.relative_spread(d),
                    "errors": self.errors(d).tolist(),
                    "draws": {str(p): self.percentile_draw(d, p) for p in (10, 50, 90)},
                }
                for d in self.domains
            },
            "layers": [{"name": x.name, "flip": x.flip, "jaccard": x.jaccard} for x in self.layers],
        }


def resampled(total: int, size: int, draws: int, seed: int) -> Tensor:
    """Return how often each of ``total`` items stands in each draw of ``size`` items.

    Drawn with replacement (the bootstrap), float64 ``[draws, total]``.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "draws"))
    picked = torch.randint(total, (draws, size), generator=generator)
    counts = torch.zeros(draws, total, dtype=torch.float64)
    return counts.scatter_add_(1, picked, torch.ones_like(picked, dtype=torch.float64))


def draw_uncertainty(
    bank: Bank,
    layers: Sequence[engine.TargetLayer],
    method: Method,
    source: str,
    *,
    fold: str = "choose",
    nsamples: int,
    domains: Sequence[str] = (),
    judge_fold: str = "judge",
    draws: int = DRAWS,
    rows: int | None = ROWS,
    seed: int = 0,
    progress: bool = False,
) -> Draws:
    """Compress with many resampled draws and compare what comes out, without a forward pass.

    Parameters
    ----------
    source, fold
        Part of the bank that draws are taken from, with replacement; the larger its pool compared
        with ``nsamples``, the better the bootstrap stands for new text.
    nsamples
        Sequences of a draw.
    domains
        Judged on their ``judge_fold``; default: none, masks only.
    draws
        How many.
    rows
        How many output rows of a layer are looked at, evenly spread, for methods whose rows do
        not depend on each other; None: all of them.

    Raises
    ------
    UserError
        When the bank cannot resample the source for this method, or holds other layers.
    """
    began = time.perf_counter()
    for name, value, least in (("draws", draws, 2), ("nsamples", nsamples, 1), ("rows", rows, 1)):
        if value is not None and value < least:
            raise UserError(name, f"got {value}", f"{least} or more")
    counts = _counts(bank, method, source, fold, nsamples, draws, seed)
    judges = {domain: bank.mixture({domain: 1.0}, judge_fold) for domain in domains}
    sample = rows if method.rows_independent else None
    work = _Work(bank, method, bank.spread(source, fold, counts))
    found: list[LayerDraws] = []
    inputs = layers_by_input(bank, layers)
    for row, own in tqdm(inputs, desc=f"{draws} draws of {source}", disable=not progress):
        device = own[0].device
        grams = [bank.gram(row, weights, device).gram() for weights in judges.values()]
        tallies = [_Tally(layer, method, grams, sample) for layer in own]
        work.compress(row, tallies, device)
        found += [tally.result(draws) for tally in tallies]
    return Draws(
        source,
        fold,
        nsamples,
        tuple(domains),
        tuple(found),
        sample,
        counts,
        seed,
        time.perf_counter() - began,
    )


def _counts(
    bank: Bank, method: Method, source: str, fold: str, nsamples: int, draws: int, seed: int
) -> Tensor:
    """Return how often each sequence of the part stands in each draw, ``[draws, pool]``."""
    part = bank.part(source, fold)
    rows = bank.rows(source, fold)
    if method.statistic != "gram":
        return resampled(len(rows), nsamples, draws, seed)
    groups = bank.header.parts[part].groups
    if groups < FEWEST_GROUPS or not bank.header.parts[part].second_order:
        raise UserError(
            "bank",
            f"`{source}` ({fold}) is kept in {groups} groups"
            if bank.header.parts[part].second_order
            else f"`{source}` ({fold}) has no Gram matrices",
            f"draws of a second-order method need {FEWEST_GROUPS} groups or more",
            f"build the bank with --groups {FEWEST_GROUPS}",
        )
    # Whole groups are drawn: as many as hold the sequences asked for.
    size = max(1, round(nsamples * groups / len(rows)))
    drawn = resampled(groups, size, draws, seed)
    return drawn[:, [bank.header.sequences[int(i)].group for i in rows]]


class _Tally:
    """One layer over the draws, of which results arrive one after another."""

    def __init__(
        self,
        layer: engine.TargetLayer,
        method: Method,
        grams: Sequence[Tensor],
        sample: int | None,
    ) -> None:
        self.name, self.dtype = layer.name, layer.parameter.dtype
        self.before = spread_rows(layer.read(), sample)
        self.pruning = method.kind == "pruning"
        self.grams = grams
        self.sizes = [output_error(self.before, gram) for gram in grams]
        self._last: Tensor | None = None
        self._flips: list[Tensor] = []
        self._overlaps: list[Tensor] = []
        self._errors: list[Tensor] = []

    def add(self, after: Tensor) -> None:
        """Take the weights ``[k, rows, in]`` of the next k draws."""
        after = after.to(self.dtype).float()
        state = after == 0 if self.pruning else after
        if self._last is not None:
            state = torch.cat([self._last, state])
        self._last = state[-1:]
        # Draws are independent of each other, so neighbors are a fair sample of all pairs.
        one, two = state[:-1], state[1:]
        self._flips.append((one != two).double().mean(dim=(1, 2)).cpu())
        if self.pruning:
            both = (one & two).sum(dim=(1, 2)).double()
            either = (one | two).sum(dim=(1, 2)).double()
            overlap = torch.where(either > 0, both / either.clamp_min(1), torch.ones_like(both))
            self._overlaps.append(overlap.cpu())
        if self.grams:
            self._errors.append(self._judged(after - self.before))

    def _judged(self, change: Tensor) -> Tensor:
        flat = change.reshape(-1, change.shape[-1])
        columns = []
        for gram, size in zip(self.grams, self.sizes, strict=True):
            each = ((flat @ gram) * flat).reshape(change.shape).sum(dim=(1, 2), dtype=torch.float64)
            columns.append(each / size if size > 0 else torch.full_like(each, float("nan")))
        return torch.stack(columns, dim=1).cpu()

    def result(self, draws: int) -> LayerDraws:
        """Return the summary; a single result stands for all draws."""
        flips = torch.cat(self._flips)
        overlaps = torch.cat(self._overlaps) if self.pruning else None
        if not self.grams:
            errors = torch.zeros(draws, 0, dtype=torch.float64)
        else:
            errors = torch.cat(self._errors).expand(draws, -1)
        jaccard = None
        if overlaps is not None:
            jaccard = float(overlaps.mean()) if len(overlaps) else 1.0
        return LayerDraws(self.name, float(flips.mean()) if len(flips) else 0.0, jaccard, errors)


class _Work:
    """Compresses the layers of an input once a draw, several draws at a time where possible."""

    def __init__(self, bank: Bank, method: Method, weights: Tensor) -> None:
        self.bank, self.method, self.weights = bank, method, weights
        gram = method.statistic == "gram"
        self.shares = [bank.cell_weights(own) for own in weights] if gram else []

    def compress(self, row: InputRow, tallies: Sequence[_Tally], device: torch.device) -> None:
        """Show every tally the result of every draw."""
        if self.method.statistic == "none":
            for tally in tallies:
                tally.add(self._one(tally, None))
        elif self.method.statistic == "gram":
            for gram in self.bank.grams(row, self.shares, device):
                for tally in tallies:
                    tally.add(self._one(tally, gram))
        else:
            energies = self.bank.energies(row, self.weights).to(device)
            for tally in tallies:
                for after in self._by_energy(tally, energies):
                    tally.add(after)

    def _one(self, tally: _Tally, stats: LayerStats | None) -> Tensor:
        return self.method.compress(tally.before, stats, tally.dtype).weight[None]

    def _by_energy(self, tally: _Tally, energies: Tensor) -> Iterator[Tensor]:
        if not (self.method.elementwise and self.method.rows_independent):
            yield from (self._one(tally, _moments(sums)) for sums in energies)
            return
        # Rows know nothing of each other: those of several draws make one tall matrix.
        rows, width = tally.before.shape
        for some in energies.split(max(1, _ELEMENTS // (rows * width))):
            tall = tally.before.repeat(len(some), 1)
            stats = _moments(some.repeat_interleave(rows, dim=0))
            yield self.method.compress(tall, stats, tally.dtype).weight.view(-1, rows, width)


def _moments(sums: Tensor) -> Moments:
    stats = Moments.empty(sums.shape[-1], sums.device)
    stats.sum_squares, stats.tokens = sums, 1
    return stats
