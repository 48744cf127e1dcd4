"""One text, many models: how much worse each is, with intervals over the sequences of the text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lm_calib_plugin.comparison.numbers import Array, Interval, percentile_interval
from lm_calib_plugin.comparison.pairs import two_level_bootstrap
from lm_calib_plugin.comparison.resampling import Resampling
from lm_calib_plugin.diagnostics.scoring import nll_of
from lm_calib_plugin.errors import UserError

FEWEST = 2


@dataclass(frozen=True)
class Share:
    """A part of a loss: 1 is all of it.

    ``low`` and ``high`` are None where the whole loss is not resolved from 0: a ratio over a
    denominator that may be 0 has no bounds worth the name (Fieller, 1954). ``value`` is None where
    there is no loss at all.
    """

    value: float | None
    low: float | None = None
    high: float | None = None

    def plain(self) -> dict[str, float | None]:
        """Return plain values."""
        return {"value": self.value, "low": self.low, "high": self.high}

    def words(self) -> str:
        """Return it as percent: ``61 % [48, 72]``."""
        if self.value is None:
            return "no part"
        if self.low is None or self.high is None:
            return f"{100 * self.value:.0f} % (no interval: the whole loss is not resolved from 0)"
        return f"{100 * self.value:.0f} % [{100 * self.low:.0f}, {100 * self.high:.0f}]"


class Judge:
    """Scores models on the sequences of one text; all intervals are over these, paired.

    Scores are ``[sequences]``: the mean negative log-likelihood (nats) of the scored tokens of
    each. Means weigh sequences by their scored tokens, so that the exponential of a mean is the
    perplexity of the text.

    Parameters
    ----------
    sequences
        Token ids, 1-D each; those of one token have nothing to score and are left out
        (``left_out`` counts them).

    Raises
    ------
    UserError
        For fewer than two sequences that can be scored.
    """

    def __init__(self, sequences: Sequence[Tensor]) -> None:
        self.sequences = [ids for ids in sequences if len(ids) > 1]
        self.left_out = len(sequences) - len(self.sequences)
        if len(self.sequences) < FEWEST:
            raise UserError(
                "text",
                f"got {len(self.sequences)} sequence(s) of two tokens or more",
                f"at least {FEWEST}: intervals are over sequences",
                "for instance --text-samples 8",
            )
        self.tokens = np.array([len(ids) - 1.0 for ids in self.sequences])

    def score(self, model: Any) -> Array:
        """Return the scores of a model."""
        found = nll_of(model, self.sequences, progress=False)
        return np.array([float(one.mean()) for one in found])

    def mean(self, scores: Array) -> float:
        """Return nats per token."""
        return float(scores @ self.tokens / self.tokens.sum())

    def perplexity(self, scores: Array) -> float:
        """Return the perplexity of the text; infinite beyond what a float holds."""
        try:
            return math.exp(self.mean(scores))
        except OverflowError:
            return math.inf

    def increase(self, scores: Array, base: Array) -> Interval:
        """Return by how many nats per token a model is worse than that of ``base``."""
        return two_level_bootstrap(scores[None], base[None], weights=self.tokens)

    def share(self, part: Array, whole: Array) -> Share:
        """Return ``mean(part) / mean(whole)``, both differences of scores, ``[sequences]``.

        A resample takes the same sequences in both.
        """
        total = self.mean(whole)
        if total == 0:
            return Share(None)
        value = self.mean(part) / total
        taken = Resampling(1, len(self.tokens), weights=self.tokens)
        above, below = (found[:, 0] for found in taken.scores([part[None], whole[None]]))
        if not percentile_interval(total, below).excludes_zero:
            return Share(value)
        found = percentile_interval(value, above / below)
        return Share(value, found.low, found.high)


def nats(interval: Interval) -> str:
    """Return an increase in words: ``+0.83 nats [0.71, 0.95]``."""
    return f"{interval.value:+.3g} nats [{interval.low:.3g}, {interval.high:.3g}]"


def plain(interval: Interval) -> dict[str, float]:
    """Return an interval as plain values."""
    return {"value": interval.value, "low": interval.low, "high": interval.high}
