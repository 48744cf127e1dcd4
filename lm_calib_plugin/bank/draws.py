"""What another draw would have done: masks and errors of resampled calibration sets."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lm_calib_plugin import engine
from lm_calib_plugin.bank.errors import layers_by_input, quadratic
from lm_calib_plugin.bank.layout import InputRow
from lm_calib_plugin.bank.store import Bank
from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.method import Method
from lm_calib_plugin.statistics import LayerStats, Moments

DRAWS = 200
ROWS = 16  # output rows of a layer that are looked at, when rows do not depend on each other
FEWEST_GROUPS = 16


@dataclass(frozen=True)
class LayerDraws:
    """One layer over all draws.

    ``flip`` is the probability that two draws disagree about a weight (kept or removed; or its
    level), averaged over the weights looked at; ``jaccard`` the mean overlap of what two draws
    remove (None for quantization); ``errors`` the relative output error on every judged domain,
    float64 ``[draws, domains]``.
    """

    name: str
    flip: float
    jaccard: float | None
    errors: Tensor


@dataclass(frozen=True)
class Draws:
    """Resampled calibration sets of one source.

    Parameters
    ----------
    source, fold
        What was resampled.
    pool, nsamples, draws
        Sequences in the bank, sequences of each draw, number of draws.
    domains
        What the errors were judged on.
    layers
        One entry per layer.
    rows
        Output rows looked at in each layer; None: all.
    seconds
        What it took.
    """

    source: str
    fold: str
    pool: int
    nsamples: int
    draws: int
    domains: tuple[str, ...]
    layers: tuple[LayerDraws, ...]
    rows: int | None
    seconds: float

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
        """Return the standard deviation over draws of E_g, relative to its mean."""
        errors = self.errors(domain)
        return float(errors.std() / errors.mean())

    def percentile_draw(self, domain: str, percent: float) -> int:
        """Return the number of the draw at a percentile of E_g, for a full evaluation."""
        order = self.errors(domain).argsort()
        return int(order[round(percent / 100 * (len(order) - 1))])

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "source": self.source,
            "fold": self.fold,
            "pool": self.pool,
            "nsamples": self.nsamples,
            "draws": self.draws,
            "rows": self.rows,
            "seconds": round(self.seconds, 3),
            "flip": self.flip,
            "jaccard": self.jaccard,
            "domains": {
                d: {
                    "mean": float(self.errors(d).mean()),
                    "relative_spread": self.relative_spread(d),
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
        When the bank cannot resample the source for this method.
    """
    began = time.perf_counter()
    pool = bank.rows(source, fold)
    counts = _counts(bank, method, source, fold, nsamples, draws, seed)
    judges = {domain: bank.mixture({domain: 1.0}, judge_fold) for domain in domains}
    sample = rows if method.rows_independent else None
    found: list[LayerDraws] = []
    work = layers_by_input(bank, layers)
    for row, own in tqdm(work, desc=f"{draws} draws of {source}", disable=not progress):
        statistics = _statistics(bank, row, method, counts)
        grams = [bank.gram(row, weights).gram() for weights in judges.values()]
        for layer in own:
            found.append(_layer(layer, method, statistics, grams, sample))
    return Draws(
        source,
        fold,
        len(pool),
        nsamples,
        draws,
        tuple(domains),
        tuple(found),
        sample,
        time.perf_counter() - began,
    )


def _counts(
    bank: Bank, method: Method, source: str, fold: str, nsamples: int, draws: int, seed: int
) -> Tensor:
    """Return weights of all sequences of the bank for every draw, ``[draws, sequences]``."""
    part = bank.part(source, fold)
    rows = bank.rows(source, fold)
    weights = torch.zeros(draws, bank.sequences, dtype=torch.float64)
    if method.statistic != "gram":
        weights[:, rows] = resampled(len(rows), nsamples, draws, seed)
        return weights
    groups = bank.header.parts[part].groups
    if groups < FEWEST_GROUPS:
        raise UserError(
            "bank",
            f"`{source}` ({fold}) is kept in {groups} groups",
            f"draws of a second-order method need {FEWEST_GROUPS} or more",
            f"build the bank with --groups {FEWEST_GROUPS}",
        )
    # Whole groups are drawn: as many as hold the sequences asked for.
    size = max(1, round(nsamples * groups / len(rows)))
    drawn = resampled(groups, size, draws, seed)
    owner = torch.tensor([bank.header.sequences[int(i)].group for i in rows])
    weights[:, rows] = drawn[:, owner]
    return weights


def _statistics(bank: Bank, row: InputRow, method: Method, counts: Tensor) -> list[LayerStats]:
    """Return the statistics of every draw."""
    if method.statistic == "gram":
        return [bank.gram(row, weights) for weights in counts]
    found: list[LayerStats] = []
    for sums in bank.energies(row, counts):
        stats = Moments.empty(row.width)
        stats.sum_squares, stats.tokens = sums, 1
        found.append(stats)
    return found


def _layer(
    layer: engine.TargetLayer,
    method: Method,
    statistics: Sequence[LayerStats],
    grams: Sequence[Tensor],
    sample: int | None,
) -> LayerDraws:
    # Draws are a study beside the model, made where the bank's tensors are.
    before = layer.read().cpu()
    if sample is not None and sample < before.shape[0]:
        before = before[(torch.arange(sample) * before.shape[0]) // sample]
    previous: Tensor | None = None
    overlaps: list[float] = []
    differs: list[float] = []
    errors: list[list[float]] = []
    sizes = [quadratic(before, gram) for gram in grams]
    for stats in statistics:
        after = method.compress(before, stats, layer.parameter.dtype).weight
        after = after.to(layer.parameter.dtype).float()
        state = after == 0 if method.kind == "pruning" else after
        if previous is not None:
            # Neighboring draws are independent, so are their differences from any third.
            differs.append(float((state != previous).double().mean()))
            if method.kind == "pruning":
                both = float((state & previous).sum())
                either = float((state | previous).sum())
                overlaps.append(both / either if either else 1.0)
        previous = state
        change = after - before
        errors.append(
            [
                quadratic(change, gram) / size if size > 0 else float("nan")
                for gram, size in zip(grams, sizes, strict=True)
            ]
        )
    return LayerDraws(
        layer.name,
        sum(differs) / max(1, len(differs)),
        sum(overlaps) / len(overlaps) if overlaps else None,
        torch.tensor(errors, dtype=torch.float64).reshape(len(statistics), len(grams)),
    )
