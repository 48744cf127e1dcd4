"""One pass through the dense model, block by block, with every layer input shown to a visitor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lm_calib_plugin.engine.batches import Chunk
from lm_calib_plugin.engine.dealing import deal
from lm_calib_plugin.engine.discovery import Blocks
from lm_calib_plugin.engine.joining import add_up
from lm_calib_plugin.engine.layers import HEAD, TargetLayer
from lm_calib_plugin.engine.passes import BlockPass
from lm_calib_plugin.engine.ranks import Ranks
from lm_calib_plugin.errors import UnsupportedModelError


class Visitor(Protocol):
    """What looks at the inputs of the layers."""

    def wants(self, index: int) -> bool:
        """Tell whether the inputs of block ``index`` are to be looked at (else it is only run)."""
        ...

    def start(self, index: int, groups: Sequence[Sequence[TargetLayer]]) -> Any:
        """Return an empty state for a block whose layers share inputs in these groups."""
        ...

    def listen(self, state: Any, chunk: Chunk, number: int, rows: Tensor, owners: Tensor) -> None:
        """Take input rows ``[tokens, in]`` of group ``number``; ``owners``: rows of the chunk."""
        ...

    def finish(self, index: int, groups: Sequence[Sequence[TargetLayer]], state: Any) -> None:
        """Keep the state of a block; its memory is given back afterwards."""
        ...


def dense_pass(
    model: nn.Module,
    blocks: Blocks,
    chunks: list[Chunk],
    layers: Sequence[TargetLayer],
    visitor: Visitor,
    device: torch.device,
    progress: bool = True,
    title: str = "statistics",
    ranks: Ranks | None = None,
) -> BlockPass:
    """Run all chunks through the blocks, unchanged, and show the inputs of ``layers``.

    One block is in work at a time: the memory needed is that of the hidden states of all chunks
    and of one block's state.

    Parameters
    ----------
    model, blocks
        The model, in inference mode, and its decoder blocks.
    chunks
        The sequences; see :func:`~lm_calib_plugin.engine.batches.make_chunks`.
    layers
        Layers inside the blocks.
    visitor
        Takes the inputs.
    device
        Where the model takes its inputs.
    ranks
        The processes that divide the chunks, each of which gets all of the result; states have to
        be lists of statistics then.

    Returns
    -------
    BlockPass
        With the seconds and the warnings of the pass.

    Raises
    ------
    UnsupportedModelError
        When the output head is among the layers.
    CalibError
        When even one sequence at a time does not fit in memory.
    """
    by_block: dict[int, list[TargetLayer]] = {}
    for layer in layers:
        if layer.block == HEAD:
            raise UnsupportedModelError(
                "targets", f"{layer.name} is outside the decoder blocks", "layers of the blocks"
            )
        by_block.setdefault(layer.block, []).append(layer)
    first, ranks = chunks[0] if chunks else None, ranks or Ranks()
    if ranks.several:
        chunks = deal(chunks, ranks.rank, ranks.count).chunks
    work = BlockPass(model, blocks, chunks, device, first)
    wanted = [index for index in by_block if visitor.wants(index)]
    if not wanted:
        return work
    work.timed("capture", work.capture)
    last = max(wanted)
    for index in tqdm(range(last + 1), desc=f"{title}, blocks", disable=not progress):
        own = by_block[index] if index in wanted else []
        with work.at_hand(index):
            _one_block(work, index, last, own, visitor, ranks)
    return work


def _one_block(
    work: BlockPass,
    index: int,
    last: int,
    layers: Sequence[TargetLayer],
    visitor: Visitor,
    ranks: Ranks,
) -> None:
    """Show the inputs of the layers of one block, or pass the data through it."""
    if not layers:
        work.timed("propagate", lambda: work.propagate(index))
        return
    groups = work.groups(index, layers)
    state = work.timed(
        "observe",
        lambda: work.observe(
            index,
            groups,
            lambda: visitor.start(index, groups.groups),
            visitor.listen,
            keep=index < last,
        ),
    )
    if ranks.several:
        work.timed("exchange", lambda: add_up(state, [None] * len(state), ranks, "dense pass"))
    work.timed("keep", lambda: visitor.finish(index, groups.groups, state))
