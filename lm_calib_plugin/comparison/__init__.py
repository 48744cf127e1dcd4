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
from lm_calib_plugin.comparison.controls import control_noise
from lm_calib_plugin.comparison.equivalence import (
    Equivalence,
    equivalence,
)
from lm_calib_plugin.comparison.flips import (
    Flips,
    flips,
)
from lm_calib_plugin.comparison.items import (
    item_error,
    item_scores,
)
from lm_calib_plugin.comparison.multiplicity import holm
from lm_calib_plugin.comparison.needed import (
    Needed,
    draws_needed,
    items_needed,
    needed,
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
    one_draw_tau,
    rank_stability,
    spearman,
    tau_between,
)
from lm_calib_plugin.comparison.resampling import Resampling
from lm_calib_plugin.comparison.retained import (
    Recovery,
    Retention,
    recovery,
    retention,
)
from lm_calib_plugin.comparison.significance import (
    mcnemar,
    p_value,
    sign_flip,
)
from lm_calib_plugin.comparison.variance import (
    VarianceComponents,
    variance_components,
)
from lm_calib_plugin.comparison.verdicts import (
    NATS,
    POINTS,
    Units,
    Verdict,
    verdict,
)

__all__ = [
    "NATS",
    "POINTS",
    "DrawSpread",
    "Equivalence",
    "Flips",
    "Interval",
    "Needed",
    "PairedDelta",
    "Recovery",
    "Resampling",
    "Retention",
    "Units",
    "VarianceComponents",
    "VarianceShares",
    "Verdict",
    "control_noise",
    "draw_spread",
    "draws_needed",
    "equivalence",
    "expected_tau",
    "expected_tau_normal",
    "flips",
    "holm",
    "item_error",
    "item_scores",
    "items_needed",
    "kendall_tau_b",
    "mcnemar",
    "needed",
    "one_draw_tau",
    "p_value",
    "paired_delta",
    "probability_better",
    "probability_better_normal",
    "rank_stability",
    "recovery",
    "resolved",
    "retention",
    "sign_flip",
    "spearman",
    "tau_between",
    "two_level_bootstrap",
    "variance_components",
    "variance_shares",
    "variance_shares_of_draws",
    "verdict",
    "winner_flips",
]
