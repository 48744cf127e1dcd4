"""DSnoT: weights change places until the mean output of each row is kept."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from lm_calib_plugin.pruning.parts import Refinement, Selection, Strength
from lm_calib_plugin.pruning.scores.wanda import Wanda
from lm_calib_plugin.statistics import LayerStats, Spread, spread_in

# Of the mean square of a channel; below it a variance is nothing but rounding.
TINY = 1e-12


@dataclass(frozen=True)
class DSnoT(Refinement):
    """Training-free fine-tuning of a mask (Zhang et al., arXiv 2310.08915, algorithm 1).

    A weight's share of the mean output is ``q_ij = W_ij * m_j``, and what a row lacks is
    ``e_i``, the sum of ``q_ij`` over the weights that were removed. In each cycle a row takes back
    the removed weight whose ``q / var_j`` is largest in the direction of ``e_i``; in exchange goes
    the weight of smallest Wanda score among those kept whose ``q`` brings ``e_i`` nearer to zero
    (for N:M: the one of smallest Wanda score in the same group). A row is done when ``|e_i|`` is at
    most ``threshold``, when the exchange would turn the sign of ``e_i``, or when nothing is left to
    exchange. No weight changes places twice.

    As in the paper's code ``m_j`` is the sum of channel ``j`` over the tokens of a sequence,
    averaged over the sequences: the threshold means less the longer the sequences are.
    ``compat=reference`` does what that code does by default: it leaves layers inside an ``mlp``
    as they are, lets the sign of ``e_i`` turn in unstructured masks, and takes the variance within
    sequences only.

    Parameters
    ----------
    cycles
        Largest number of exchanges in each row.
    threshold
        Where a row is done, in units of the mean output times the length of a sequence.
    power
        Of the variance by which regrown weights are ranked.
    """

    statistic: ClassVar[str] = "spread"
    uses_compat: ClassVar[bool] = True
    rows_independent: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2310.08915"

    cycles: int = 50
    threshold: float = 0.1
    power: float = 1.0

    def __post_init__(self) -> None:
        self.at_least("cycles", 0)
        self.at_least("threshold", 0)
        self.at_least("power", 0)

    def applies_to(self, layer: str, strength: Strength) -> bool:
        """Return whether a layer is refined; with ``compat=reference`` none inside an ``mlp``."""
        return not strength.reference or "mlp" not in layer.split(".")

    def refine(
        self,
        weight: Tensor,
        selection: Selection,
        stats: LayerStats | None,
        strength: Strength,
    ) -> Selection:
        """Return the selection with the mask after the exchanges."""
        spread = spread_in(stats)
        weight = weight.contiguous()
        keep = selection.keep.clone(memory_format=torch.contiguous_format)
        rows = self._start(weight, keep, spread, strength.reference)
        one_sign = bool(strength.n_of_m) or not strength.reference
        for _ in range(self.cycles):
            rows = self._cycle(rows, keep, strength.n_of_m, one_sign)
            if not rows.number.numel():
                break
        if torch.equal(keep, selection.keep):
            return selection
        # Values that were found on another mask are of no use on this one.
        return selection.but(keep=keep, weight=None, solved="")

    def _start(self, weight: Tensor, keep: Tensor, spread: Spread, reference: bool) -> _Rows:
        mean = (spread.sums / max(1, spread.sequences)).to(weight.device)
        shares = weight.double() * mean
        variance = spread.variance_within() if reference else spread.variance()
        square = spread.sum_squares / max(spread.mass, 1.0)
        floor = (TINY * square).clamp_min(1e-300)
        spreads = torch.maximum(variance.double(), floor).to(weight.device) ** self.power
        lacks = shares.masked_fill(keep, 0.0).sum(dim=1)
        wanda = Wanda().scores(weight, spread).masked_fill(~keep, torch.inf)
        return _Rows(
            number=torch.arange(weight.shape[0], device=weight.device),
            lacks=lacks,
            first=lacks.sign(),
            shares=shares,
            gains=(shares / spreads).masked_fill(keep, 0.0),
            costs=wanda,
        )

    def _cycle(
        self, rows: _Rows, keep: Tensor, n_of_m: tuple[int, int] | None, one_sign: bool
    ) -> _Rows:
        """Do one exchange in every row of ``keep`` that is not done; return those that go on."""
        rows = rows.only(rows.lacks.abs() > self.threshold)
        if not rows.number.numel():
            return rows
        sign = rows.lacks.sign()[:, None]
        gain, back = (rows.gains * sign).max(dim=1, keepdim=True)
        if n_of_m:
            width = n_of_m[1]
            group = back // width * width + torch.arange(width, device=back.device)
            cost, place = rows.costs.gather(1, group).min(dim=1, keepdim=True)
            out = group.gather(1, place)
        else:
            useful = rows.costs.masked_fill(rows.shares * sign >= 0, torch.inf)
            cost, out = useful.min(dim=1, keepdim=True)
        change = rows.shares.gather(1, out) - rows.shares.gather(1, back)
        lacks = rows.lacks + change.squeeze(1)
        possible = (gain > 0).squeeze(1) & cost.isfinite().squeeze(1)
        if one_sign:
            possible &= lacks.sign() == rows.first
        rows = rows.only(possible)
        rows.lacks, back, out = lacks[possible], back[possible], out[possible]
        keep[rows.number[:, None], back] = True
        keep[rows.number[:, None], out] = False
        rows.gains.scatter_(1, back, 0.0)
        rows.costs.scatter_(1, out, torch.inf)
        if n_of_m:
            # A group that has nothing left to give takes nothing back.
            group = group[possible]
            spent = rows.costs.gather(1, group).isinf().all(dim=1, keepdim=True)
            rows.gains.scatter_(1, group, rows.gains.gather(1, group).masked_fill(spent, 0.0))
        return rows


@dataclass
class _Rows:
    """The rows that still exchange weights, and what is left to exchange in each.

    ``number`` in the layer, ``lacks`` now and the sign of it at ``first``, each ``[rows]``;
    ``shares`` of the mean output, ``gains`` of removed weights (zero: not to be had), ``costs`` of
    kept ones (infinite: not to be had), each ``[rows, in]``.
    """

    number: Tensor
    lacks: Tensor
    first: Tensor
    shares: Tensor
    gains: Tensor
    costs: Tensor

    def only(self, chosen: Tensor) -> _Rows:
        """Return the chosen rows, ``[rows]``."""
        if bool(chosen.all()):
            return self
        return _Rows(*(getattr(self, field.name)[chosen] for field in fields(self)))
