"""Exact 1-swap descent: exchange one removed weight for one kept weight while the error falls.

Every row ``w`` is a problem of its own. With the present values ``v``, the error ``e = w - v`` and
the residual ``r = G e``, removing the kept weight ``p`` and giving the removed weight ``u`` the
value ``t`` changes ``e^T G e`` by::

    v_p (2 r_p + v_p G_pp) + t (t G_uu - 2 r_u) - 2 v_p t G_pu

For ``t`` there are two rules: the dense weight ``w_u``, as long as kept weights are those of the
dense layer (arXiv 2512.10922), or the best value ``(r_u + v_p G_pu) / G_uu``, after a re-fit.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from lm_calib_plugin.pruning.descent import check_fallen

# Numbers held at once in the largest tensor of a tile of rows.
TILE = 1 << 24
# Exchanges tried from one shortlist; each is made only if it gains after those before it.
BATCH = 8
GROUPS = 32  # the same with N:M, one of each group
# Rows that have stopped leave the work when so many of the rest have.
STOPPED = 0.25
INF = float("inf")


class Swapped(NamedTuple):
    """``keep`` and ``weight`` (zero off the mask) are ``[out, in]``; ``swaps`` counts them all.

    ``started`` is ``e^T G e`` of every row before the first exchange, ``[out]``.
    """

    keep: Tensor
    weight: Tensor
    swaps: int
    started: Tensor


def swap_descent(
    weight: Tensor,
    keep: Tensor,
    gram: Tensor,
    steps: int,
    n_of_m: tuple[int, int] | None = None,
    candidates: int | None = 32,
    kept: Tensor | None = None,
    check: bool = True,
) -> Swapped:
    """Exchange weights, row by row, while that lowers the output error.

    The gain of every exchange is exact, so the error of a row falls with each of them. Rows stop
    by themselves.

    Parameters
    ----------
    weight
        Dense weight, ``[out, in]``.
    keep
        Mask of the weights that stay, ``[out, in]``; every row keeps its count, and with
        ``n_of_m`` every group.
    gram
        Gram matrix of the inputs, ``[in, in]``, of the dtype of ``weight``.
    steps
        At most so many exchanges in a row.
    n_of_m
        ``(N, M)``: exchange within groups of M inputs only; all pairs of every group are tried.
    candidates
        Unstructured: so many kept weights that cost least, and so many removed ones that gain
        most, are paired; None or 0: all pairs of a row, at a high price.
    kept
        Values of the kept weights after a re-fit, ``[out, in]``; None: dense ones. When given, a
        weight that returns takes its best value instead of its dense one.
    check
        Compute the error of the result, and raise when it has risen; False: whoever calls does.

    Returns
    -------
    Swapped
        New mask, values and the number of exchanges; arguments are not changed.
    """
    values = torch.where(keep, weight if kept is None else kept, torch.zeros_like(weight))
    mask = keep.clone()
    search = _Search(gram, n_of_m, candidates or weight.shape[1], free=kept is not None)
    tile = max(1, TILE // search.numbers_per_row)
    swaps, started = 0, []
    for first in range(0, weight.shape[0], tile):
        own = slice(first, first + tile)
        rows = _Rows.of(weight[own], values[own], mask[own], gram, steps)
        started.append(rows.error.clone())
        if steps < 1:
            continue
        swaps += search.descend(rows, values[own], mask[own])
        if check:
            check_fallen(started[-1], weight[own] - values[own], gram, "exchange of weights")
    return Swapped(mask, values, swaps, torch.cat(started))


@dataclass
class _Rows:
    """Rows still at work: tensors ``[rows, in]``, then ``[rows]``.

    ``number`` is the place of a row in its tile, ``error`` is ``e^T G e``, ``left`` how many
    exchanges a row may still make.
    """

    dense: Tensor
    value: Tensor
    keep: Tensor
    residual: Tensor
    number: Tensor
    error: Tensor
    left: Tensor

    @classmethod
    def of(cls, dense: Tensor, value: Tensor, keep: Tensor, gram: Tensor, steps: int) -> _Rows:
        difference = dense - value
        residual = difference @ gram
        number = torch.arange(len(dense), device=dense.device)
        error = (difference * residual).sum(1)
        left = torch.full_like(number, steps)
        return cls(dense, value.clone(), keep.clone(), residual, number, error, left)

    def only(self, which: Tensor) -> _Rows:
        return _Rows(*(getattr(self, field.name)[which] for field in fields(self)))


class _Search:
    """Finds and makes exchanges in many rows at once.

    ``free``: a weight that returns takes its best value, else its dense one.
    """

    def __init__(
        self, gram: Tensor, n_of_m: tuple[int, int] | None, candidates: int, free: bool
    ) -> None:
        self.gram, self.flat, self.free = gram, gram.reshape(-1), free
        self.width, self.energy = gram.shape[0], gram.diagonal()
        # An input without energy has no residual either: its weight returns as zero.
        self.inverse = torch.where(self.energy > 0, 1 / self.energy, 0.0)
        self.group = n_of_m[1] if n_of_m else 0
        self.candidates = min(candidates, self.width)
        if self.group:
            inside = torch.arange(self.width, device=gram.device).view(-1, self.group)
            self.blocks = gram[inside[:, :, None], inside[:, None, :]]
        pairs = self.width * self.group if self.group else self.candidates**2
        self.numbers_per_row = max(pairs, 8 * self.width, 4 * (GROUPS if n_of_m else BATCH) ** 2)
        # Gains below the rounding of a row's error are none.
        self.least = 16 * torch.finfo(gram.dtype).eps

    def descend(self, rows: _Rows, values: Tensor, mask: Tensor) -> int:
        """Exchange until nothing gains; write into ``values`` and ``mask``; return the count."""
        swaps = 0
        while len(rows.number):
            pairs = self._group_pairs(rows) if self.group else self._row_pairs(rows)
            accepted = self._exchange(rows, *pairs)
            swaps += int(accepted.sum())
            going = accepted.any(1) & (rows.left > 0)
            share = float(going.float().mean())
            if share <= 1 - STOPPED:
                done = rows.only(~going)
                values[done.number], mask[done.number] = done.value, done.keep
                rows = rows.only(going)
        return swaps

    # --- which exchanges to try -------------------------------------------------------------------

    def _alone(self, rows: _Rows) -> tuple[Tensor, Tensor]:
        """Return what removing, and what returning, would change by itself, ``[rows, in]`` each.

        Infinite where a weight is removed already, or there.
        """
        value, residual, energy = rows.value, rows.residual, self.energy
        removing = value * (2 * residual + value * energy)
        if self.free:
            returning = -residual.square() * self.inverse
        else:
            returning = rows.dense * (rows.dense * energy - 2 * residual)
        return removing.masked_fill_(~rows.keep, INF), returning.masked_fill_(rows.keep, INF)

    def _together(
        self,
        between: Tensor,
        value: Tensor,
        removed: tuple[Tensor, Tensor, Tensor],
        alone: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Return the change of the error by pairs; all tensors broadcast to the pairs.

        ``between`` is the Gram element of a pair, ``value`` that of the kept weight, ``removed``
        holds dense weight, residual and inverse energy of the removed one, ``alone`` what each
        would change by itself.
        """
        dense, residual, inverse = removed
        change = between * value
        if self.free:
            change.add_(residual).square_().mul_(-inverse)
            returning = torch.where(alone[1] == INF, INF, 0.0)
        else:
            change.mul_(-2 * dense)
            returning = alone[1]
        return change.add_(alone[0]).add_(returning)

    def _row_pairs(self, rows: _Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Return disjoint pairs of a shortlist, best first.

        Tensors ``[rows, pairs]``: places of the kept and of the removed weights, and whether there
        is such a pair at all.
        """
        removing, returning = self._alone(rows)
        count = rows.keep.sum(1)
        # Rows that keep or remove fewer than others have idle entries in their shortlist.
        most = [min(self.candidates, int(n.max())) for n in (count, self.width - count)]
        cost, kept = removing.topk(most[0], dim=1, largest=False)
        gain, removed = returning.topk(most[1], dim=1, largest=False)
        of_removed = (rows.dense.gather(1, removed), rows.residual.gather(1, removed))
        change = self._together(
            self.flat[kept[:, :, None] * self.width + removed[:, None, :]],
            rows.value.gather(1, kept)[:, :, None],
            (of_removed[0][:, None], of_removed[1][:, None], self.inverse[removed][:, None]),
            (cost[:, :, None], gain[:, None]),
        )
        first, second, possible = _disjoint(change)
        return kept.gather(1, first), removed.gather(1, second), possible

    def _group_pairs(self, rows: _Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best pair of each of the groups that gain most, as ``_row_pairs`` does."""
        shape = (len(rows.number), -1, self.group)
        removing, returning = (x.view(shape) for x in self._alone(rows))
        dense, residual = (x.view(shape)[:, :, None] for x in (rows.dense, rows.residual))
        change = self._together(
            self.blocks,
            rows.value.view(shape)[..., None],
            (dense, residual, self.inverse.view(-1, 1, self.group)),
            (removing[..., None], returning[:, :, None]),
        )
        best, pair = change.flatten(2).min(dim=2)
        best, groups = best.topk(min(GROUPS, best.shape[1]), dim=1, largest=False)
        pair = pair.gather(1, groups)
        start = groups * self.group
        return start + pair // self.group, start + pair % self.group, best < INF

    # --- making them ------------------------------------------------------------------------------

    def _exchange(self, rows: _Rows, kept: Tensor, removed: Tensor, possible: Tensor) -> Tensor:
        """Make in ``rows``, one after the other, the exchanges that gain; tell which, [rows, n]."""
        count = kept.shape[1]
        index = torch.cat([kept, removed], dim=1)
        gram = self.flat[index[:, :, None] * self.width + index[:, None, :]]
        residual, energy = rows.residual.gather(1, index), self.energy[index]
        value, dense = rows.value.gather(1, kept), rows.dense.gather(1, removed)
        inverse = self.inverse[removed]
        accepted = torch.zeros_like(possible)
        if not count:
            return accepted
        # What is added to the error of each entry: a removed value, minus a returning one.
        moved = torch.zeros_like(residual)
        for i in range(count):
            j = count + i
            slope = residual[:, j] + value[:, i] * gram[:, i, j]
            taken = slope * inverse[:, i] if self.free else dense[:, i]
            change = value[:, i] * (2 * residual[:, i] + value[:, i] * energy[:, i])
            change += taken * (taken * energy[:, j] - 2 * slope)
            yes = possible[:, i] & (change < -self.least * rows.error) & (rows.left > 0)
            accepted[:, i] = yes
            moved[:, i] = torch.where(yes, value[:, i], 0.0)
            moved[:, j] = torch.where(yes, -taken, 0.0)
            residual += moved[:, i, None] * gram[:, i] + moved[:, j, None] * gram[:, j]
            rows.error += torch.where(yes, change, 0.0)
            rows.left -= yes.long()
        rows.residual += embedding_bag(index, self.gram, per_sample_weights=moved, mode="sum")
        # Rejected entries, which may repeat an accepted one, add zero.
        rows.value.scatter_add_(1, index, -moved)
        turned = accepted.repeat(1, 2).to(moved.dtype)
        rows.keep ^= torch.zeros_like(rows.value).scatter_add_(1, index, turned) > 0
        return accepted


def _disjoint(change: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pick up to ``BATCH`` entries of ``[rows, a, b]``, lowest first, no line or column twice.

    Returns lines, columns and whether the entry is finite, ``[rows, picks]`` each.
    """
    lines, columns = change.shape[1:]
    number = torch.arange(len(change), device=change.device)
    places, finite = [number.new_zeros(0, len(change))], [change.new_zeros(0, len(change)) > 0]
    for _ in range(min(BATCH, lines, columns)):
        lowest, place = change.flatten(1).min(dim=1)
        places.append(place[None])
        finite.append((lowest < INF)[None])
        change[number, place // columns] = INF
        change[number, :, place % columns] = INF
    picked = torch.cat(places).t()
    return picked // max(1, columns), picked % max(1, columns), torch.cat(finite).t()
