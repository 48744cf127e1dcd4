"""Everything that a report shows, as plain values; whoever writes a report reads nothing else.

Scores and differences are in the unit of their task: ``points`` (shares of items times 100), else
the unit that the metric has (``perplexity``, ``bits``, ...). Nothing in here depends on when, where
or how fast a record was made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

POINTS = "points"
PERPLEXITY = "perplexity"
# Columns over several tasks: of those in points, and of those that are perplexities.
AVERAGE, AVERAGE_PERPLEXITY = "average", "average perplexity"
AVERAGES = (AVERAGE, AVERAGE_PERPLEXITY)
# Packages whose versions may differ between records; where they do, a report tells.
VERSIONED = ("lm-calib-plugin", "torch", "transformers", "datasets")
DENSE, COMPRESSED, DATA_FREE, NULL = "dense", "compressed", "data-free", "null"


@dataclass(frozen=True)
class Column:
    """One task with its one metric, or the average of all tasks in points (``AVERAGE``).

    ``chance`` is what guessing scores, as a share.
    """

    task: str
    metric: str
    unit: str
    higher_is_better: bool
    items: int | None
    chance: float | None = None


@dataclass(frozen=True)
class Score:
    """One entry in one column.

    ``draws`` are the scores of the draws, in the order of ``Entry.draws``; ``sd`` their standard
    deviation (``ddof=1``; None for one draw), ``item_error`` the standard error over items,
    averaged over draws, ``low`` and ``high`` the 95 % interval over draws and items.
    """

    draws: tuple[float, ...]
    mean: float
    sd: float | None = None
    item_error: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Kept:
    """What is left of the dense model: worst task, geometric mean, mean; None where undefined.

    ``tasks`` holds the retention of each task; ``recovery`` is the mean of score / dense.
    """

    worst_task: str | None
    worst: float | None
    geometric_mean: float | None
    mean: float | None
    recovery: float | None
    tasks: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One row: all draws of base model, level, method and calibration.

    ``role`` is ``dense``, ``compressed``, ``data-free`` or ``null``. ``strength`` is the fraction
    removed or the bits of the level, for an axis, and ``strength_name`` says which of both.
    ``scores`` holds a Score for each column. ``commands`` reproduce the draws one by one.
    ``failed`` are the errors of draws that could not be measured, ``missing`` the draws that were
    not run. ``leaked`` is the largest share of items of a task that stand in calibration text.
    ``dtype`` and ``revision`` are those of the base model, for files that leaderboards read.
    """

    id: str
    model: str
    level: str
    method: str
    calibration: str
    role: str
    draws: tuple[int, ...]
    scores: dict[str, Score]
    kept: Kept | None = None
    strength: float | None = None
    strength_name: str = ""
    sparsity: float | None = None
    bits: float | None = None
    calib_ids: tuple[str, ...] = ()
    calibration_tokens: int | None = None
    keys: tuple[str, ...] = ()
    leaked: float | None = None
    commands: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    missing: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    dtype: str = ""
    revision: str = ""


@dataclass(frozen=True)
class Comparison:
    """Entry ``a`` against entry ``b`` in one column; a positive ``delta`` means a scores more.

    ``against`` is ``dense``, ``baseline`` (another calibration) or ``method``. ``beneficial`` and
    ``harmful`` are the shares of paired items on which a is better and worse, ``p`` the p value and
    ``p_holm`` that after Holm over the table. ``probability_better`` is P(one draw of a beats one
    of b). ``verdict`` is a short kind, ``words`` the sentence for people, and ``more_draws`` how
    many more draws would resolve it, where that can be said. ``flips``: whether paired draws
    disagree on the winner (a data-free arm stands beside every draw); None for fewer than two.
    """

    a: str
    b: str
    against: str
    column: str
    unit: str
    delta: float
    low: float | None
    high: float | None
    beneficial: float | None
    harmful: float | None
    p: float | None
    p_holm: float | None
    probability_better: float | None
    verdict: str
    words: str
    more_draws: int | None = None
    flips: bool | None = None


@dataclass(frozen=True)
class Ranking:
    """Calibrations (or methods) of one model and level, ranked by the mean of a column.

    ``entries`` stand best first; ``tau`` is the expected Kendall tau-b of a ranking from one draw
    with this one; ``ranks[i][r]`` how often entry i takes rank r when each has one draw.
    """

    model: str
    level: str
    fixed: str
    column: str
    entries: tuple[str, ...]
    tau: float | None
    ranks: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Agreement:
    """Whether calibrations of one model and method are ranked alike by tasks, or by levels.

    ``over`` is ``tasks`` (``names`` are columns) or ``levels`` (``names`` are levels, ranked by the
    column that sums up the others; ``level`` is empty). ``fixed`` is the method. ``taus[i][j]`` is
    Kendall's tau-b of the rankings by the means of i and of j; None where one ranks nothing.
    """

    model: str
    level: str
    fixed: str
    over: str
    names: tuple[str, ...]
    taus: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Share:
    """A share of the variance, with its 95 % interval; ``clipped``: the estimate was negative."""

    value: float
    low: float | None = None
    high: float | None = None
    clipped: bool = False


@dataclass(frozen=True)
class Shares:
    """What varies in one model, level and column: calibration source, method, both, or the draw.

    ``naive`` are the same shares without correction for draw noise, as papers print them.
    """

    model: str
    level: str
    column: str
    estimator: str
    parts: dict[str, Share]
    naive: dict[str, float]


@dataclass(frozen=True)
class Heat:
    """Calibration x task for one model, level and method.

    ``values[i][j]`` is the mean over draws of ``quantity`` (``retention``: 1 is dense; or ``log
    ratio`` of the perplexity to that of the dense model, in nats: 0 is dense).
    """

    model: str
    level: str
    method: str
    quantity: str
    calibrations: tuple[str, ...]
    tasks: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Control:
    """A check that every table carries; a failed one forbids ranking."""

    name: str
    passed: bool | None
    words: str


@dataclass(frozen=True)
class Analysis:
    """A whole leaderboard.

    ``conditions`` are shared by all records (versions, tokenizer, shots, limit, ...);
    ``no_ranking`` says why nothing may be ranked (empty: all is well); ``notes`` is what a reader
    has to know (which metric was taken, what was left out); ``failures`` are cells that broke
    (cell and error), ``missing`` those that were not run.
    """

    name: str
    description: str
    columns: tuple[Column, ...]
    entries: tuple[Entry, ...]
    comparisons: tuple[Comparison, ...] = ()
    rankings: tuple[Ranking, ...] = ()
    shares: tuple[Shares, ...] = ()
    heats: tuple[Heat, ...] = ()
    controls: tuple[Control, ...] = ()
    conditions: dict[str, Any] = field(default_factory=dict)
    no_ranking: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    failures: tuple[tuple[str, str], ...] = ()
    missing: tuple[str, ...] = ()
    agreements: tuple[Agreement, ...] = ()

    def entry(self, id: str) -> Entry:
        """Return the entry with this id."""
        return next(entry for entry in self.entries if entry.id == id)
