"""Put simulated activation quantization in front of the layers of a live model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from lm_calib_plugin.engine.layers import TargetLayer
from lm_calib_plugin.errors import UnsupportedModelError
from lm_calib_plugin.quantization.activations import ActivationQuantizer, ActivationSpec

# The name of the submodule that rounds the input of a layer.
QUANTIZER = "input_quantizer"


def check_activations(layers: Sequence[TargetLayer], spec: ActivationSpec | None = None) -> None:
    """Refuse layers whose inputs can not be quantized, before any work is done.

    Raises
    ------
    UserError
        Names the layer and what to leave out: fused experts, modules that use the weight of a layer
        without calling it, and, with a ``spec``, widths that do not hold whole blocks.
    """
    for layer in layers:
        if layer.expert is not None:
            raise UnsupportedModelError(
                "act_bits",
                f"{layer.name} is part of {type(layer.module).__name__}, which multiplies the "
                "weights of all experts itself",
                "the inputs of linear layers can be quantized",
                "leave the experts as they are with ignore=*experts*",
            )
        reachable = isinstance(layer.module, (nn.Linear, Conv1D))
        if not reachable or isinstance(layer.module, NonDynamicallyQuantizableLinear):
            raise UnsupportedModelError(
                "act_bits",
                f"the input of {layer.name} ({type(layer.module).__name__}) can not be reached",
                "linear layers that the model calls",
                f"leave it as it is with ignore={layer.name}",
            )
        if spec is not None:
            spec.check_width(layer.name, layer.shape[1])


def install(
    layers: Sequence[TargetLayer],
    spec: ActivationSpec,
    limits: Mapping[str, float] | None = None,
) -> None:
    """Round the inputs of layers from now on; what was installed before is replaced.

    Every layer gets a submodule ``input_quantizer`` that a hook sends the input through. It has
    no parameters and adds nothing to the state dict. Layers of one block with one limit share it,
    so that an input of several layers is rounded once.

    Parameters
    ----------
    layers
        Linear layers of a model.
    spec
        The levels.
    limits
        By name, the largest absolute value that the input of each layer represents; for static
        specs only. Moved to the nearest that the dtype of the layer can store.

    Raises
    ------
    UserError
        As :func:`check_activations`; nothing is installed then.
    """
    check_activations(layers, spec)
    if spec.dynamic != (limits is None):
        raise ValueError(f"{spec.describe()} activations, with limits: {limits is not None}")
    shared: dict[tuple[int, float | None], ActivationQuantizer] = {}
    quantizers = []
    for layer in layers:
        # What is evaluated is what an exported folder holds.
        limit = limits and spec.storable(limits[layer.name], layer.parameter.dtype)
        key = (layer.block, limit)
        if key not in shared:
            shared[key] = ActivationQuantizer(spec, limit).to(layer.device)
        quantizers.append(shared[key])
    for layer, quantizer in zip(layers, quantizers, strict=True):
        _take_off(layer.module)
        layer.module.add_module(QUANTIZER, quantizer)
        layer.module.register_forward_pre_hook(_round_input, with_kwargs=True)


def remove(model: nn.Module) -> None:
    """Take all that :func:`install` put on a model off again."""
    for module in list(model.modules()):
        _take_off(module)


def quantizers(model: nn.Module, name: str = "") -> dict[str, ActivationQuantizer]:
    """Return the quantizer of every layer that has one, by the name of the layer.

    ``name`` is that of the module, when it is part of a larger model.
    """
    ending = f".{QUANTIZER}"
    return {
        name.removesuffix(ending): module
        for name, module in model.named_modules(prefix=name, remove_duplicate=False)
        if isinstance(module, ActivationQuantizer) and name.endswith(ending)
    }


def _round_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # A function that finds the quantizer by its name: a copy of the model finds the copy.
    quantizer = module.get_submodule(QUANTIZER)
    if args:
        return (_rounded(quantizer, args[0]), *args[1:]), kwargs
    return args, {name: _rounded(quantizer, value) for name, value in kwargs.items()}


def _rounded(quantizer: nn.Module, x: Any) -> Any:
    return quantizer(x) if isinstance(x, Tensor) else x


def _take_off(module: nn.Module) -> None:
    if not isinstance(module._modules.get(QUANTIZER), ActivationQuantizer):
        return
    del module._modules[QUANTIZER]
    hooks, with_kwargs = module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs
    for number in [n for n, hook in hooks.items() if hook is _round_input]:
        del hooks[number]
        with_kwargs.pop(number, None)
