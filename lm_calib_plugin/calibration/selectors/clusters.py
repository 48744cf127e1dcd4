"""``kmeans``: one medoid of each of ``count`` clusters of activations (COLA, arXiv 2510.10618).

Features are mean block outputs without pads and first token, scaled to unit length per block,
concatenated and projected to 64 dimensions. Of ten runs of Lloyd's algorithm from k-means++
starts the one with the smallest sum of squared distances is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.calibration.selectors.base import Selector
from lm_calib_plugin.calibration.selectors.features import Features

RUNS = 10
STEPS = 100


class Clusters(Selector):
    """The candidate nearest to the center of each cluster, large clusters first."""

    needs = frozenset({"means"})
    paper = "https://arxiv.org/abs/2510.10618"

    def select(
        self, candidates: Sequence[Tensor], count: int, features: Features, seed: int
    ) -> list[int]:
        """Cluster, then take the member nearest to each center."""
        points = features.projected()
        owner, centers, inertia = kmeans(points, count, derive_seed(seed, "kmeans"))
        sizes = torch.bincount(owner, minlength=count)
        distance = squared_distances(points, centers)
        chosen = []
        for cluster in sorted(range(count), key=lambda c: (-int(sizes[c]), c)):
            inside = (owner == cluster).nonzero().flatten()
            chosen.append(int(inside[distance[inside, cluster].argmin()]))
        self.facts = {"inertia": inertia, "cluster_sizes": sorted(sizes.tolist(), reverse=True)}
        return chosen


def kmeans(points: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, float]:
    """Return owner ``[points]``, centers ``[count, dimensions]`` and the sum of squares.

    No cluster is empty: one that loses its last point gets the point farthest from its center.
    """
    best: tuple[Tensor, Tensor, float] | None = None
    for run in range(RUNS):
        generator = torch.Generator().manual_seed(derive_seed(seed, run))
        found = _lloyd(points, points[_plus_plus(points, count, generator)])
        if best is None or found[2] < best[2]:
            best = found
    assert best is not None
    return best


def squared_distances(points: Tensor, centers: Tensor) -> Tensor:
    """Return ``[points, centers]``, differences first, so that equal points are at zero."""
    return torch.stack([(points - center).square().sum(1) for center in centers], dim=1)


def _plus_plus(points: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """Draw different starts, each with a chance in proportion to its squared distance."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    nearest = (points - points[chosen[0]]).square().sum(1)
    while len(chosen) < count:
        chances = nearest.clone()
        chances[chosen] = 0
        if float(chances.sum()) == 0:  # only copies are left
            chances = torch.ones_like(nearest)
            chances[chosen] = 0
        chosen.append(int(torch.multinomial(chances, 1, generator=generator)))
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
    return chosen


def _lloyd(points: Tensor, centers: Tensor) -> tuple[Tensor, Tensor, float]:
    count = len(centers)
    owner = torch.full((len(points),), -1)
    for _ in range(STEPS):
        distance = squared_distances(points, centers)
        nearest = _none_empty(distance.argmin(1), distance, count)
        if bool((nearest == owner).all()):
            break
        owner = nearest
        sums = torch.zeros_like(centers).index_add_(0, owner, points)
        centers = sums / torch.bincount(owner, minlength=count)[:, None]
    inertia = float((points - centers[owner]).square().sum())
    return owner, centers, inertia


def _none_empty(owner: Tensor, distance: Tensor, count: int) -> Tensor:
    """Move the farthest points of clusters of several into the empty clusters."""
    owner = owner.clone()
    sizes = torch.bincount(owner, minlength=count)
    for cluster in (sizes == 0).nonzero().flatten().tolist():
        own = distance.gather(1, owner[:, None])[:, 0]
        movable = sizes[owner] > 1
        far = int(own.masked_fill(~movable, -1).argmax())
        sizes[owner[far]] -= 1
        owner[far] = cluster
        sizes[cluster] = 1
    return owner
