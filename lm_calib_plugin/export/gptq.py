"""Quantized layers as tensors and settings of the GPTQ checkpoint format."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lm_calib_plugin import __version__
from lm_calib_plugin.engine import HEAD, TargetLayer
from lm_calib_plugin.errors import CalibError
from lm_calib_plugin.export.layer_groups import patterns
from lm_calib_plugin.export.quantized import QuantizedLayer, module_refusal
from lm_calib_plugin.quantization.activations import ActivationSpec
from lm_calib_plugin.quantization.grids import GridSpec, IntegerGrid

BITS = (2, 3, 4, 8)
# What the kernels of gptqmodel take; -1: one scale for each output.
GROUP_SIZES = (-1, 32, 64, 128, 256, 512, 1024)
WORD = 32  # bits of a packed word, and what widths have to be multiples of
TENSORS = ("qweight", "qzeros", "scales", "g_idx")
SCALES = torch.float16  # the loader makes it of whatever is stored
# How zero points are stored: less 1 (all readers), or as they are (needed for a zero point of 0).
LESS_ONE, AS_IS = "gptq", "gptq_v2"
_PLACE = re.compile(r"^(?P<blocks>.+?)\.\d+\.(?P<rest>.+)$")


def refusal(
    levels: GridSpec | None, activation: ActivationSpec | None, dtype: torch.dtype | None = None
) -> str | None:
    """Return why the format can not hold layers of such a kind, None if it can.

    ``dtype`` is that of the model, where it is known already.
    """
    if activation is not None:
        return "it has weights alone, and the recipe rounds the inputs of layers, too"
    if dtype not in (None, torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        return f"the loader rounds scales to float16, and the model is {name} (dtype=float16)"
    if levels is None:
        return None
    if levels.number != "int":
        return f"it has integer levels, not {levels.number}"
    if levels.bits not in BITS:
        return f"it has levels of 2, 3, 4 or 8 bits, not {levels.bits}"
    if levels.group_size not in GROUP_SIZES:
        allowed = ", ".join(map(str, GROUP_SIZES))
        return f"its kernels take a group_size of {allowed}, not {levels.group_size}"
    if not levels.symmetric and levels.bits == 4 and levels.group_size == -1:
        return (
            "on a CPU, gptqmodel 7.6 runs 4-bit levels of whole rows without their zero points "
            "(group_size=128)"
        )
    return None


def layer_refusal(layer: TargetLayer) -> str | None:
    """Return why the format can not hold one layer of a model, None if it can."""
    if layer.block == HEAD:
        return "the loader looks for packed layers in decoder blocks only, and this is the head"
    reason = module_refusal(layer.module)
    odd = [width for width in layer.shape if width % WORD]
    if reason is None and odd:
        reason = f"kernels take widths that are multiples of {WORD}, and one here is {odd[0]}"
    return reason


def layer_tensors(layer: QuantizedLayer) -> dict[str, Tensor]:
    """Return what is stored instead of ``weight``, by local name.

    Returns
    -------
    dict
        ``qweight`` (int32, ``[in * bits / 32, out]``), ``qzeros`` (int32,
        ``[groups, out * bits / 32]``), ``scales`` (float16, ``[groups, out]``) and ``g_idx``
        (int32, ``[in]``): the group of every input.

    Raises
    ------
    CalibError
        If the weights, unpacked, would not be the very ones that were evaluated.
    """
    weight, grid = layer.weight, layer.grid
    assert isinstance(grid, IntegerGrid)
    levels, scales = _levels(weight, grid), grid.scale.to(SCALES)
    wrong = None if levels is not None else "a weight is not on its grid"
    if not torch.equal(scales.float(), grid.scale.float()):
        wrong = "a scale is no float16 number"
    if levels is None or wrong:
        raise CalibError(
            f"{layer.name} can not be stored as it is evaluated: {wrong}. Take "
            "export_format=dense, and do not change or cast a model after it was compressed."
        )
    zeros = (grid.zero.to(torch.int64) - grid.lowest).to(weight.device)
    if grid.symmetric:
        zeros = zeros - 1  # never below 0: the zero point is half of the range
    inputs = torch.arange(weight.shape[1], dtype=torch.int32, device=weight.device)
    return {
        "qweight": pack(levels.t(), grid.bits),
        "qzeros": pack(zeros, grid.bits).t().contiguous(),
        "scales": scales.t().contiguous().to(weight.device),
        "g_idx": inputs // grid.group_size,
    }


def _levels(weight: Tensor, grid: IntegerGrid) -> Tensor | None:
    """Return the levels ``[out, in]``, from 0, of a weight; None if it is not on the grid.

    Numbers of a short dtype may lie further apart than levels of 8 bits, so that a weight may
    stand for a level next to the nearest one.
    """
    scale, zero = (part.to(weight.device)[..., None] for part in (grid.scale, grid.zero))
    groups = weight.detach().reshape(weight.shape[0], scale.shape[1], -1)
    near = (groups.float() / scale).add_(zero).round_()
    levels = torch.full_like(near, torch.nan)
    for step in (1, -1, 0):
        level = (near + step).clamp_(grid.lowest, grid.highest)
        levels = torch.where(((level - zero) * scale).to(weight.dtype) == groups, level, levels)
    if bool(levels.isnan().any()):
        return None
    return levels.reshape(weight.shape).to(torch.int64) - grid.lowest


def unpacked(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Return the weight ``[out, in]``, in float32, that stored tensors of a layer stand for.

    Parameters
    ----------
    tensors
        As :func:`layer_tensors` names them.
    settings
        ``quantization_config`` of the folder.
    """
    bits, groups = settings["bits"], tensors["g_idx"].to(torch.int64)
    levels = unpack(tensors["qweight"], bits)
    zeros = unpack(tensors["qzeros"].t(), bits).t()
    if settings["checkpoint_format"] == LESS_ONE:
        zeros = zeros + 1
    scales = tensors["scales"].float()
    return (scales[groups] * (levels - zeros[groups])).t().contiguous()


def pack(values: Tensor, bits: int) -> Tensor:
    """Return ``[n, m]`` values as 32-bit words ``[n * bits / 32, m]``: a stream for each column.

    The first value has the lowest bits of the first word; one of 3 bits may begin in one word and
    end in the next.
    """
    blocks = values.to(torch.int64).reshape(-1, WORD, values.shape[1])
    words = torch.zeros(len(blocks), bits + 1, values.shape[1], dtype=torch.int64)
    words = words.to(values.device)
    for index in range(WORD):
        word, shift = divmod(index * bits, WORD)
        shifted = blocks[:, index] << shift
        words[:, word] |= shifted & 0xFFFFFFFF
        words[:, word + 1] |= shifted >> WORD
    words = words[:, :bits].reshape(-1, values.shape[1])
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Return the values ``[n, m]`` (int64) of words that :func:`pack` made."""
    blocks = (words.to(torch.int64) & 0xFFFFFFFF).reshape(-1, bits, words.shape[1])
    values = []
    for index in range(WORD):
        word, shift = divmod(index * bits, WORD)
        value = blocks[:, word] >> shift
        if shift + bits > WORD:
            value = value | (blocks[:, word + 1] << (WORD - shift))
        values.append(value & (2**bits - 1))
    return torch.stack(values, dim=1).reshape(-1, words.shape[1])


def quantization_config(layers: Sequence[QuantizedLayer], others: Sequence[str]) -> dict[str, Any]:
    """Return ``quantization_config`` of ``config.json``.

    ``others`` are the names of linear layers that are not quantized: of those in decoder blocks
    optimum learns by a list of the quantized ones, gptqmodel and servers by patterns.
    """
    grids = [layer.grid for layer in layers]
    assert all(isinstance(grid, IntegerGrid) for grid in grids)
    first = grids[0]
    assert isinstance(first, IntegerGrid)
    split = {grid.group_size for grid in grids if grid is not None and grid.scale.shape[1] > 1}
    sizes = split or {grid.group_size for grid in grids if grid is not None}
    size = sizes.pop() if len(sizes) == 1 else -1
    settings: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": LESS_ONE if first.symmetric else AS_IS,
        "bits": first.bits,
        "group_size": size if size in GROUP_SIZES else -1,
        "sym": first.symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "block_name_to_quantize": _place(layers[0].name)[0],
        "meta": {"quantizer": [f"lm-calib-plugin:{__version__}"]},
    }
    names = [layer.name for layer in layers]
    left = [n for n in others if n.startswith(f"{settings['block_name_to_quantize']}.")]
    if left:
        rests = list(dict.fromkeys(_place(name)[1] for name in names))
        telling = not any(name.endswith(tuple(rests)) for name in left)
        settings["modules_in_block_to_quantize"] = [rests if telling else names]
        settings["dynamic"] = {f"-:{_expression(p)}": {} for p in patterns([left, names], [])[0]}
    return settings


def _place(name: str) -> tuple[str, str]:
    """Return the path of the list of blocks, and the name inside of a block."""
    found = _PLACE.match(name)
    assert found is not None
    return found["blocks"], found["rest"]


def _expression(pattern: str) -> str:
    return pattern.removeprefix("re:") if pattern.startswith("re:") else f"^{re.escape(pattern)}$"
