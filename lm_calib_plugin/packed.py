"""``execution=packed``: the kernels that a recipe asks for, and a model that runs on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lm_calib_plugin import engine
from lm_calib_plugin.engine.activations import quantizers
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.execution import (
    Activation,
    ExecutionReport,
    PackLayer,
    Race,
    check_execution,
    pack,
)
from lm_calib_plugin.execution.choose import race
from lm_calib_plugin.joint import quantizer_of
from lm_calib_plugin.method import Method
from lm_calib_plugin.quantization.grids import Grid
from lm_calib_plugin.recipe import Recipe

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_packed(
    recipe: Recipe,
    method: Method,
    device: torch.device | str,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> None:
    """Refuse a recipe that no kernel of a device serves, in any of some dtypes.

    Raises
    ------
    UserError
        With what runs packed on this device.
    """
    quantizer = quantizer_of(method)
    spec = None if quantizer is None else quantizer.activations
    activation = None
    if spec is not None:
        activation = Activation(spec.number, spec.bits, spec.dynamic, None if spec.dynamic else 1.0)
    rounds = quantizer is not None and not quantizer.keeps_weights
    refusals = []
    for dtype in dtypes:
        try:
            check_execution(
                quantizer.number if quantizer is not None and rounds else None,
                quantizer.bits if quantizer is not None else 16,
                quantizer.group_size if quantizer is not None else -1,
                quantizer.symmetric if quantizer is not None else True,
                activation,
                device,
                dtype,
                None if rounds else recipe.pattern,
                f"scheme={recipe.scheme}" if recipe.scheme else "",
            )
        except UserError as error:
            refusals.append(error)
    if len(refusals) == len(dtypes):
        raise refusals[0]


def pack_layers(
    model: nn.Module,
    layers: Sequence[engine.TargetLayer],
    recipe: Recipe,
    method: Method,
    methods: Mapping[str, Method],
    grids: Mapping[str, Grid],
    tokens: int,
) -> ExecutionReport:
    """Replace the layers of a compressed model by kernels, where these are right and faster.

    Parameters
    ----------
    model, layers
        The compressed model, changed in place, and what was compressed.
    recipe, method, methods
        What was done; ``methods`` by name, where it was done otherwise.
    grids
        The levels of each layer, by name.
    tokens
        How many tokens the evaluation multiplies at once.
    """
    inputs = quantizers(model)
    asked = []
    for layer in layers:
        quantizer = quantizer_of(methods.get(layer.name, method))
        grid, rounded = grids.get(layer.name), inputs.get(layer.name)
        asked.append(
            PackLayer(
                layer.name,
                None if grid is None or quantizer is None else quantizer.spec,
                grid,
                None if rounded is None else Activation.of(rounded),
                recipe.pattern if grid is None else None,
                quantize=rounded,
            )
        )
    return pack(model, asked, tokens, racer=_one_verdict if _several() else None)


def _several() -> bool:
    return bool(torch.distributed.is_available() and torch.distributed.is_initialized())


def _one_verdict(
    dense: Callable[[Tensor], Tensor], packed: Callable[[Tensor], Tensor], x: Tensor
) -> Race:
    """Race on every process, and take the times of the first: all have to use one kernel."""
    found = [race(dense, packed, x)]
    torch.distributed.broadcast_object_list(found, src=0)
    return found[0]
