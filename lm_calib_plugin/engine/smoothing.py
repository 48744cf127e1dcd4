"""Move factors of channels from what feeds layers into the layers, one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lm_calib_plugin.engine.batches import Chunk
from lm_calib_plugin.engine.capture import replay
from lm_calib_plugin.engine.discovery import Blocks
from lm_calib_plugin.engine.layers import TargetLayer
from lm_calib_plugin.engine.ranks import Ranks
from lm_calib_plugin.engine.wiring import NORM, Feed, Wiring
from lm_calib_plugin.errors import NumericalError
from lm_calib_plugin.quantization.parts import InputScaling
from lm_calib_plugin.statistics import LayerStats

FLOAT32_TOLERANCE = 1e-4
# Of the precision of a 16-bit dtype: every weight is rounded once more.
ROUNDINGS = 4.0


@dataclass(frozen=True, eq=False)
class ScaledInput:
    """One input whose channels were scaled.

    Parameters
    ----------
    source, readers
        Names of what was divided and of all layers whose columns were multiplied.
    layers
        Those of the readers that are compressed: the statistics of their input have to be divided
        by ``factors``.
    factors
        ``[in]``, float32, as they really are in the model.
    chosen, before, after
        As in :class:`~lm_calib_plugin.quantization.parts.Scaling`.
    """

    source: str
    readers: tuple[str, ...]
    layers: tuple[TargetLayer, ...]
    factors: Tensor
    chosen: Mapping[str, float]
    before: float | None
    after: float | None


@torch.no_grad()
def scale_inputs(
    blocks: Blocks,
    index: int,
    wiring: Wiring,
    layers: Sequence[TargetLayer],
    chunk: Chunk,
    stats_of: Callable[[TargetLayer], LayerStats],
    transform: InputScaling,
    rounded_for: Callable[[TargetLayer, Tensor], Tensor],
    activations: Callable[[Tensor], Tensor] | None,
) -> list[ScaledInput]:
    """Scale the inputs of the layers of one block.

    Inputs from linear layers come first: their factors change the rows of layers that read a norm,
    which see their final weights that way. All readers of an input are scaled, also those that are
    not compressed; inputs that no compressed layer reads are left alone.

    Parameters
    ----------
    blocks, index
        The decoder blocks, and the number of this one.
    wiring
        What feeds what.
    layers
        The layers of the block that are compressed.
    chunk
        Sequences on which the output of the block is compared; ``hidden`` is its input.
    stats_of
        Returns the statistics of the input of a layer, of the kind ``transform.statistic``.
    transform
        Finds the factors.
    rounded_for
        Rounds a weight ``[out, in]`` of a layer to nearest, on a grid of its own.
    activations
        Quantizes input rows, or None.

    Raises
    ------
    NumericalError
        For factors that are not finite and positive, and when the output of the block changes: in
        float32 by more than 1e-4 of what the block adds to its input; in 16 bits, where every
        scaled weight is rounded once more, by more than 4 units of the last place of its output.
    """
    block = blocks.modules[index]
    before = _output(block, index, chunk)
    targets = {id(layer.module): layer for layer in layers if layer.expert is None}
    done = []
    for feed in wiring.feeds(index):
        readers = [targets[id(m)] for m in feed.readers if id(m) in targets]
        if readers and (feed.kind == NORM or transform.feeds == "all"):
            done.append(_scale(feed, readers, stats_of, transform, rounded_for, activations))
    if done:
        _check(f"{blocks.path}.{index}", block, before, _output(block, index, chunk), chunk)
    return done


def scaled_elsewhere(
    done: Sequence[ScaledInput] | None,
    ranks: Ranks,
    block: nn.Module,
    layers: Sequence[TargetLayer],
) -> Sequence[ScaledInput]:
    """Give all processes what the first did to a block, bit by bit.

    Parameters
    ----------
    done
        What :func:`scale_inputs` returned on the first process; None on the others.
    ranks
        The processes.
    block, layers
        The block, which is changed in place, and its layers that are compressed.
    """
    if not ranks.several:
        return done or []
    plain = [
        replace(one, layers=tuple(x.name for x in one.layers), factors=one.factors.cpu())  # type: ignore[arg-type]
        for one in done or ()
    ]
    told = ranks.first("transform", plain)
    ranks.spread([parameter.data for parameter in block.parameters()], 0)
    named = {layer.name: layer for layer in layers}
    return [
        replace(
            one,
            layers=tuple(named[name] for name in one.layers),
            factors=one.factors.to(named[one.layers[0]].device),
        )
        for one in told
    ]


def _scale(
    feed: Feed,
    layers: list[TargetLayer],
    stats_of: Callable[[TargetLayer], LayerStats],
    transform: InputScaling,
    rounded_for: Callable[[TargetLayer, Tensor], Tensor],
    activations: Callable[[Tensor], Tensor] | None,
) -> ScaledInput:
    weights = [layer.read() for layer in layers]

    def rounded(i: int, weight: Tensor) -> Tensor:
        return rounded_for(layers[i], weight)

    found = transform.scales(weights, stats_of(layers[0]), rounded, activations, feed.tie)
    s = feed.tie(found.factors)
    if not bool((s.isfinite() & (s > 0)).all()):
        raise NumericalError(
            feed.reader_names[0], "scaling of inputs", "factors that are not finite and positive"
        )
    s = feed.divide(s)
    feed.multiply(s)
    return ScaledInput(
        feed.name, feed.reader_names, tuple(layers), s, found.chosen, found.before, found.after
    )


def _output(block: nn.Module, index: int, chunk: Chunk) -> Tensor:
    assert chunk.hidden is not None
    return replay(block, chunk.calls[index], chunk.hidden)


def _check(name: str, block: nn.Module, before: Tensor, after: Tensor, chunk: Chunk) -> None:
    """Refuse an output that scaling has changed; pads do not count."""
    assert chunk.hidden is not None
    dtype = next(block.parameters()).dtype
    real = slice(None) if chunk.mask is None else chunk.mask.to(before.device).bool()
    old, new = before[real].float(), after[real].float()
    size, tolerance = old.norm(), FLOAT32_TOLERANCE
    if dtype == torch.float32:
        # What goes past the block unchanged must not hide an error; it does bring its rounding.
        received = chunk.hidden.to(before.device)[real].float()
        size = torch.maximum((old - received).norm(), 1e-2 * size)
    else:
        tolerance = max(tolerance, ROUNDINGS * torch.finfo(dtype).eps)
    difference = float((new - old).norm() / size.clamp(min=1e-30))
    if not difference <= tolerance:
        raise NumericalError(
            name,
            "scaling of inputs",
            f"the output of the block changes by {difference:.2g}, more than {tolerance:.2g}",
            "use transform=none, or load the model in float32",
        )
