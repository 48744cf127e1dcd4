"""Outlier features (LLM.int8, arXiv 2208.07339) and experts that few tokens reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lm_calib_plugin.diagnostics.activations.inputs import Input
from lm_calib_plugin.diagnostics.activations.seen import Seen

BLOCKS_SHARE, POSITIONS_SHARE = 0.25, 0.06
# Experts that get less than this part of an even share are named.
FEW = 0.1


def outlier_features(seen: Sequence[tuple[Input, Seen]]) -> list[dict[str, Any]]:
    """Return the hidden dimensions with values of size 6 and more nearly everywhere.

    In at least 25 % of the blocks one at all, and at 6 % or more of the positions, counted over
    all blocks together. Looked at are the inputs whose channels are those of the residual stream
    (what attention and feed-forward parts read behind their norms); a position counts once for
    each of these inputs. Exact.

    Parameters
    ----------
    seen
        The inputs, and what was seen of each.

    Returns
    -------
    list of dict
        ``channel``, ``blocks`` and ``positions`` (shares) and ``amax``; the most frequent first.
    """
    parts = [(one, own) for one, own in seen if own.rows]
    if not parts:
        return []
    blocks = sorted({one.block for one, _ in parts})
    width = parts[0][0].width
    inside = torch.zeros(len(blocks), width, dtype=torch.bool)
    large, rows = torch.zeros(width, dtype=torch.int64), 0
    peak = torch.zeros(width)
    for one, own in parts:
        count = own.large.cpu()
        inside[blocks.index(one.block)] |= count > 0
        large += count
        rows += own.rows
        peak = torch.maximum(peak, own.peak.cpu())
    share, positions = inside.double().mean(0), large.double() / rows
    which = ((share >= BLOCKS_SHARE) & (positions >= POSITIONS_SHARE)).nonzero()[:, 0].tolist()
    return [
        {
            "channel": j,
            "blocks": float(share[j]),
            "positions": float(positions[j]),
            "amax": float(peak[j]),
        }
        for j in sorted(which, key=lambda j: (-float(positions[j]), j))
    ]


def idle_experts(inputs: Sequence[Input], tokens: dict[str, int]) -> list[dict[str, Any]]:
    """Return the experts that got no token, or less than a tenth of an even share.

    Parameters
    ----------
    inputs
        All inputs.
    tokens
        How many tokens reached each, by name.

    Returns
    -------
    list of dict
        ``expert`` (its name), ``tokens`` and ``even`` (what each would get in an even share).
    """
    groups: dict[str, dict[str, int]] = {}
    for one in inputs:
        if one.expert is not None:
            module = one.module.rpartition(".")[0]
            groups.setdefault(module, {})[one.module] = tokens[one.name]
    found = []
    for experts in groups.values():
        even = sum(experts.values()) / len(experts)
        found += [
            {"expert": name, "tokens": count, "even": even}
            for name, count in experts.items()
            if count < FEW * even or not count
        ]
    return sorted(found, key=lambda one: one["tokens"])
