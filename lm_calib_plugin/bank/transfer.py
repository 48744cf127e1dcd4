"""Does a calibration set carry over to a domain? Ratios of held-out layer errors, and a verdict.

For a domain g with Gram matrices ``H_g`` of sequences that no set has seen, and compressed weights
``W'``::

    E_g(W') = sum over layers of tr((W - W') H_g (W - W')^T) / tr(W H_g W^T)
    R_g(W') = E_g(W') / E_g(W' calibrated on g itself)            1: as good as g's own text
    T_g(W') = E_g(W') / E_g(W' without any data), layer by layer  1: the data were of no use
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lm_calib_plugin import engine, registry
from lm_calib_plugin.bank.errors import layer_errors, layers_by_input
from lm_calib_plugin.bank.store import Bank
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.method import Method

NO_USE = 0.9  # median T of the layers: hardly better than no data
FAR = 1.2  # R: a fifth more error than the domain's own text
BROKEN = 10.0  # T of one layer: far worse than no data
ROWS = 128
OWN, BASELINE = "own text of", "without data"


@dataclass(frozen=True)
class Entry:
    """One calibration set on one domain.

    ``error`` is E_g, ``regret`` R_g, ``against_no_data`` the median over layers of T_g, ``worst``
    its largest value, and ``worst_layer`` where. ``own_against_no_data`` is T_g of the domain's own
    text. Medians are the lower one of two middle values.
    """

    set: str
    domain: str
    error: float
    regret: float
    against_no_data: float
    worst: float
    worst_layer: str
    own_against_no_data: float = 0.0

    @property
    def transfers(self) -> bool:
        """Whether the set is of use for the domain.

        T decides only where the domain's own text is of use by that measure. It need not be: a
        method that compares weights inside rows, as Wanda does, can have larger layer errors than
        magnitude over whole layers and still be far better in the model.
        """
        near = self.regret < FAR and self.worst <= BROKEN
        if self.own_against_no_data >= NO_USE:
            return near
        return near and self.against_no_data < NO_USE


@dataclass(frozen=True)
class Transfer:
    """Every set on every domain, judged on ``rows`` output rows of each layer (None: all)."""

    method: str
    baseline: str
    entries: tuple[Entry, ...]
    rows: int | None = None

    @property
    def sets(self) -> list[str]:
        """Names of the sets."""
        return list(dict.fromkeys(entry.set for entry in self.entries))

    @property
    def domains(self) -> list[str]:
        """Names of the domains."""
        return list(dict.fromkeys(entry.domain for entry in self.entries))

    def at(self, name: str, domain: str) -> Entry:
        """Return the entry of a set and a domain."""
        return next(e for e in self.entries if (e.set, e.domain) == (name, domain))

    def worst_regret(self, name: str) -> Entry:
        """Return the entry of a set where its regret is largest."""
        return max((e for e in self.entries if e.set == name), key=lambda e: e.regret)

    def advice(self) -> str:
        """Return one line: which set to use, and which not, by set."""
        where: dict[str, list[str]] = {name: [] for name in self.sets}
        for entry in self.entries:
            if not entry.transfers:
                where[entry.set].append(entry.domain)
        count = len(self.domains)
        useful = [name for name in self.sets if len(where[name]) < count]
        if not useful:
            return (
                f"no set transfers to any domain: use {self.baseline.lower()}, which needs no "
                "data, or text that is nearer to the domains"
            )
        # A set that serves every domain before one that is better where it serves.
        best = min(useful, key=lambda name: (len(where[name]), self.worst_regret(name).regret))
        worst = self.worst_regret(best)
        parts = [
            f"use `{best}`: at worst {worst.regret:.2f} times the error of a domain's own text "
            f"({worst.domain})"
        ]
        for name, domains in where.items():
            if domains:
                any_of_many = len(domains) == count > 1
                named = "any domain" if any_of_many else ", ".join(domains)
                parts.append(f"`{name}` does not transfer to {named}")
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "method": self.method,
            "baseline": self.baseline,
            "rows": self.rows,
            "thresholds": {"median": NO_USE, "regret": FAR, "layer": BROKEN},
            "entries": [vars(e) | {"transfers": e.transfers} for e in self.entries],
            "advice": self.advice(),
        }


def baseline_of(method: Method) -> Method:
    """Return the method without data that a method is compared with: magnitude, rtn, or both."""
    name = {"pruning": "magnitude", "joint": "magnitude+rtn"}.get(method.kind, "rtn")
    entry = registry.find_method(name)
    shared = ("sparsity", "pattern", "compat", "scheme", "bits", "group_size", "symmetric")
    given = {k: v for k, v in method.options().items() if k in entry.options and k in shared}
    made: Method = entry.make(given)
    return made


def transfer(
    bank: Bank,
    layers: Sequence[engine.TargetLayer],
    method: Method,
    sets: Mapping[str, Tensor],
    domains: Sequence[str],
    *,
    own_fold: str = "choose",
    judge_fold: str = "judge",
    rows: int | None = ROWS,
    progress: bool = False,
) -> Transfer:
    """Judge calibration sets on domains.

    Parameters
    ----------
    sets
        Name -> weights of the sequences of the bank, float64 ``[sequences]``.
    domains
        Sources of the bank that hold sequences in both folds.
    own_fold
        Fold of a domain that its own calibration uses.
    judge_fold
        Fold of a domain that errors are judged on.
    rows
        Evenly spread output rows of a layer that are judged; None: all.

    Raises
    ------
    UserError
        When the bank does not hold a domain or a layer, or holds no Gram matrices of a domain,
        or when there is nothing to compare.
    """
    if not sets or not domains:
        raise UserError(
            "bank", f"{len(sets)} sets and {len(domains)} domains", "one or more of each"
        )
    refuse_nothing(method)
    baseline = baseline_of(method)
    methods: dict[str, tuple[Method, Tensor | None]] = {
        f"set {name}": (method, weights) for name, weights in sets.items()
    }
    for domain in domains:
        methods[f"{OWN} {domain}"] = (method, bank.mixture({domain: 1.0}, own_fold))
    methods[BASELINE] = (baseline, None)
    judges = {domain: bank.mixture({domain: 1.0}, judge_fold) for domain in domains}
    found = layer_errors(bank, layers, methods, judges, rows=rows, progress=progress)
    names = [layer.name for _, own in layers_by_input(bank, layers) for layer in own]
    entries = []
    for name in sets:
        for column, domain in enumerate(domains):
            error = found[f"set {name}"][:, column]
            own = found[f"{OWN} {domain}"][:, column]
            baseline_error = found[BASELINE][:, column]
            ratio = error / baseline_error
            place = int(ratio.nan_to_num(0.0).argmax())
            entries.append(
                Entry(
                    set=name,
                    domain=domain,
                    error=float(error.nansum()),
                    regret=float(error.nansum() / own.nansum()),
                    against_no_data=float(ratio.nanmedian()),
                    worst=float(ratio[place]),
                    worst_layer=names[place],
                    own_against_no_data=float((own / baseline_error).nanmedian()),
                )
            )
    return Transfer(method.label, baseline.label, tuple(entries), rows)


def refuse_nothing(method: Method) -> None:
    """Raise a UserError for a method that leaves all weights alone: its errors have no ratio."""
    if method.does_nothing:
        raise UserError(
            "method",
            "with these options no weight is changed",
            "sparsity above 0, or fewer than 16 bits",
            "for instance sparsity=0.5",
        )


def log_regrets(errors: Tensor, own: Tensor) -> Tensor:
    """Return the median over layers of ``log R`` for every domain, ``[domains]``.

    ``errors`` and ``own`` are ``[layers, domains]``.
    """
    return torch.log(errors / own).nanmedian(dim=0).values
