"""Read a GPTQ folder back: always from its tensors, and with gptqmodel where that is there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lm_calib_plugin.errors import listed
from lm_calib_plugin.export.check import (
    PROBE,
    differs,
    loaded,
    watched,
)
from lm_calib_plugin.export.gptq import TENSORS, unpacked
from lm_calib_plugin.export.quantized import QuantizedLayer
from lm_calib_plugin.storage import version_of

# What transformers loads the format through.
LOADERS = ("gptqmodel", "optimum")
CPU = torch.device("cpu")
SUBNORMAL = 2.0**-24  # the smallest float16 above 0
# Relative error of the output of a layer: kernels multiply in float16.
LAYER_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def compare_with_folder(
    model: Any, layers: Sequence[QuantizedLayer], folder: Path, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Unpack the stored tensors and, where gptqmodel is installed, load the folder on the CPU.

    Parameters
    ----------
    model
        The compressed model in memory; left as it is.
    layers
        Its quantized layers.
    folder
        The written folder.

    Returns
    -------
    dict
        ``tensors``: how many of the files were found equal bit by bit, weights unpacked;
        ``loaded``: whether the folder was loaded, else ``why`` not. If so, ``rounded``: how many
        weights the loader, which multiplies in float16, rounds otherwise than we do; ``layers``:
        the largest relative error of a quantized layer, given the same input;
        ``logits_difference``: ``||l' - l|| / ||l||`` on 96 random tokens.

    Raises
    ------
    CalibError
        When a stored tensor, or an output beyond what kernels may round, differs.
    """
    tensors = _compare_files(model, layers, folder)
    lacking = [package for package in LOADERS if find_spec(package) is None]
    if lacking:
        why = f"{' and '.join(lacking)} not installed"
        return {"tensors": tensors, "loaded": False, "why": why}
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    probe = torch.randint(vocabulary, PROBE, generator=torch.Generator().manual_seed(0))
    names = [layer.name for layer in layers]
    device = model.get_input_embeddings().weight.device
    seen, expected = watched(model, probe.to(device), names)
    # Kernels for GPUs repack the tensors when they load them, so that nothing could be compared.
    again = loaded(model, folder, CPU, trust_remote_code)
    rounded = _rounded_otherwise(again, layers)
    logits = again(probe, use_cache=False).logits.float()
    at_hand = {name: (x.to(CPU), y.to(CPU)) for name, (x, y) in seen.items()}
    worst = _compare_layers(again, at_hand, layers[0].weight.dtype)
    expected = expected.to(CPU).float()
    return {
        "tensors": tensors,
        "loaded": True,
        "rounded": rounded,
        "layers": worst,
        "logits_difference": float((logits - expected).norm() / expected.norm()),
        "exact": bool(torch.equal(logits, expected)),
        "transformers": version("transformers"),
        **{package: version_of(package) for package in LOADERS},
    }


def _compare_files(model: nn.Module, layers: Sequence[QuantizedLayer], folder: Path) -> int:
    """Compare every tensor of the files with the model; packed ones by what they stand for."""
    stored, state = _stored(folder), model.state_dict()
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for layer in layers:
        own = {name: stored.pop(f"{layer.name}.{name}", None) for name in TENSORS}
        if any(tensor is None for tensor in own.values()):
            raise differs(f"{layer.name} is not stored whole")
        weight = unpacked(own, settings["quantization_config"]).to(layer.weight.dtype)
        if not torch.equal(weight, layer.weight.to(CPU)):
            raise differs(f"{layer.name} is not what was evaluated")
        del state[f"{layer.name}.weight"]
    kept = {state[name].data_ptr() for name in stored if name in state}
    renamed = [tensor for name, tensor in stored.items() if name not in state]
    missing = [
        name
        for name, tensor in state.items()
        if name not in stored
        and tensor.data_ptr() not in kept
        and not any(torch.equal(tensor.cpu(), other) for other in renamed)
    ]
    if missing:
        raise differs(f"{len(missing)} tensors are missing ({listed(missing[:3])})")
    for name, tensor in stored.items():
        ours = state.get(name)
        if ours is not None and (ours.dtype != tensor.dtype or not torch.equal(ours.cpu(), tensor)):
            raise differs(f"{name} is not what was evaluated")
    return len(layers) + len(stored)


def _stored(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def _rounded_otherwise(again: nn.Module, layers: Sequence[QuantizedLayer]) -> int:
    """Count weights that the loaded model has otherwise; none may be off by more than rounding."""
    rounded = 0
    for layer in layers:
        module: Any = again.get_submodule(layer.name)
        # The method of the class: that of the object may be compiled, which takes seconds.
        theirs = type(module).dequantize_weight(module).t().to(layer.weight.dtype)
        ours = layer.weight.to(CPU)
        off = theirs != ours
        step = torch.finfo(ours.dtype).eps * ours.float().abs() + SUBNORMAL
        if bool(((theirs.float() - ours.float()).abs() > step).any()):
            raise differs(f"{layer.name} has other weights in {type(module).__name__}")
        rounded += int(off.sum())
    return rounded


def _compare_layers(
    again: nn.Module, seen: dict[str, tuple[Tensor, Tensor]], dtype: torch.dtype
) -> float:
    """Return the largest relative error of the outputs of layers, given what they received."""
    worst = 0.0
    for name, (x, y) in seen.items():
        found = again.get_submodule(name)(x).float() - y.float()
        error = float(found.norm() / y.float().norm().clamp(min=torch.finfo(torch.float32).tiny))
        worst = max(worst, error)
        if not error <= LAYER_TOLERANCE[dtype]:
            raise differs(
                f"{name} gives something else (relative error {error:.3g}, allowed "
                f"{LAYER_TOLERANCE[dtype]:g})"
            )
    return worst
