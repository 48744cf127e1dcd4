"""Metrics of one input on one set, from what was seen of it.

Exact: ``amax``, ``kurtosis*``, ``token_max_over_median``, everything about channels. Binned:
``median``, ``p99``, ``p99.9`` of ``|x|``, within 1.6 %, and so their ratios to ``amax``; the shares
beyond 3, 6 and 10 sigma, which can be off by at most ``beyond_error`` (the share of values that lie
in the two bins that the bounds fall into).

Definitions
-----------
``kurtosis``: ``m4 / m2^2`` with moments about the mean, over all values (3 for normal numbers);
``kurtosis_tokens`` and ``kurtosis_channels``: the mean over tokens, and over channels, of the same
for the values of each; those whose values are all equal have none.
``token_max_over_median``: mean over tokens of ``max |x| / median |x|`` (the lower median of two;
tokens whose median is 0 have none).
``beyond``: share of values with ``|x - mean| > k sd``.
``outlier_channels``: channels with ``a_j > 20 median(a)``, where ``a_j`` is the largest ``|x|`` of
channel ``j``, the largest first; ``strict_outliers``: how many of them have ``a_j > 6``, too.
``dead_channels``: channels that were 0 at every token.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from lm_calib_plugin.diagnostics.activations.histogram import beyond, quantile
from lm_calib_plugin.diagnostics.activations.seen import LARGE, Seen, kurtosis_of

TIMES_MEDIAN = 20.0
SIGMAS = (3, 6, 10)
# Outlier channels that are listed of one input; all are counted.
LISTED = 16


def measured(seen: Seen) -> dict[str, Any]:
    """Return all metrics; None where there is nothing to measure."""
    if not seen.rows:
        return {"tokens": 0}
    peak = seen.peak.double().cpu().numpy()
    amax = float(peak.max())
    median, p99, p999 = (quantile(seen.counts, share, amax) for share in (0.5, 0.99, 0.999))
    sums = seen.powers.sum(0) / seen.rows
    mean, kurtosis = sums.mean(1), _finite(kurtosis_of(sums.mean(1, keepdim=True)))
    channels = kurtosis_of(sums)
    sd = math.sqrt(max(0.0, float(mean[1] - mean[0] ** 2)))
    tails = {k: _beyond(seen, float(mean[0]), k * sd, amax) for k in SIGMAS}
    return {
        "tokens": seen.rows,
        "amax": amax,
        "p99.9": p999,
        "p99": p99,
        "median": median,
        "mean": float(mean[0]),
        "sd": sd,
        "max_over_median": _over(amax, median),
        "max_over_p99": _over(amax, p99),
        "token_max_over_median": _over(*seen.ratio.tolist()),
        "kurtosis": kurtosis,
        "kurtosis_tokens": _over(*seen.kurtosis.tolist()),
        "kurtosis_channels": _finite(channels[channels.isfinite()].mean()),
        "beyond": {str(k): share for k, (share, _) in tails.items()},
        "beyond_error": {str(k): error for k, (_, error) in tails.items()},
        **outliers(peak),
        "large_channels": int((seen.large > 0).sum()),
        "dead_channels": np.flatnonzero(peak == 0).tolist(),
    }


def outliers(peak: np.ndarray) -> dict[str, Any]:
    """Return which channels stand out, from the largest ``|x|`` of each, ``[in]``."""
    median = float(np.median(peak))
    which = np.flatnonzero(peak > TIMES_MEDIAN * median) if median > 0 else np.zeros(0, int)
    order = which[np.argsort(-peak[which], kind="stable")]
    top = int(peak.argmax())
    return {
        "top_channel": top,
        "top_over_median_channel": _over(float(peak[top]), median),
        "outlier_count": len(order),
        "strict_outliers": int((peak[order] > LARGE).sum()),
        "outlier_channels": [
            {"channel": int(j), "amax": float(peak[j]), "times": float(peak[j] / median)}
            for j in order[:LISTED]
        ],
    }


def _beyond(seen: Seen, mean: float, reach: float, amax: float) -> tuple[float, float]:
    return beyond(seen.counts, mean - reach, mean + reach, amax)


def _over(value: float | None, by: float | None) -> float | None:
    return value / by if value is not None and by else None


def _finite(value: torch.Tensor) -> float | None:
    found = float(value)
    return found if math.isfinite(found) else None
