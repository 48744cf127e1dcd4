"""Further pruning methods on one weight matrix, written from the definitions.

As in ``naive_methods.py``: plain float64, no import from the package. ``gram`` is ``X^T X``;
``tallies`` is ``[4, inputs]``: sums, sums of squares, number of tokens, number of sequences.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from naive_methods import DAMPING, fraction_of, n_of_m, smallest_of_all, smallest_of_row
from torch import Tensor

Pattern = tuple[int, int] | None


def removed(scores: Tensor, sparsity: float, pattern: Pattern) -> Tensor:
    """Mark the smallest scores of the whole matrix, or of each N:M group."""
    return n_of_m(scores, *pattern) if pattern else smallest_of_all(scores, sparsity)


def ria(weight: Tensor, square_sums: Tensor, sparsity: float, pattern: Pattern) -> Tensor:
    """Zero the smallest shares of row and column sums times the root of the input norm."""
    size = weight.double().abs()
    scores = torch.zeros_like(size)
    for i, j in (size > 0).nonzero().tolist():
        share = size[i, j] / size[:, j].sum() + size[i, j] / size[i].sum()
        scores[i, j] = share * square_sums[j].double().sqrt().sqrt()
    return weight.masked_fill(removed(scores, sparsity, pattern), 0)


def wanda_variant(weight: Tensor, square_sums: Tensor, sparsity: float, pattern: Pattern) -> Tensor:
    """In each row, zero the smallest Wanda scores up to one share of the sum of the row.

    The share is the largest one that removes no more than is asked; what is missing then comes
    from the rows that would be next, one weight each.
    """
    scores = weight.double().abs() * square_sums.double().sqrt()
    if pattern:
        return weight.masked_fill(n_of_m(scores, *pattern), 0)
    order = scores.argsort(dim=1, stable=True)
    sums = scores.gather(1, order).cumsum(1)
    asked = fraction_of(scores.numel(), sparsity)

    def counts(share: float) -> Tensor:
        return (sums <= share * sums[:, -1:]).sum(1)

    low, high = 0.0, 1.0
    if int(counts(1.0).sum()) <= asked:
        low = 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if int(counts(middle).sum()) <= asked else (low, middle)
    gone = counts(low)
    going = [i for i in range(len(gone)) if counts(high)[i] > gone[i]]
    for i in going[: asked - int(gone.sum())]:
        gone[i] += 1
    result = weight.clone()
    for i, count in enumerate(gone.tolist()):
        result[i, order[i, :count]] = 0
    return result


def dsnot(
    weight: Tensor,
    tallies: Tensor,
    sparsity: float,
    pattern: Pattern,
    cycles: int = 50,
    threshold: float = 0.1,
) -> Tensor:
    """Exchange weights of Wanda's mask, row after row, until the mean output is kept."""
    sums, squares, tokens, sequences = tallies.double()
    variance = squares / tokens - (sums / tokens).square()
    scores = weight.double().abs() * squares.sqrt()
    mask = n_of_m(scores, *pattern) if pattern else smallest_of_row(scores, sparsity)
    for w, gone, score in zip(weight.double(), mask, scores, strict=True):
        share = w * sums / sequences
        lost, kept = (
            set(gone.nonzero().flatten().tolist()),
            set((~gone).nonzero().flatten().tolist()),
        )
        lacks = sum(share[j].item() for j in sorted(lost))
        first = lacks
        for _ in range(cycles):
            if abs(lacks) <= threshold:
                break
            sign = 1 if lacks > 0 else -1
            pairs = []
            for j in lost:
                if sign * share[j] > 0:
                    if pattern:
                        group = range(
                            j // pattern[1] * pattern[1], (j // pattern[1] + 1) * pattern[1]
                        )
                        givers = [k for k in kept if k in group]
                    else:
                        givers = [k for k in kept if sign * share[k] < 0]
                    if givers:
                        giver = min(givers, key=lambda k: (score[k].item(), k))
                        pairs.append((-sign * share[j].item() / variance[j].item(), j, giver))
            if not pairs:
                break
            _, back, out = min(pairs)
            after = lacks + share[out].item() - share[back].item()
            if after * first <= 0:
                break
            lost.remove(back)
            kept.remove(out)
            gone[back], gone[out] = False, True
            lacks = after
    return weight.masked_fill(mask, 0)


def unit_diagonal(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Scale a Gram matrix to a diagonal of ones; return it and the roots of its diagonal."""
    norm = gram.diagonal().sqrt()
    return gram / norm / norm[:, None], norm


def without_dead(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Set the diagonal to 1 where it is 0, and tell where."""
    gram = gram.double().clone()
    dead = gram.diagonal() == 0
    gram.diagonal()[dead] = 1
    return gram, dead


def admm_step(
    matrix: Tensor, target: Tensor, values: Tensor, dual: Tensor, mask: Tensor, rho: float
) -> tuple[Tensor, Tensor]:
    """Return weights and dual after one step of ADMM at penalty `rho`."""
    inside = (values + dual).masked_fill(mask, 0)
    dual = dual + values - inside
    eye = torch.eye(len(matrix), dtype=torch.float64)
    return (target + rho * (inside - dual)) @ torch.linalg.inv(matrix + rho * eye), dual


def admm(
    weight: Tensor,
    gram: Tensor,
    sparsity: float,
    pattern: Pattern,
    ridge: float = 0.1,
    given: Tensor | None = None,
) -> Tensor:
    """Twenty steps of ADMM; in the first fifteen, more and more of the smallest entries go.

    With `given`, the mask (True: removed) is that one from the beginning.
    """
    gram, dead = without_dead(gram)
    matrix, norm = unit_diagonal(gram)
    matrix = matrix + ridge * torch.eye(len(matrix), dtype=torch.float64)
    dense = (weight.double() * norm).masked_fill(dead, 0)
    values, dual = dense.clone(), torch.zeros_like(dense)
    mask = torch.zeros_like(dense, dtype=torch.bool) if given is None else given
    for step in range(1, 21):
        if given is None and step <= 15:
            part = 1 - (1 - Fraction(step, 15)) ** 3
            sizes = (values + dual).abs()
            asked = Fraction(str(sparsity))
            if pattern:
                final = n_of_m(sizes, *pattern)
                sizes[~final] = float("inf")
                asked = 1 - Fraction(*pattern)
            count = int(sizes.numel() * asked * part)
            order = sizes.flatten().argsort(stable=True)[:count]
            mask = torch.zeros(sizes.numel(), dtype=torch.bool)
            mask[order] = True
            mask = mask.reshape(sizes.shape)
        values, dual = admm_step(matrix, dense @ matrix, values, dual, mask, 1.0)
    found = torch.where(dead, weight.double(), (values + dual) / norm)
    return found.masked_fill(mask, 0).to(weight.dtype)


def alps_mask(weight: Tensor, gram: Tensor, sparsity: float, pattern: Pattern) -> Tensor:
    """Mark what ALPS removes: ADMM whose penalty grows until its support stands still."""
    _, dead = without_dead(gram)
    matrix, norm = unit_diagonal(damped_live(gram))
    eye = torch.eye(len(matrix), dtype=torch.float64)
    dense = (weight.double() * norm).masked_fill(dead, 0)
    start = removed(dense.abs(), sparsity, pattern)
    inside, dual = dense.masked_fill(start, 0), torch.zeros_like(dense)
    rho, seen, moved, mask = 0.1, start, False, start
    for step in range(1, 301):
        values = (dense @ matrix - dual + rho * inside) @ torch.linalg.inv(matrix + rho * eye)
        mask = removed((values + dual / rho).abs(), sparsity, pattern)
        inside = (values + dual / rho).masked_fill(mask, 0)
        dual = dual + rho * (values - inside)
        if step % 3:
            continue
        changed = int((mask != seen).sum())
        share, seen = changed / max(1, int((~mask).sum())), mask
        if (step > 30 and share < 3e-4) or (moved and not changed):
            break
        if share > 0.005:
            moved = True
            rho *= 1.3 if share > 0.1 else 1.2
        elif moved:
            rho *= 1.1
        else:
            rho /= 5
            if changed:
                inside, dual = dense.masked_fill(start, 0), torch.zeros_like(dense)
    return mask


def damped_live(gram: Tensor) -> Tensor:
    """Add `DAMPING` times the mean diagonal to what is not dead; dead entries become 1."""
    live = gram.double().clone()
    dead = live.diagonal() == 0
    live.diagonal().add_(DAMPING * live.diagonal().mean())
    live.diagonal()[dead] = 1
    return live


def refit(weight: Tensor, gram: Tensor, mask: Tensor) -> Tensor:
    """Solve least squares over the kept weights of each row, with a ridge to their old values."""
    gram = damped_live(gram)
    result = torch.zeros_like(weight, dtype=torch.float64)
    for i, gone in enumerate(mask):
        kept = ~gone
        if kept.any():
            right = gram[kept] @ weight[i].double()
            result[i, kept] = torch.linalg.solve(gram[kept][:, kept], right)
    return result.to(weight.dtype)


def alps(weight: Tensor, gram: Tensor, sparsity: float, pattern: Pattern) -> Tensor:
    """Search the support as ALPS does, then solve for the weights on it."""
    return refit(weight, gram, alps_mask(weight, gram, sparsity, pattern))


def wanda_refit(weight: Tensor, gram: Tensor, sparsity: float, pattern: Pattern) -> Tensor:
    """Solve for the weights on the mask of Wanda."""
    scores = weight.double().abs() * gram.double().diagonal().sqrt()
    mask = n_of_m(scores, *pattern) if pattern else smallest_of_row(scores, sparsity)
    return refit(weight, gram, mask)


def obs_on(weight: Tensor, gram: Tensor, mask: Tensor) -> Tensor:
    """Remove marked weights from left to right, one at a time, each by an exact inverse."""
    gram, work = damped_live(gram), weight.double().clone()
    for i, j in mask.nonzero().tolist():
        inverse = torch.linalg.inv(gram[j:, j:])
        work[i, j:] -= work[i, j] / inverse[0, 0] * inverse[0]
    return work.masked_fill(mask, 0).to(weight.dtype)


def owl_fractions(
    scores: list[Tensor], sparsity: float, m: float = 5.0, width: float = 0.08
) -> list[float]:
    """Return the fraction removed from each block, given all Wanda scores of each block.

    What is kept grows with the share of scores above `m` times their mean, over a range of twice
    `width`; the mean over all weights is what was asked.
    """
    shares = [float((s > m * s.mean()).double().mean()) for s in scores]
    span = max(shares) - min(shares)
    more = [2 * width * (d - min(shares)) / span if span else 0.0 for d in shares]
    sizes = [s.numel() for s in scores]
    mean = sum(k * n for k, n in zip(more, sizes, strict=True)) / sum(sizes)
    return [sparsity - (k - mean) for k in more]
