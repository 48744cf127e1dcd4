"""Searching the shares of a mix on held-out errors: exponentiated gradient over the simplex."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lm_calib_plugin import engine
from lm_calib_plugin.bank.errors import layer_errors
from lm_calib_plugin.bank.store import Bank
from lm_calib_plugin.bank.transfer import log_regrets
from lm_calib_plugin.method import Method

ROUNDS = 10
STEP = 0.5
FLOOR = 0.02
AVERAGED = 5
QUARTERS = 4
DAMPS = (0.01, 0.1, 0.3, 1.0, 3.0)
_PROBE = 0.1  # share moved to a source to see what it is worth


@dataclass(frozen=True)
class Objective:
    """What a mix is to be good at.

    ``kind`` is ``minimax`` (the worst domain), ``weighted`` (a mean by ``traffic``) or
    ``no_worse`` (the mean, with no domain worse than ``limit`` times its own text).
    """

    kind: str = "minimax"
    traffic: Mapping[str, float] = field(default_factory=dict)
    limit: float = 1.1

    def value(self, regrets: Tensor, domains: Sequence[str]) -> float:
        """Return what is to be small, of the log regrets ``[domains]``."""
        if self.kind == "minimax":
            return float(regrets.max())
        if self.kind == "weighted":
            shares = torch.tensor([self.traffic[d] for d in domains], dtype=torch.float64)
            return float((shares * regrets).sum() / shares.sum())
        excess = (regrets - math.log(self.limit)).clamp_min(0).sum()
        return float(regrets.mean() + 10 * excess)


@dataclass(frozen=True)
class Mix:
    """A mix that was found.

    ``shares`` are fractions of the sequences, ``regrets`` R of every domain on the fold that was
    searched (median layer), ``damp`` the ridge that was best, or None, ``history`` the shares and
    the objective of each round.
    """

    shares: dict[str, float]
    regrets: dict[str, float]
    objective: float
    damp: float | None
    history: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self)


def search_mix(
    bank: Bank,
    layers: Sequence[engine.TargetLayer],
    method: Method,
    sources: Sequence[str],
    objective: Objective = Objective(),
    *,
    fit_fold: str = "choose",
    check_fold: str = "validate",
    search_damp: bool = False,
    progress: bool = False,
) -> Mix:
    """Return the shares of the sources that serve all of them best.

    Every source is a domain too: statistics come from its ``fit_fold``, errors from its
    ``check_fold``. Ten rounds, each on another quarter of the inputs; the last five are averaged.
    For the worst-domain objective the share of a domain grows with its log regret; for the others
    with what a tenth more of it is worth. No share falls below 0.02.

    Parameters
    ----------
    search_damp
        Also choose the ridge of a second-order method, of 0.01, 0.1, 0.3, 1 and 3.

    Returns
    -------
    Mix
    """
    work = _Search(bank, layers, method, list(sources), objective, fit_fold, check_fold)
    shares = torch.full((len(sources),), 1 / len(sources), dtype=torch.float64)
    history: list[dict[str, Any]] = []
    visited: list[Tensor] = []
    rounds = range(ROUNDS) if len(sources) > 1 else range(0)
    for number in tqdm(rounds, desc=f"{objective.kind} mix", disable=not progress):
        part = (number % QUARTERS, min(QUARTERS, len(bank.inputs)))
        gain, value = work.direction(shares, part)
        history.append({"shares": work.named(shares), "objective": value})
        shares = _floored(shares * torch.exp(STEP * gain))
        visited.append(shares)
    if visited:
        shares = torch.stack(visited[-AVERAGED:]).mean(0)
    damp = None
    if search_damp and getattr(method, "damp", None) is not None:
        damp = work.best_damp(shares)
        work.method = dataclasses.replace(method, damp=damp)  # type: ignore[type-var]
    regrets = work.regrets(shares, (0, 1))
    return Mix(
        shares=work.named(shares),
        regrets=dict(zip(sources, regrets.exp().tolist(), strict=True)),
        objective=objective.value(regrets, sources),
        damp=damp,
        history=tuple(history),
    )


class _Search:
    def __init__(
        self,
        bank: Bank,
        layers: Sequence[engine.TargetLayer],
        method: Method,
        sources: list[str],
        objective: Objective,
        fit_fold: str,
        check_fold: str,
    ) -> None:
        self.bank, self.layers, self.method = bank, layers, method
        self.sources, self.objective, self.fit_fold = sources, objective, fit_fold
        self.judges = {s: bank.mixture({s: 1.0}, check_fold) for s in sources}
        self._own: dict[tuple[int, int], Tensor] = {}

    def named(self, shares: Tensor) -> dict[str, float]:
        return {s: round(v, 6) for s, v in zip(self.sources, shares.tolist(), strict=True)}

    def regrets(self, shares: Tensor, part: tuple[int, int]) -> Tensor:
        """Return log regrets of one mix, ``[domains]``."""
        return self._many([shares], part)[0]

    def direction(self, shares: Tensor, part: tuple[int, int]) -> tuple[Tensor, float]:
        """Return by how much each share should grow, at most 1, and the present objective."""
        if self.objective.kind == "minimax":
            now = self.regrets(shares, part)
            return now, self.objective.value(now, self.sources)
        moved = [
            (1 - _PROBE) * shares + _PROBE * one
            for one in torch.eye(len(shares), dtype=torch.float64)
        ]
        now, *others = self._many([shares, *moved], part)
        value = self.objective.value(now, self.sources)
        gain = torch.tensor(
            [value - self.objective.value(o, self.sources) for o in others], dtype=torch.float64
        )
        return gain / gain.abs().max().clamp_min(1e-12), value

    def best_damp(self, shares: Tensor) -> float:
        """Return the ridge with the smallest objective."""
        before = self.method

        def worth(damp: float) -> float:
            self.method = dataclasses.replace(before, damp=damp)  # type: ignore[type-var]
            return self.objective.value(self.regrets(shares, (0, QUARTERS)), self.sources)

        try:
            # What a domain can reach by itself is measured with the ridge that was given.
            self._reference((0, QUARTERS))
            return min(DAMPS, key=worth)
        finally:
            self.method = before

    def _many(self, mixes: Sequence[Tensor], part: tuple[int, int]) -> list[Tensor]:
        own = self._reference(part)
        methods = {str(i): (self.method, self._weights(shares)) for i, shares in enumerate(mixes)}
        found = layer_errors(self.bank, self.layers, methods, self.judges, share=part)
        return [log_regrets(found[str(i)], own) for i in range(len(mixes))]

    def _weights(self, shares: Tensor) -> Tensor:
        named = dict(zip(self.sources, shares.tolist(), strict=True))
        return self.bank.mixture(named, self.fit_fold)

    def _reference(self, part: tuple[int, int]) -> Tensor:
        """Return errors of every domain calibrated on its own text, ``[layers, domains]``."""
        if part not in self._own:
            methods: dict[str, tuple[Method, Tensor | None]] = {
                s: (self.method, self.bank.mixture({s: 1.0}, self.fit_fold)) for s in self.sources
            }
            # Each on its own domain only: the others would be thrown away.
            columns = [
                layer_errors(
                    self.bank, self.layers, {s: methods[s]}, {s: self.judges[s]}, share=part
                )[s][:, 0]
                for s in self.sources
            ]
            self._own[part] = torch.stack(columns, dim=1)
        return self._own[part]


def _floored(shares: Tensor) -> Tensor:
    """Return shares that sum to one, none below the floor."""
    shares = shares / shares.sum()
    floor = min(FLOOR, 1 / len(shares))
    room = 1 - floor * len(shares)
    above = (shares - floor).clamp_min(0)
    total = above.sum()
    return floor + above / total * room if total > 0 else torch.full_like(shares, 1 / len(shares))
