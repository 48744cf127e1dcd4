"""A comparison in one plain sentence."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lm_calib_plugin.comparison.equivalence import equivalence
from lm_calib_plugin.comparison.items import item_scores
from lm_calib_plugin.comparison.needed import Needed, needed
from lm_calib_plugin.comparison.numbers import (
    RESAMPLES,
    Array,
    Interval,
    draws_by_items,
    paired_table,
)
from lm_calib_plugin.comparison.pairs import (
    RESOLVED,
    probability_better,
    resolved,
    two_level_bootstrap,
)
from lm_calib_plugin.errors import UserError


@dataclass(frozen=True)
class Units:
    """How differences are printed: times ``scale``, with ``digits`` decimals and a name."""

    name: str = "points"
    scale: float = 100.0
    digits: int = 1

    def signed(self, value: float) -> str:
        """Return ``+1.9``; what rounds to 0 has no sign."""
        text = f"{value * self.scale:+.{self.digits}f}"
        return text if float(text) else text[1:]

    def of(self, delta: Interval) -> str:
        """Return ``+1.9 points [0.7, 3.0]``."""
        low, high = (self.signed(x).removeprefix("+") for x in (delta.low, delta.high))
        return f"{self.signed(delta.value)} {self.name} [{low}, {high}]"


POINTS = Units()
NATS = Units("nats", 1.0, 3)


@dataclass(frozen=True)
class Verdict:
    """What may be said of a against b; *better* always means better, whichever way scores point.

    ``kind`` is the first of these that holds:

    ``identical``
        No pair differs.
    ``one_draw``
        One draw where the method takes data: nothing can be said about other draws.
    ``no_spread``
        Scores without items that do not vary: no error can be given.
    ``resolved_better``, ``resolved_worse``
        One draw tells them apart, and the interval excludes 0 (:func:`resolved`).
    ``better_on_average``, ``worse_on_average``
        The interval excludes 0, but one draw does not tell them apart.
    ``equivalent``
        The difference is inside the margin (TOST), if one is given.
    ``likely_better``, ``likely_worse``
        Most pairs of draws agree, but the interval holds 0.
    ``unresolved``
        No draw varies, and the interval over items holds 0.
    ``coin_flip``
        None of it.

    ``more_draws`` is how many more draws would make the interval exclude 0 if what was seen were
    true: 0 where it does, None where no number would or draws are not the question. More draws do
    not make *one* draw tell two arms apart; ``words`` say so where it matters.
    """

    kind: str
    words: str
    more_draws: int | None


def verdict(
    a: ArrayLike,
    b: ArrayLike,
    *,
    data_free: Collection[str] = (),
    higher_is_better: bool = True,
    margin: float | None = None,
    weights: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    intervals: tuple[Interval, Interval] | None = None,
    units: Units = POINTS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Verdict:
    """Return what may be said of arm a against arm b.

    Parameters
    ----------
    a, b
        ``[draws, items]`` or ``[draws]``; rows of equal number are one pair. An arm that takes no
        data may have one row beside many: it stands beside every draw of the other.
    data_free
        ``"a"``, ``"b"`` or both: the arms that take no calibration data (dense, magnitude, rtn).
        Their draws must be equal.
    margin
        Of equivalence, in units of the scores; None asks nothing about it.
    weights
        ``[items]``, above 0.
    strata
        ``[items]``, the fixed block (task) of each.
    intervals
        Those of the difference to 95 % and to 90 %, expanded, where they are known already
        (:class:`~lm_calib_plugin.comparison.Resampling`).
    units
        How numbers are printed; they are tested as they are.

    Raises
    ------
    UserError
        When shapes do not fit, or draws of a data-free arm differ.
    """
    first, second = _arms(a, b, data_free)
    gaps = paired_table(first, second)
    draws, items = gaps.shape
    if not gaps.any():
        return Verdict("identical", "identical: no pair differs", None)
    items_are: dict[str, Any] = {"weights": weights, "strata": strata}
    random: dict[str, Any] = {"resamples": resamples, "seed": seed, **items_are}
    delta, narrow = intervals or (None, None)
    if delta is None:
        delta = two_level_bootstrap(first, second, expanded=True, **random)
    if draws == 1 and len(set(data_free)) < 2:
        return _one_draw(delta, items, units)
    varies = bool((first != first[0]).any() or (second != second[0]).any())
    if not varies and items == 1:
        words = f"{units.signed(delta.value)} {units.name}; nothing varies, so no error is known"
        return Verdict("no_spread", words, None)
    word = "better" if (delta.value > 0) == higher_is_better else "worse"
    share = probability_better(item_scores(first, weights), item_scores(second, weights))
    share = share if delta.value > 0 else 1 - share  # of draw pairs that agree with the mean
    numbers = units.of(delta)
    if varies:
        numbers += f", {word} in {100 * share:.0f} % of draw pairs"
    else:
        numbers += f" over {items:,} items, no draw varies"
    inside = None
    if margin is not None:
        test = equivalence(first, second, margin, interval=narrow, **random)
        if test.equivalent:
            inside = f"less than {margin * units.scale:g} {units.name} apart"
    if delta.excludes_zero:
        ending = f"; {inside}" if inside else ""
        if resolved(max(share, 0.5), delta):
            return Verdict(f"resolved_{word}", f"resolved, {word}: {numbers}{ending}", 0)
        ending = f"; more draws do not make one draw tell them apart{ending}"
        return Verdict(f"{word}_on_average", f"{word} on average only: {numbers}{ending}", 0)
    missing = needed(first, second, **items_are)
    more = max(1, missing.draws - draws) if varies and missing.draws is not None else None
    if inside:
        return Verdict("equivalent", f"equivalent, {inside}: {numbers}", more)
    numbers += _missing(more, missing, varies)
    if not varies:
        return Verdict("unresolved", f"not resolved: {numbers}", None)
    if share >= RESOLVED:
        words = f"likely {word}, not resolved at {draws} draws: {numbers}"
        return Verdict(f"likely_{word}", words, more)
    gamble = "" if more is None else ", which still leaves a single draw a gamble"
    return Verdict("coin_flip", f"a coin flip at {draws} draws: {numbers}{gamble}", more)


def _arms(a: ArrayLike, b: ArrayLike, data_free: Collection[str]) -> tuple[Array, Array]:
    """Return both arms as ``[draws, items]``, a data-free one repeated as often as needed."""
    if not set(data_free) <= {"a", "b"}:
        raise UserError("data_free", f"got {sorted(data_free)}", "`a`, `b` or both are allowed")
    arms = {"a": draws_by_items("a", a), "b": draws_by_items("b", b)}
    for name in data_free:
        arm = arms[name]
        if (arm != arm[0]).any():
            raise UserError(
                name,
                "draws of a data-free arm differ",
                "that is noise of the implementation, not a result",
            )
        other = arms["b" if name == "a" else "a"]
        if len(arm) == 1:
            arms[name] = np.repeat(arm, len(other), 0)
    return arms["a"], arms["b"]


def _one_draw(delta: Interval, items: int, units: Units) -> Verdict:
    over = f"{units.of(delta)} over {items:,} items"
    seen = over if items > 1 else f"{units.signed(delta.value)} {units.name}"
    return Verdict("one_draw", f"one draw: {seen}; other draws may differ by any amount", None)


def _missing(more: int | None, missing: Needed, varies: bool) -> str:
    """Return what would make the interval exclude 0."""
    if more is not None:
        return f"; about {_about(more)} more draw{'s' if more > 1 else ''} needed for the average"
    if missing.items is not None:
        ever = "no number of draws would resolve it on these items, " if varies else ""
        return f"; {ever}about {_about(missing.items)} items needed"
    return "; no number of draws that anyone runs would resolve it"


def _about(count: int) -> str:
    """Return two leading digits."""
    step = 10 ** max(0, len(str(count)) - 2)
    return f"{-(-count // step) * step:,}"
