"""``execution=packed``: the kernels that a recipe asks for, and a model that runs on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lm_calib_plugin import engine
from lm_calib_plugin.engine.activations import quantizers
from lm_calib_plugin.engine.ranks import Ranks
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
from lm_calib_plugin.guard import several_processes
from lm_calib_plugin.joint import quantizer_of
from lm_calib_plugin.method import Method
from lm_calib_plugin.quantization.grids import Grid, GridSpec
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.values import DENSE_BITS

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
    quantizer, spec = quantizer_of(method), method.activations
    activation = None
    if spec is not None:
        activation = Activation(spec.number, spec.bits, spec.dynamic, None if spec.dynamic else 1.0)
    levels = GridSpec(bits=DENSE_BITS, group_size=-1) if quantizer is None else quantizer.spec
    rounds = levels.bits != DENSE_BITS
    refusals = []
    for dtype in dtypes:
        try:
            check_execution(
                levels.number if rounds else None,
                levels.bits,
                levels.group_size,
                levels.symmetric,
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
    ranks: Ranks | None = None,
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
    ranks
        Processes that have to use the same kernels; default: all of torch's process group.
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
    return pack(model, asked, tokens, racer=_racer(ranks))


def _racer(ranks: Ranks | None) -> Callable[..., Race] | None:
    """Return what races on every process, and takes the times of the first: all have to use one
    kernel. None for a single process."""
    if not several_processes():
        return None

    def one_verdict(
        dense: Callable[[Tensor], Tensor], packed: Callable[[Tensor], Tensor], x: Tensor
    ) -> Race:
        found = [race(dense, packed, x)]
        if ranks is not None and ranks.several:
            verdict: Race = ranks.first("race", found[0])
            return verdict
        torch.distributed.broadcast_object_list(found, src=0)
        return found[0]

    return one_verdict
