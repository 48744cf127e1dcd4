"""Quantized layers as tensors and settings of the compressed-tensors format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lm_calib_plugin.quantization.activations import ActivationQuantizer, ActivationSpec
from lm_calib_plugin.quantization.grids import Grid, GridSpec


@dataclass(frozen=True)
class QuantizedLayer:
    """One linear layer of a compressed model.

    Parameters
    ----------
    name
        Path of the module, such as ``model.layers.0.self_attn.q_proj``.
    weight
        ``[out, in]`` as it is evaluated, in the dtype of the model.
    grid
        Its levels; None: the weight stays as it is.
    activation
        What rounds its input; None: nothing does.
    """

    name: str
    weight: Tensor
    grid: Grid | None
    activation: ActivationQuantizer | None


def refusal(
    levels: GridSpec | None, activation: ActivationSpec | None, dtype: torch.dtype | None = None
) -> str | None:
    """Return why the format can not hold layers of such a kind, None if it can.

    ``dtype`` is that of the model, where it is known already.
    """
    raise NotImplementedError


def layer_tensors(layer: QuantizedLayer) -> dict[str, Tensor]:
    """Return what is stored instead of ``weight``, by local name, such as ``weight_packed``."""
    raise NotImplementedError


def quantization_config(layers: Sequence[QuantizedLayer], others: Sequence[str]) -> dict[str, Any]:
    """Return ``quantization_config`` of ``config.json``.

    ``others`` are the names of linear layers that are not quantized.
    """
    raise NotImplementedError


def module_refusal(module: torch.nn.Module) -> str | None:
    """Return why the format can not hold a layer of such a module, None if it can."""
    raise NotImplementedError
