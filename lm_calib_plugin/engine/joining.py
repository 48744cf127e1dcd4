"""Bring together what several processes watched, each of its own chunks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lm_calib_plugin.engine.ranks import Ranks
from lm_calib_plugin.engine.watched import Watched
from lm_calib_plugin.statistics import LayerStats, TokenSample


def add_up(
    stats: Sequence[LayerStats], owners: Sequence[int | None], ranks: Ranks, stage: str
) -> None:
    """Merge statistics of all processes, in place.

    Parameters
    ----------
    stats
        Those of this process, of the same kinds in the same order everywhere.
    owners
        Where each is complete afterwards; None: everywhere, with the same bits. Numbers, such as
        tokens, are complete everywhere.
    stage
        Where this process is.
    """
    _merge_numbers(stats, ranks.exchange(stage, _numbers(stats)))
    _merge(_live(stats, owners), ranks)


def join(
    watched: Sequence[Watched],
    places: Sequence[tuple[int, torch.device]],
    ranks: Ranks,
    everywhere: bool,
) -> None:
    """Bring together, in place, what all processes watched of the same inputs.

    Parameters
    ----------
    watched
        What this process watched; ``owner`` tells where each is needed.
    places
        Width of each input, and where it is kept.
    ranks
        The processes.
    everywhere
        Whether all need it.
    """
    finite = [x.finite and (x.stats is None or x.stats.is_finite()) for x in watched]
    samples = [(x.used, x.heldout) for x in watched]
    counts = [[(one.arrived, one.kept) for one in pair] for pair in samples]
    stats = [x.stats for x in watched if x.stats is not None]
    said = ranks.exchange("inputs", (finite, counts, _numbers(stats)))
    _merge_numbers(stats, [numbers for _, _, numbers in said])
    owners = [None if everywhere else x.owner for x in watched]
    holders = [o for o, x in zip(owners, watched, strict=True) if x.stats is not None]
    parts = _live(stats, holders)
    joined = []
    for number, seen in enumerate(watched):
        seen.finite = all(own[number] for own, _, _ in said)
        if seen.cross is not None:
            parts.append((seen.cross, owners[number], False))
        for kind, sample in enumerate(samples[number]):
            others = [own[number][kind] for _, own, _ in said]
            rows = _placed(sample, [kept for _, kept in others], places[number], ranks.rank)
            parts.append((rows, owners[number], False))
            joined.append((sample, rows, sum(arrived for arrived, _ in others)))
    _merge(parts, ranks)
    for sample, rows, arrived in joined:
        sample.replace(rows, arrived)


def _numbers(stats: Sequence[LayerStats]) -> list[list[float]]:
    leaves = [leaf for one in stats for leaf in one.leaves()]
    return [[getattr(leaf, name) for name in leaf.numbers] for leaf in leaves]


def _merge_numbers(stats: Sequence[LayerStats], said: Sequence[list[list[float]]]) -> None:
    leaves = [leaf for one in stats for leaf in one.leaves()]
    for leaf, *numbers in zip(leaves, *said, strict=True):
        for name, *values in zip(leaf.numbers, *numbers, strict=True):
            setattr(leaf, name, sum(values))


def _live(
    stats: Sequence[LayerStats], owners: Sequence[int | None]
) -> list[tuple[Tensor, int | None, bool]]:
    """Return the tensors of statistics, who needs them, and whether the larger value counts."""
    return [
        (tensor, owner, largest)
        for one, owner in zip(stats, owners, strict=True)
        for leaf in one.leaves()
        for tensor, largest in leaf.live()
    ]


def _merge(parts: Sequence[tuple[Tensor, int | None, bool]], ranks: Ranks) -> None:
    groups: dict[tuple[int | None, bool], list[Tensor]] = {}
    for tensor, owner, largest in parts:
        groups.setdefault((owner, largest), []).append(tensor)
    for (owner, largest), tensors in groups.items():
        ranks.add_up(tensors, owner, largest)


def _placed(
    sample: TokenSample, kept: Sequence[int], place: tuple[int, torch.device], rank: int
) -> Tensor:
    """Return the rows of a sample where they stand among those of all processes, zeros elsewhere.

    Summed up, these are the rows of all, in the order of the processes. ``kept`` tells how many
    each has.
    """
    width, device = place
    placed = torch.zeros(sum(kept), width, device=device)
    mine = sample.rows()
    if mine is not None:
        start = sum(kept[:rank])
        placed[start : start + len(mine)] = mine
    return placed
