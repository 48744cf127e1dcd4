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
from lm_calib_plugin.bank.errors import layer_errors, parts_of
from lm_calib_plugin.bank.store import Bank
from lm_calib_plugin.bank.transfer import log_regrets, refuse_nothing
from lm_calib_plugin.errors import UserError, listed, nearest
from lm_calib_plugin.method import Method

ROUNDS = 10
STEP = 0.5
FLOOR = 0.02
AVERAGED = 5
QUARTERS = 4
DAMPS = (0.01, 0.1, 0.3, 1.0, 3.0)
SEARCH_ROWS = 64  # output rows of a layer that a search looks at, when rows are independent
KINDS = ("minimax", "weighted", "no_worse")
MOVES, AGAIN = (0.4, 0.2, 0.1, 0.05), 2  # shares moved in the end, each so often at most
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

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(
                "objective", f"got {self.kind!r}", nearest(self.kind, KINDS), listed(KINDS)
            )
        bad = [name for name, share in self.traffic.items() if not 0 <= share < math.inf]
        if bad or (self.traffic and not sum(self.traffic.values()) > 0):
            raise UserError(
                "traffic", f"got {dict(self.traffic)}", "shares >= 0, not all of them 0"
            )
        if not 0 < self.limit < math.inf:
            raise UserError("limit", f"got {self.limit:g}", "a ratio of errors, usually 1.1")

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
    rows: int | None = SEARCH_ROWS,
    progress: bool = False,
) -> Mix:
    """Return the shares of the sources that serve all of them best.

    Every source is a domain too: statistics come from its ``fit_fold``, errors from its
    ``check_fold``. Ten rounds, each on another quarter of the inputs; the last five are averaged.
    For the worst-domain objective the share of a domain grows with its log regret; for the others
    with what a tenth more of it is worth. As these steps are small where regrets are, the average,
    the uniform mix and the sources alone are then compared, and the best is moved toward each
    source by 0.4, 0.2, 0.1 and 0.05 as long as that helps: so what comes out is never worse, on
    the inputs looked at, than any of them. No share falls below 0.02.

    Parameters
    ----------
    sources
        Names of the sources.
    objective
        What the mix is to be good at.
    fit_fold, check_fold
        Where statistics come from, and what errors are measured on.
    search_damp
        Also choose the ridge of a second-order method: of 0.01, 0.1, 0.3, 1, 3 and the given one.
    rows
        Output rows of a layer that are looked at, for methods whose rows do not depend on each
        other; None: all.

    Returns
    -------
    Mix

    Raises
    ------
    UserError
        When the bank does not hold a source or a layer, or the objective does not fit.
    """
    names = list(sources)
    _check(names, objective, rows)
    refuse_nothing(method)
    work = _Search(bank, layers, method, names, objective, fit_fold, check_fold, rows)
    shares = torch.full((len(names),), 1 / len(names), dtype=torch.float64)
    history: list[dict[str, Any]] = []
    if len(names) > 1:
        visited = [shares]
        for number in tqdm(range(ROUNDS), desc=f"{objective.kind} mix", disable=not progress):
            gain, value = work.direction(shares, (number % work.parts, work.parts))
            history.append({"shares": work.named(shares), "objective": value})
            shares = _floored(shares * torch.exp(STEP * gain))
            visited.append(shares)
        shares = work.refined([torch.stack(visited[-AVERAGED:]).mean(0), visited[0]])
    damp = None
    if search_damp and "damp" in method.options():
        damp = work.best_damp(shares)
        work.method = dataclasses.replace(method, damp=damp)  # type: ignore[type-var]
    regrets = work.regrets(shares, (0, 1))
    return Mix(
        shares=work.named(shares),
        regrets=dict(zip(names, regrets.exp().tolist(), strict=True)),
        objective=objective.value(regrets, names),
        damp=damp,
        history=tuple(history),
    )


def _check(sources: list[str], objective: Objective, rows: int | None) -> None:
    """Refuse what can not be searched."""
    if not sources or len(set(sources)) < len(sources):
        raise UserError("sources", f"got {sources}", "one source or more, each once")
    missing = [s for s in sources if s not in objective.traffic]
    if objective.kind == "weighted" and (
        missing or not sum(objective.traffic[s] for s in sources) > 0
    ):
        raise UserError(
            "traffic",
            f"no share of {listed(missing or sources)}",
            "one share for each source, not all of them 0",
        )
    if rows is not None and rows < 1:
        raise UserError("rows", f"got {rows}", "1 or more")


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
        rows: int | None,
    ) -> None:
        self.bank, self.layers, self.method, self.rows = bank, layers, method, rows
        self.sources, self.objective, self.fit_fold = sources, objective, fit_fold
        self.judges = {s: bank.mixture({s: 1.0}, check_fold) for s in sources}
        self.parts = parts_of(bank, layers, QUARTERS)
        # What a domain can reach by itself: measured with the options that were given.
        self._given = method
        self._own: dict[tuple[int, int], Tensor] = {}

    @property
    def fine(self) -> tuple[int, int]:
        """The inputs that are looked at many times: a quarter where compressing is slow."""
        return (0, self.parts if self.method.statistic == "gram" else 1)

    def named(self, shares: Tensor) -> dict[str, float]:
        return {s: round(v, 6) for s, v in zip(self.sources, shares.tolist(), strict=True)}

    def regrets(self, shares: Tensor, part: tuple[int, int]) -> Tensor:
        """Return log regrets of one mix, ``[domains]``."""
        return self._many([shares], part)[0]

    def direction(self, shares: Tensor, part: tuple[int, int]) -> tuple[Tensor, float]:
        """Return by how much each share should grow, at most 1, and the present objective."""
        if self.objective.kind == "minimax":
            now = self.regrets(shares, part)
            # Shares are renormalized: only differences count.
            return (now - now.mean()).clamp(-1, 1), self.objective.value(now, self.sources)
        now, *others = self._values([shares, *self._toward(shares, _PROBE)], part)
        gain = torch.tensor([now - other for other in others], dtype=torch.float64)
        return gain / gain.abs().max().clamp_min(1e-12), now

    def refined(self, starts: Sequence[Tensor]) -> Tensor:
        """Return the best mix near the best of some mixes and of the sources alone."""
        alone = [_floored(one) for one in torch.eye(len(self.sources), dtype=torch.float64)]
        tried = [*starts, *alone]
        values = self._values(tried, self.fine)
        least = min(values)
        best = tried[values.index(least)]
        for move in MOVES:
            for _ in range(AGAIN):
                tried = [_floored(shares) for shares in self._toward(best, move)]
                values = self._values(tried, self.fine)
                if min(values) >= least:
                    break
                least = min(values)
                best = tried[values.index(least)]
        return best

    def best_damp(self, shares: Tensor) -> float:
        """Return the ridge with the smallest objective; the given one is tried too."""
        damps = sorted({*DAMPS, self._given.damp})  # type: ignore[attr-defined]
        weights = self._weights(shares)
        methods: dict[str, tuple[Method, Tensor | None]] = {
            str(damp): (dataclasses.replace(self._given, damp=damp), weights)  # type: ignore[type-var]
            for damp in damps
        }
        found = self._log_regrets(methods, self.fine)
        return min(damps, key=lambda d: self.objective.value(found[str(d)], self.sources))

    @staticmethod
    def _toward(shares: Tensor, move: float) -> list[Tensor]:
        """Return the mixes with ``move`` more of each source."""
        return [
            (1 - move) * shares + move * one for one in torch.eye(len(shares), dtype=torch.float64)
        ]

    def _values(self, mixes: Sequence[Tensor], part: tuple[int, int]) -> list[float]:
        return [self.objective.value(r, self.sources) for r in self._many(mixes, part)]

    def _many(self, mixes: Sequence[Tensor], part: tuple[int, int]) -> list[Tensor]:
        methods: dict[str, tuple[Method, Tensor | None]] = {
            str(i): (self.method, self._weights(shares)) for i, shares in enumerate(mixes)
        }
        return list(self._log_regrets(methods, part).values())

    def _log_regrets(
        self, methods: Mapping[str, tuple[Method, Tensor | None]], part: tuple[int, int]
    ) -> dict[str, Tensor]:
        own = self._reference(part)
        found = layer_errors(
            self.bank, self.layers, methods, self.judges, share=part, rows=self.rows
        )
        return {name: log_regrets(errors, own) for name, errors in found.items()}

    def _weights(self, shares: Tensor) -> Tensor:
        named = dict(zip(self.sources, shares.tolist(), strict=True))
        return self.bank.mixture(named, self.fit_fold)

    def _reference(self, part: tuple[int, int]) -> Tensor:
        """Return errors of every domain calibrated on its own text, ``[layers, domains]``."""
        if part not in self._own:
            # Each on its own domain only: the others would be thrown away.
            columns = [
                layer_errors(
                    self.bank,
                    self.layers,
                    {s: (self._given, self.bank.mixture({s: 1.0}, self.fit_fold))},
                    {s: self.judges[s]},
                    share=part,
                    rows=self.rows,
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
