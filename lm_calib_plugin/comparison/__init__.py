"""Statistics by which calibration sets, methods and draws are compared.

Everything here works on scores (accuracy in points, perplexity, errors: higher need not be better)
that were already measured; no model is involved. Compare within one compression level only:
pooled over levels, the level explains nearly everything.

Random numbers come from a generator of the call, so equal arguments give equal results.
"""

from lm_calib_plugin.comparison.cells import (
    DrawSpread,
    VarianceShares,
    draw_spread,
    variance_shares,
    variance_shares_of_draws,
)
from lm_calib_plugin.comparison.numbers import Interval
from lm_calib_plugin.comparison.pairs import (
    PairedDelta,
    paired_delta,
    probability_better,
    probability_better_normal,
    resolved,
    two_level_bootstrap,
    winner_flips,
)
from lm_calib_plugin.comparison.rankings import (
    expected_tau,
    expected_tau_normal,
    kendall_tau_b,
    spearman,
)
from lm_calib_plugin.comparison.retained import Retention, retention

__all__ = [
    "DrawSpread",
    "Interval",
    "PairedDelta",
    "Retention",
    "VarianceShares",
    "draw_spread",
    "expected_tau",
    "expected_tau_normal",
    "kendall_tau_b",
    "paired_delta",
    "probability_better",
    "probability_better_normal",
    "resolved",
    "retention",
    "spearman",
    "two_level_bootstrap",
    "variance_shares",
    "variance_shares_of_draws",
    "winner_flips",
]
