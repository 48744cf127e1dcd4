"""The dense model in the coordinates of a compressed one whose channels were rotated or scaled.

Some methods change a model, but not what it computes, before they round it. Its weights, and the
hidden states of a rotated one, can only be compared with those of a dense model that was changed
in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lm_calib_plugin import engine
from lm_calib_plugin.engine.wiring import NORM, Feed, wiring_of
from lm_calib_plugin.errors import UnsupportedModelError
from lm_calib_plugin.guard import left_as_found
from lm_calib_plugin.recipe import Recipe


def rotated(dense: Any, recipe: Recipe | None) -> list[str]:
    """Rotate a dense model, in place, as a recipe does; return what is to be said of it."""
    if recipe is None:
        return []
    transform = recipe.make_method().transform
    if transform is None or transform.level != "model":
        return []
    with left_as_found(dense):
        blocks = engine.find_blocks(dense, recipe.block_path)
        engine.rotate(dense, blocks, **transform.options())
    return ["the dense model was rotated as the compressed one: compared are rotated weights"]


def scaled(
    dense: Any,
    compressed: Any,
    transforms: Sequence[Mapping[str, Any]],
    block_path: str | None = None,
) -> tuple[set[str], list[str]]:
    """Scale the inputs of a dense model, in place, as those of a compressed one were.

    Parameters
    ----------
    transforms
        As the report of the compressed model tells them.

    Returns
    -------
    left, notes
        Layers that could not be brought to one scale, by name, and what is to be said.

    Notes
    -----
    Factors are read off both models: of norms, whose gains are not rounded, they are exact. Where a
    linear layer was divided they are the geometric mean of what its rows and the columns of its
    readers tell, each by least squares: rounding and pruning make both weights smaller or larger
    by the same factor, which cancels.
    """
    names = {str(one["source"]) for one in transforms if isinstance(one.get("source"), str)}
    if not names:
        return set(), []
    try:
        ours, theirs = (
            wiring_of(model, engine.find_blocks(model, block_path)) for model in (dense, compressed)
        )
    except UnsupportedModelError:
        return _touched(transforms), []
    twins = {feed.name: feed for own in theirs.blocks for feed in own}
    feeds = [f for own in ours.blocks for f in own if f.name in names and f.name in twins]
    # Norms first: they change the columns of linear layers that feed others.
    for feed in sorted(feeds, key=lambda f: f.kind != NORM):
        factors = feed.tie(_factors(feed, twins[feed.name]))
        feed.multiply(feed.divide(factors))
    found = {feed.name for feed in feeds}
    left = _touched([one for one in transforms if one.get("source") not in found])
    note = (
        f"the inputs of {len(feeds)} sources were scaled in the dense model as in the compressed "
        "one: compared are scaled weights"
    )
    return left, [note]


@torch.no_grad()
def _factors(feed: Feed, twin: Feed) -> Tensor:
    """Return by how much the input of the readers was divided, ``[in]``, float32."""
    if feed.kind == NORM:
        gains = [_stored(f.source) + f.shift for f in (feed, twin)]
        there = (gains[0] != 0) & (gains[1] != 0)
        ones = torch.ones_like(gains[0])
        return _positive(torch.where(there, gains[0] / torch.where(there, gains[1], ones), ones))
    before, after = (_oriented(f.source)[f.rows] for f in (feed, twin))
    by_rows = _slope(after, before, 1)
    columns = [
        (_oriented(r), _oriented(t)) for r, t in zip(feed.readers, twin.readers, strict=True)
    ]
    by_columns = _slope(torch.cat([w for w, _ in columns]), torch.cat([w for _, w in columns]), 0)
    return (_positive(by_rows) * _positive(by_columns)).sqrt()


def _slope(x: Tensor, y: Tensor, over: int) -> Tensor:
    """Return the ``s`` for which ``s x`` comes nearest to ``y``, over one dimension.

    For ``over=1`` the error is that of ``x`` on ``y / s``: there ``y`` is what was not rounded.
    """
    product = (x * y).sum(over)
    if over:
        return y.square().sum(over) / torch.where(product > 0, product, torch.nan)
    return product / x.square().sum(over)


def _positive(factors: Tensor) -> Tensor:
    fine = factors.isfinite() & (factors > 0)
    return torch.where(fine, factors, torch.ones_like(factors))


def _oriented(module: Any) -> Tensor:
    """Return the weight of a linear layer as ``[out, in]``, float32, on the CPU."""
    weight = _stored(module)
    return weight if isinstance(module, torch.nn.Linear) else weight.t()


def _stored(module: Any) -> Tensor:
    weight: Tensor = module.weight.data.float().cpu()
    return weight


def _touched(transforms: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the names of what was scaled: columns of readers and outputs of sources."""
    found: set[str] = set()
    for one in transforms:
        readers = one.get("readers")
        found |= {str(name) for name in readers} if isinstance(readers, list) else set()
        found |= {one["source"]} if isinstance(one.get("source"), str) else set()
    return found
