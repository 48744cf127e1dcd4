"""What a report says of a run: what was counted, used, and worth a warning."""

from __future__ import annotations

import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lm_calib_plugin import engine
from lm_calib_plugin.calibration import CalibrationSet
from lm_calib_plugin.errors import NumericalError
from lm_calib_plugin.method import Method
from lm_calib_plugin.placement import execution_devices
from lm_calib_plugin.quantization.coarse import coarse_bits
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.report import LayerRow, from_first_token
from lm_calib_plugin.storage import version_of

PACKAGES = ("lm-calib-plugin", "torch", "transformers", "lm-eval", "datasets", "accelerate")


def measure(
    model: nn.Module,
    blocks: engine.Blocks,
    layers: Sequence[engine.TargetLayer],
    method: Method,
    grids: dict[str, Any],
) -> dict[str, Any]:
    """Count zeros, and check that quantized weights lie on their grid, on the live model.

    Returns
    -------
    dict
        ``sparsity`` of the targeted layers, ``sparsity_blocks`` of all parameters of the blocks,
        ``sparsity_model`` of all parameters; ``bits`` (mean width of a targeted weight, without
        scales; None when nothing was quantized), ``bits_stored`` (with scales and zero points) and
        ``bytes`` of the targeted weights as they would be stored, and with symmetric integers
        ``symmetric_scale``, how scales follow from weights.

    Raises
    ------
    NumericalError
        When a weight is not on the grid it was rounded to.
    """
    counts = {name: (int((p == 0).sum()), p.numel()) for name, p in engine.values(model)}
    target = [found for own in engine.by_module(layers) for found in _counted(own, grids, counts)]
    everything = list(counts.values())
    inside = [count for name, count in counts.items() if name.startswith(f"{blocks.path}.")]
    found: dict[str, Any] = {
        "sparsity": _share(target),
        "sparsity_blocks": _share(inside),
        "sparsity_model": _share(everything),
        "bits": None if method.kind == "pruning" else 16.0,
    }
    if grids:
        # A layer that kept its weights counts with the width in which it is stored.
        dense = {x.name: 8.0 * x.parameter.element_size() for x in layers}
        sizes = {x.name: x.shape[0] * x.shape[1] for x in layers}
        total = sum(sizes.values())
        plain = {n: grids[n].bits if n in grids else w for n, w in dense.items()}
        stored = {
            x.name: grids[x.name].stored_bits(x.shape)
            if x.name in grids
            else dense[x.name] * sizes[x.name]
            for x in layers
        }
        found["bits"] = sum(plain[n] * sizes[n] for n in sizes) / total
        found["bits_stored"] = sum(stored.values()) / total
        found["bytes"] = round(sum(stored.values()) / 8)
        if any(getattr(grid, "symmetric", False) for grid in grids.values()):
            # Libraries differ: others divide by 2^(bits-1) - 1.
            found["symmetric_scale"] = "max|w| / (2^(bits-1) - 0.5)"
    return found


def _counted(
    layers: Sequence[engine.TargetLayer],
    grids: Mapping[str, Any],
    counts: Mapping[str, tuple[int, int]],
) -> list[tuple[int, int]]:
    """Return how many weights of each layer of one module are zero, and how many there are.

    Weights that were rounded are checked against their grid. ``counts`` are those of whole
    parameters.
    """
    names = [f"{layer.name}.{layer.attribute}" for layer in layers]
    if all(name in counts for name in names) and not any(x.name in grids for x in layers):
        return [counts[name] for name in names]
    found = []
    with engine.resident(layers[0].module, changes=False):
        for layer in layers:
            grid = grids.get(layer.name)
            if grid is not None and not grid.holds(layer.weight):
                raise NumericalError(layer.name, "final count", "weights are not on their grid")
            found.append((int((layer.stored == 0).sum()), layer.stored.numel()))
    return found


def first_tokens(rows: Sequence[LayerRow]) -> dict[str, int]:
    """Return how many calibrated ranges rest on first tokens alone; nothing without ranges."""
    known = [row for row in rows if row.input_limit is not None]
    if not known:
        return {}
    return {"inputs_from_first_token": sum(map(from_first_token, known))}


def coarse_warning(layers: Sequence[engine.TargetLayer], bits: int) -> list[str]:
    """Return a warning when dense weights lie on a grid that is not finer than what is asked."""
    found = [coarse_bits(layer.read()) for layer in _spread(layers)]
    known = [width for width in found if width is not None]
    if len(known) <= len(found) / 2 or max(known) > bits:
        return []
    return [
        f"the weights lie on a grid of {max(known)} bits already (a checkpoint that was quantized "
        f"before?): at {bits} bits errors of the weights are near zero and mean nothing"
    ]


def _spread(layers: Sequence[engine.TargetLayer], count: int = 8) -> list[engine.TargetLayer]:
    few = min(count, len(layers))
    return [layers[i * len(layers) // few] for i in range(few)]


def _share(counts: Sequence[tuple[int, int]]) -> float:
    return sum(zeros for zeros, _ in counts) / max(1, sum(size for _, size in counts))


def calibration_summary(
    calibration: CalibrationSet | None, pads: int, held: int
) -> dict[str, Any] | None:
    """Return what is said of the calibration set, None without one."""
    if calibration is None:
        return None
    return {
        **calibration.summary(),
        "heldout_sequences": held,
        "pad_tokens_excluded": pads,
    }


def data_warnings(
    recipe: Recipe, calibration: CalibrationSet | None, left: Sequence[tuple[str, str]]
) -> list[str]:
    """Return what is worth saying of the data and of the matrices left dense."""
    sources = calibration.sources if calibration else ()
    notes = [f"{s['source']}: {note}" for s in sources for note in s.get("warnings", ())]
    if (
        calibration is not None
        and recipe.heldout
        and not engine.heldout_indices(len(calibration.sequences), recipe.heldout)
    ):
        notes.append(
            f"nothing held out: {recipe.heldout:g} of {len(calibration.sequences)} sequences is "
            "less than one, so no held-out error"
        )
    reasons: dict[str, int] = {}
    for _, why in left:
        if why in engine.CHOSEN:
            continue
        reasons[why] = reasons.get(why, 0) + 1
    notes += [f"{count} matrices left dense: {why}" for why, count in reasons.items()]
    return notes


def cuda_devices(model: nn.Module) -> list[torch.device]:
    """Return the CUDA devices that use parameters of the model."""
    devices = set(execution_devices(model).values())
    return sorted((device for device in devices if device.type == "cuda"), key=str)


def peak_memory(model: nn.Module) -> float:
    """Return the peak in GiB: summed over the model's CUDA devices during the work, or without
    any, of this process since it started."""
    devices = cuda_devices(model)
    if devices:
        return round(sum(torch.cuda.max_memory_allocated(d) for d in devices) / 2**30, 3)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        found[package] = version_of(package) or "not installed"
    return found
