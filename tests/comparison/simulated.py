"""Simulated results of two arms: 0/1 items of several difficulties, under several draws."""

from __future__ import annotations

import numpy as np
from scipy.special import expit

DIFFICULTY = 1.5  # sd of the items' logits


def arms(rng, draws, items, draw_sd, item_sd, shift=0.0, answers=True):
    """Return two arms ``[draws, items]``; with no shift their expectations are equal.

    ``draw_sd``: of each draw's logit, arm by arm; ``item_sd``: of what an arm does to an item in
    every draw; without ``answers`` the items are probabilities, so draws carry no noise of items.
    """
    difficulty = DIFFICULTY * rng.normal(size=items)
    found = []
    for moved in (shift, 0.0):
        logits = 0.5 + moved + difficulty + item_sd * rng.normal(size=items)
        chances = expit(logits + draw_sd * rng.normal(size=(draws, 1)))
        found.append((rng.random(chances.shape) < chances).astype(float) if answers else chances)
    return found


def expected_score(draw_sd, item_sd):
    """Return the score over all draws and items: the mean of a logistic normal, by quadrature."""
    places, weights = np.polynomial.hermite_e.hermegauss(60)
    sd = np.sqrt(DIFFICULTY**2 + draw_sd**2 + item_sd**2)
    return float((weights * expit(0.5 + sd * places)).sum() / weights.sum())
