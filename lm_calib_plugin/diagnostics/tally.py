"""Sums over many scored positions, document by document, and what they come to.

Memory: eight numbers a document and 4 bytes a position (its JS in float32, so that quantiles are
exact but for that rounding).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.comparison import Resampling
from lm_calib_plugin.comparison.numbers import Array, Interval
from lm_calib_plugin.diagnostics.tokens import LN2, TokenDivergence

# What is summed over the positions of a document, and over its tokens whose likelihood counts.
OF_POSITIONS = ("js", "kl", "tv", "flipped")
OF_TOKENS = ("nll_dense", "nll_compressed")
COLUMNS = ("positions", *OF_POSITIONS, "tokens", *OF_TOKENS)
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


@dataclass
class Tally:
    """What was measured: ``documents`` hold the sums :data:`COLUMNS`, ``js`` every position's."""

    documents: dict[Any, Array] = field(default_factory=dict)
    js: array[float] = field(default_factory=lambda: array("f"))
    requests: set[Hashable] = field(default_factory=set)

    @classmethod
    def of(cls, parts: Iterable[TokenDivergence]) -> Tally:
        """Return the tally of documents, each position with the likelihood of its token."""
        made = cls()
        for number, part in enumerate(parts):
            made.add(number, part)
            made.add_tokens(number, part.nll_dense, part.nll_compressed)
        return made

    def add(self, document: Hashable, found: TokenDivergence) -> None:
        """Count positions of a document."""
        own = self._own(document)
        own[0] += len(found)
        own[1:5] += [float(getattr(found, name).sum()) for name in OF_POSITIONS]
        self.js.frombytes(found.js.float().numpy().tobytes())

    def add_tokens(self, document: Hashable, dense: Tensor, compressed: Tensor) -> None:
        """Count negative log-likelihoods (nats) of tokens of a document."""
        own = self._own(document)
        own[5] += dense.numel()
        own[6:8] += [float(dense.sum()), float(compressed.sum())]

    def merge(self, other: Tally) -> None:
        """Count what another has counted."""
        for document, sums in other.documents.items():
            self._own(document)[:] += sums
        self.js.extend(other.js)
        self.requests |= other.requests

    def sums(self) -> Array:
        """Return the sums, ``[documents, columns]``, by the names of the documents."""
        order = sorted(self.documents, key=lambda name: (type(name).__name__, name))
        return np.array([self.documents[name] for name in order]).reshape(-1, len(COLUMNS))

    def row(self) -> dict[str, Any]:
        """Return means over positions and tokens, with 95 % intervals over documents.

        Returns
        -------
        dict
            ``js`` (nats; ``js_normalized``: divided by ln 2), ``kl``, ``tv`` and ``flip_rate`` with
            ``mean``, ``low`` and ``high`` (None for a single document: a bootstrap over documents),
            quantiles of JS; ``nll`` (nats a token) and ``perplexity`` of ``dense`` and
            ``compressed``.
        """
        sums = self.sums()
        found: dict[str, Any] = {
            "positions": len(self.js),
            "documents": len(sums),
            "requests": len(self.requests),
        }
        if not len(self.js):
            return found
        means = over_documents(sums[:, 0], [sums[:, 1 + i] for i in range(len(OF_POSITIONS))])
        values = np.frombuffer(self.js, np.float32)
        quantiles = np.quantile(values, list(QUANTILES.values())).astype(np.float64)
        js = _plain(means[0]) | dict(zip(QUANTILES, quantiles.tolist(), strict=True))
        found["js"] = js
        found["js_normalized"] = {k: None if v is None else v / LN2 for k, v in js.items()}
        for name, mean in zip(("kl", "tv", "flip_rate"), means[1:], strict=True):
            found[name] = _plain(mean)
        tokens, *nll = sums[:, 5:].sum(0).tolist()
        if tokens:
            found["tokens"] = int(tokens)
            names = ("dense", "compressed")
            found["nll"] = {n: total / tokens for n, total in zip(names, nll, strict=True)}
            found["perplexity"] = {n: _exp(value) for n, value in found["nll"].items()}
        return found

    def _own(self, document: Hashable) -> Array:
        return self.documents.setdefault(document, np.zeros(len(COLUMNS)))


def over_documents(weights: Array, totals: Sequence[Array]) -> list[Interval]:
    """Return ``sum(total) / sum(weight)``, with intervals from documents taken again at random.

    Parameters
    ----------
    weights
        Tokens of each document.
    totals
        Sums over its tokens, for one quantity each; all are resampled alike.

    Returns
    -------
    list of Interval
        Both ends are NaN for a single document, which tells nothing about others.
    """
    kept = weights > 0
    weights = weights[kept]
    values = [math.fsum(total) / math.fsum(weights) for total in totals]
    if len(weights) < 2:
        return [Interval(value, math.nan, math.nan) for value in values]
    seed = derive_seed("divergence", "documents")
    resampling = Resampling(1, len(weights), seed=seed, weights=weights)
    drawn = resampling.scores([(total[kept] / weights)[None] for total in totals])
    return [resampling.interval(v, d) for v, d in zip(values, drawn, strict=True)]


def _plain(interval: Interval) -> dict[str, float | None]:
    found = {"mean": interval.value, "low": interval.low, "high": interval.high}
    return {name: None if math.isnan(value) else value for name, value in found.items()}


def _exp(value: float) -> float | None:
    try:
        found = math.exp(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None
