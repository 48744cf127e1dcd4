"""What a report says of a walk: grids, scaled inputs, and what was not done as asked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from lm_calib_plugin.engine.experts import ENOUGH
from lm_calib_plugin.engine.layers import TargetLayer
from lm_calib_plugin.engine.smoothing import ScaledInput
from lm_calib_plugin.engine.wiring import Wiring
from lm_calib_plugin.method import LayerResult, Method
from lm_calib_plugin.report import WIDENED, LayerRow, from_first_token


def of_experts(unseen: Sequence[str], borrowed: Mapping[str, int]) -> Iterator[str]:
    """Yield how many layers saw no token, or fewer than they need; both by name."""
    shared = (
        f"fewer tokens than {ENOUGH} for each input: filled up with the shared statistics of all "
        "experts of the layer"
    )
    nothing = "no calibration token: treated as if all their inputs were equally large"
    for names, what in ((unseen, nothing), (list(borrowed), shared)):
        if names:
            yield f"{len(names)} layers ({names[0]}, ...) saw {what}"


def of_unscaled(wiring: Wiring, layers: Iterable[TargetLayer]) -> Iterator[str]:
    """Yield which of the layers keep their inputs as they are, and why."""
    targets = {layer.name for layer in layers}
    reasons: dict[str, list[str]] = {}
    for name, why in wiring.left:
        # Experts have names of their own below that of the module.
        if name in targets or any(target.startswith(f"{name}.") for target in targets):
            reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        yield f"inputs of {len(names)} modules ({names[0]}, ...) are not scaled: {why}"


def of_rows(rows: Sequence[LayerRow]) -> Iterator[str]:
    """Yield how many layers were not treated as asked, and how many ranges rest on one token."""
    for how in sorted({row.fallback for row in rows if row.fallback}):
        names = [row.name for row in rows if row.fallback == how]
        yield f"{len(names)} of {len(rows)} layers ({names[0]}, ...) fell back to {how}"
    first = [row.name for row in rows if from_first_token(row)]
    if first:
        yield (
            f"{len(first)} of {len(rows)} calibrated ranges ({first[0]}, ...) are at least "
            f"{WIDENED:g} times as wide as without the first token of every sequence; "
            "observer=minmax?first=false leaves it out"
        )


def of_damp(
    method: Method, layers: Sequence[TargetLayer], results: Sequence[LayerResult]
) -> Iterator[str]:
    """Yield which Gram matrices needed a larger ridge than asked for."""
    asked = getattr(method, "damp", None)
    for layer, result in zip(layers, results, strict=True):
        if result.damp is not None and asked is not None and result.damp > asked:
            yield (
                f"{layer.name}: damp raised from {asked:g} to {result.damp:g} to factor the Gram "
                "matrix"
            )


def of_all(said: Sequence[Sequence[str]]) -> list[str]:
    """Return the warnings of several processes: those of the first, and what others have beside."""
    found = list(said[0])
    for number, own in enumerate(said):
        found += [f"process {number}: {note}" for note in own if note not in said[0]]
    return found


def grid_facts(grid: Any, before: Tensor, layer: TargetLayer) -> dict[str, float]:
    """Return what a row says of a grid, for the weight ``[out, in]`` that was rounded to it."""
    ordered = grid.scale.flatten().sort().values
    return {
        "stored_bits": grid.stored_bits(layer.shape) / before.numel(),
        "scale_min": float(ordered[0]),
        "scale_median": float(ordered[len(ordered) // 2]),
        "scale_max": float(ordered[-1]),
        "clipped": grid.clipped(before),
    }


def scaling_facts(done: ScaledInput) -> dict[str, Any]:
    """Return what a report says of inputs that were scaled."""
    return {
        "source": done.source,
        "readers": list(done.readers),
        "factors": [float(done.factors.min()), float(done.factors.max())],
        **done.chosen,
        "error_before": done.before,
        "error_after": done.after,
    }
