"""Whether a method's work beside the weights can be done on a model; before any data is read."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lm_calib_plugin.engine.activations import check_activations
from lm_calib_plugin.engine.discovery import Blocks
from lm_calib_plugin.engine.kv_cache import check_kv
from lm_calib_plugin.engine.layers import TargetLayer
from lm_calib_plugin.engine.rotation import check_rotation
from lm_calib_plugin.engine.wiring import wiring_of
from lm_calib_plugin.errors import UnsupportedModelError
from lm_calib_plugin.method import Method


def check_reach(
    model: nn.Module, blocks: Blocks, layers: Sequence[TargetLayer], method: Method
) -> None:
    """Refuse a model that a transform, a rounding of blocks or rounded inputs can not be put on.

    Raises
    ------
    UserError
        Names the layer or the architecture, and what to do instead.
    """
    if method.activations is not None:
        check_activations(layers, method.activations)
    if method.transform is not None and method.transform.level == "model":
        check_rotation(model, blocks)
    elif method.transform is not None:
        wiring_of(model, blocks)
    if method.kv_bits is not None:
        check_kv(model, blocks)
    experts = [layer for layer in layers if layer.expert is not None]
    if method.block_rounding is not None and experts:
        raise UnsupportedModelError(
            "rounding",
            f"{experts[0].name} is one of several experts in one tensor",
            "blocks of linear layers are rounded together",
            "leave the experts as they are with ignore=*experts*, or use rounding=gptq",
        )
