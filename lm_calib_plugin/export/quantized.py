"""Quantized layers as tensors and settings of the compressed-tensors format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lm_calib_plugin.errors import CalibError
from lm_calib_plugin.execution import PackedLinear
from lm_calib_plugin.execution.levels import (
    UnpackableError,
    fp4_levels,
    fp8_levels,
    integer_levels,
)
from lm_calib_plugin.export.layer_groups import patterns
from lm_calib_plugin.quantization.activations import ActivationQuantizer, ActivationSpec
from lm_calib_plugin.quantization.grids import Grid, GridSpec
from lm_calib_plugin.quantization.numbers import MXFP4_GROUP, NVFP4_GROUP, nvfp4_factor
from lm_calib_plugin.storage import canonical_json

WIDTHS = (1, 8)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# What the format calls a number, and how it stores weights of it.
TYPES = {"int": "int", "fp8": "float", "nvfp4": "float", "mxfp4": "float"}
FORMATS = {
    "fp8": "float-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
}
BLOCKS = {"nvfp4": NVFP4_GROUP, "mxfp4": MXFP4_GROUP}
SCALES = {"nvfp4": "torch.float8_e4m3fn", "mxfp4": "torch.uint8"}


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
    if dtype is not None and dtype not in FLOATS:
        return f"the loader would compute weights in {_short(dtype)}, we do in float32"
    if activation is not None and activation.number == "nvfp4" and activation.dynamic:
        return (
            "nvfp4 inputs have one calibrated factor for a layer there, and here one for each token"
        )
    if levels is None:
        return None
    if levels.number == "int" and not levels.symmetric:
        return (
            "compressed-tensors 0.20 packs zero points on writing, and transformers expects them "
            "unpacked on loading (symmetric=true has none)"
        )
    if levels.number == "int" and not WIDTHS[0] <= levels.bits <= WIDTHS[1]:
        return f"it packs integers of up to {WIDTHS[1]} bits, not {levels.bits}"
    if levels.number in BLOCKS and dtype not in (None, torch.bfloat16):
        return (
            f"the loader makes bfloat16 of {levels.number} weights in a {_short(dtype)} model, "
            "which then does not run (dtype=bfloat16)"
        )
    return None


def module_refusal(module: nn.Module, packs: bool = True) -> str | None:
    """Return why the format can not hold a layer of such a module, None if it can.

    ``packs`` tells whether several levels share a word, as :func:`packs_weights` finds out.
    """
    for replaced in module.replaced if isinstance(module, PackedLinear) else ():
        module = replaced
    name = type(module).__name__
    if not isinstance(module, nn.Linear):
        return f"the loader quantizes nn.Linear, and this is {name}"
    if packs and type(module) is not nn.Linear:
        return f"transformers looks for the weight of {name}, which packed levels do not have"
    return None


def packs_weights(levels: GridSpec | None, activation: ActivationSpec | None) -> bool:
    """Tell whether several levels share a word, so that the loaded layer has no ``weight``."""
    if levels is None or levels.number == "fp8":
        return False
    return levels.number != "int" or activation is None


def flattened_inputs(model: Any, names: Sequence[str]) -> list[str]:
    """Return which linear layers of a model get tokens without the dimension of sequences.

    The loader gives each token a scale of its own where an input is ``[batch, tokens, in]``, and
    all tokens of a batch the same scale where it is ``[tokens, in]``: dynamic integer and fp8
    inputs of such layers would be rounded otherwise than they were evaluated. Runs the model on
    four tokens.
    """
    found: list[str] = []

    def watch(name: str) -> Any:
        return lambda _module, args: found.append(name) if args and args[0].dim() != 3 else None

    hooks = [model.get_submodule(n).register_forward_pre_hook(watch(n)) for n in names]
    device = model.get_input_embeddings().weight.device
    try:
        with torch.no_grad():
            model(torch.zeros(2, 2, dtype=torch.long, device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name in names if name in set(found)]


def layer_tensors(layer: QuantizedLayer) -> dict[str, Tensor]:
    """Return what is stored instead of ``weight``, by local name, such as ``weight_packed``.

    Raises
    ------
    CalibError
        If the loader would not find the very weights and scales that were evaluated.
    """
    try:
        tensors = {"weight": layer.weight} if layer.grid is None else _weight_tensors(layer)
        return {n: t.detach().contiguous() for n, t in (tensors | _input_tensors(layer)).items()}
    except UnpackableError as error:
        raise CalibError(
            f"{layer.name} can not be stored as it is evaluated: {error}. Was the model changed or "
            "cast after it was compressed?"
        ) from None


def _weight_tensors(layer: QuantizedLayer) -> dict[str, Tensor]:
    weight, grid = layer.weight, layer.grid
    assert grid is not None
    if grid.number in BLOCKS:
        return _block_tensors(weight, grid)
    scale = _as(weight.dtype, grid.scale).to(weight.device)
    if grid.number == "fp8":
        return {"weight": fp8_levels(weight, grid), "weight_scale": scale}
    if _zero_points(grid):
        raise UnpackableError("its grid has zero points")
    levels = integer_levels(weight, grid)
    bound = 2 ** (grid.bits - 1)
    if bool(((levels < -bound) | (levels >= bound)).any()):
        raise UnpackableError(f"levels beyond {grid.bits} bits")
    levels = levels.to(torch.int8)
    if _format(layer) == "int-quantized":
        return {"weight": levels, "weight_scale": scale}
    # Takes seconds to import.
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    return {
        "weight_packed": pack_to_int32(levels, grid.bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }


def _block_tensors(weight: Tensor, grid: Any) -> dict[str, Tensor]:
    from compressed_tensors.compressors.nvfp4 import pack_fp4_to_uint8

    packed = pack_fp4_to_uint8(fp4_levels(weight, grid))
    if grid.number == "mxfp4":
        exponent = torch.frexp(grid.scale).exponent - 1
        if not torch.equal(torch.ldexp(torch.ones_like(grid.scale), exponent), grid.scale):
            raise UnpackableError("a scale is no power of two")
        stored = (exponent + 127).to(torch.uint8).to(weight.device)
        return {"weight_packed": packed, "weight_scale": stored}
    stored, factor = grid.stored_scale.to(torch.float8_e4m3fn), grid.factor.float().reshape(1)
    if not torch.equal(stored.float() / factor, grid.scale):
        raise UnpackableError("a scale is no e4m3 number over the global factor")
    return {
        "weight_packed": packed,
        "weight_scale": stored.to(weight.device),
        "weight_global_scale": factor.to(weight.device),
    }


def _input_tensors(layer: QuantizedLayer) -> dict[str, Tensor]:
    quantizer = layer.activation
    if quantizer is None or quantizer.limit is None:
        return {}
    device = layer.weight.device
    if quantizer.spec.number == "nvfp4":
        factor = nvfp4_factor(quantizer.limit).reshape(1)
        return {"input_global_scale": factor.to(device)}
    assert quantizer.scale is not None
    return {"input_scale": _as(layer.weight.dtype, quantizer.scale).reshape(1).to(device)}


def _as(dtype: torch.dtype, scale: Tensor) -> Tensor:
    """Return scales in the dtype of the model, in which the loader keeps them."""
    stored = scale.to(dtype)
    if not torch.equal(stored.float(), scale.float()):
        raise UnpackableError(f"a scale is no {_short(dtype)} number")
    return stored


def quantization_config(layers: Sequence[QuantizedLayer], others: Sequence[str]) -> dict[str, Any]:
    """Return ``quantization_config`` of ``config.json``.

    ``others`` are the names of linear layers that are not quantized.
    """
    from compressed_tensors import __version__

    widths = {x.grid.group_size for x in layers if x.grid is not None and x.grid.scale.shape[1] > 1}
    kinds: dict[str, dict[str, Any]] = {}
    names: dict[str, list[str]] = {}
    for layer in layers:
        kind = {
            "format": _format(layer),
            "weights": _weights(layer.grid, widths),
            "input_activations": _inputs(layer.activation),
            "output_activations": None,
        }
        key = canonical_json(kind)
        kinds[key] = kind
        names.setdefault(key, []).append(layer.name)
    targets = patterns(list(names.values()), others)
    groups = {
        f"group_{i}": {"targets": targets[i], **kind} for i, kind in enumerate(kinds.values())
    }
    formats = {kind["format"] for kind in kinds.values()} - {"dense"} or {"dense"}
    return {
        "quant_method": "compressed-tensors",
        "version": __version__,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(others),
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "global_compression_ratio": None,
    }


def _format(layer: QuantizedLayer) -> str:
    """Return how the weight is stored: what the library itself would choose."""
    if layer.grid is None:
        return "dense"
    if layer.grid.number == "int":
        # Loaders that multiply integer inputs read levels of one byte, whatever their width.
        return "pack-quantized" if layer.activation is None else "int-quantized"
    return FORMATS[layer.grid.number]


def _weights(grid: Grid | None, widths: set[int]) -> dict[str, Any] | None:
    if grid is None:
        return None
    # A layer as wide as one group is of the same kind as its wider neighbors.
    grouped = grid.scale.shape[1] > 1 or grid.group_size in widths or grid.number in BLOCKS
    return {
        **_number(grid.number, grid.bits),
        "strategy": _strategy(grid.number, "group" if grouped else "channel"),
        "group_size": grid.group_size if grouped else None,
        "dynamic": False,
    }


def _inputs(quantizer: ActivationQuantizer | None) -> dict[str, Any] | None:
    if quantizer is None:
        return None
    spec = quantizer.spec
    dynamic: bool | str = spec.dynamic
    if spec.number == "nvfp4":
        dynamic = "local"
    plain = "token" if spec.dynamic else "tensor"
    return {
        **_number(spec.number, spec.bits),
        "strategy": _strategy(spec.number, plain),
        "group_size": BLOCKS.get(spec.number),
        "dynamic": dynamic,
    }


def _number(number: str, bits: int) -> dict[str, Any]:
    found = {"num_bits": bits, "type": TYPES[number], "symmetric": True}
    return found | ({"scale_dtype": SCALES[number]} if number in SCALES else {})


def _strategy(number: str, plain: str) -> str:
    return {"nvfp4": "tensor_group", "mxfp4": "group"}.get(number, plain)


def _zero_points(grid: Any) -> bool:
    return bool((grid.zero != 0).any()) or not grid.symmetric


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
