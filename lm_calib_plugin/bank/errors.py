"""Output errors of layers compressed under one set of statistics and judged under another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from lm_calib_plugin import engine
from lm_calib_plugin.bank.layout import InputRow
from lm_calib_plugin.bank.store import Bank
from lm_calib_plugin.method import Method


def layers_by_input(
    bank: Bank, layers: Sequence[engine.TargetLayer]
) -> list[tuple[InputRow, list[engine.TargetLayer]]]:
    """Return the inputs of the bank with the layers that read them, in the order of the model."""
    by_name = {layer.name: layer for layer in layers}
    found = []
    for row in bank.inputs:
        own = [by_name[name] for name in row.layers if name in by_name]
        if own:
            found.append((row, own))
    return found


def quadratic(change: Tensor, gram: Tensor) -> float:
    """Return ``tr(D G D^T)``, the squared output error of a weight change ``D [out, in]``."""
    return float(((change @ gram) * change).sum(dtype=torch.float64))


def layer_errors(
    bank: Bank,
    layers: Sequence[engine.TargetLayer],
    methods: Mapping[str, tuple[Method, Tensor | None]],
    judges: Mapping[str, Tensor],
    *,
    share: tuple[int, int] = (0, 1),
    progress: bool = False,
) -> dict[str, Tensor]:
    """Compress every layer in several ways and judge each on several domains.

    No forward pass: statistics come from the bank, weights from the dense model, which is not
    changed. One-shot: every layer sees dense activations.

    Parameters
    ----------
    bank, layers
        Statistics, and the layers of the dense model.
    methods
        Name -> the method, and the weights ``[sequences]`` of its calibration set (None for a
        method without data).
    judges
        Name of a domain -> weights of the sequences that it is judged on.
    share
        ``(i, k)``: only every k-th input, beginning with the i-th.

    Returns
    -------
    dict
        Name -> relative squared output errors ``tr(D H D^T) / tr(W H W^T)``, float64
        ``[layers, domains]``; NaN where the dense output is zero on a domain.
    """
    found: dict[str, list[list[float]]] = {name: [] for name in methods}
    first, step = share
    work = layers_by_input(bank, layers)[first::step]
    for row, own in tqdm(work, desc="layer errors", disable=not progress):
        grams = [bank.gram(row, weights).gram() for weights in judges.values()]
        stats = {
            name: None if weights is None else bank.statistics(row, method.statistic, weights)
            for name, (method, weights) in methods.items()
        }
        for layer in own:
            before = layer.read()
            sizes = [quadratic(before, gram.to(before.device)) for gram in grams]
            for name, (method, _) in methods.items():
                result = method.compress(before, stats[name], layer.parameter.dtype)
                change = result.weight.to(layer.parameter.dtype).float() - before
                errors = [quadratic(change, gram.to(before.device)) for gram in grams]
                found[name].append(
                    [e / s if s > 0 else float("nan") for e, s in zip(errors, sizes, strict=True)]
                )
    return {name: torch.tensor(rows, dtype=torch.float64) for name, rows in found.items()}
