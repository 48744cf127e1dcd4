"""One pass through the dense model, block by block, with every layer input shown to a visitor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """What looks at the inputs of the layers.

    One that also has a method ``stream(index, chunk)`` sees the residual stream: it is called
    before block ``index`` with every chunk, whose ``hidden`` ``[batch, length, hidden]`` is what
    goes in, and at last with the number of blocks and what comes out of the last one. It keeps all
    of a chunk or, when it raises, nothing: a chunk that runs out of memory comes again in parts.
    Rows of several processes are not added up.
    """

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
    first: Chunk | None = None,
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
    first
        The chunk whose first tokens tell which layers share an input; default: the first of these.
        The same one in several passes makes their groups the same.

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
    if first is None and chunks:
        first = chunks[0]
    ranks = ranks or Ranks()
    if ranks.several:
        chunks = deal(chunks, ranks.rank, ranks.count).chunks
    work = BlockPass(model, blocks, chunks, device, first)
    wanted = [index for index in by_block if visitor.wants(index)]
    stream = getattr(visitor, "stream", None)
    if not wanted and stream is None:
        return work
    work.timed("capture", work.capture)
    last = max(wanted) if stream is None else len(blocks) - 1
    for index in tqdm(range(last + 1), desc=f"{title}, blocks", disable=not progress):
        own = by_block[index] if index in wanted else []
        _show_stream(work, index, stream)
        with work.at_hand(index):
            _one_block(work, index, index < last or stream is not None, own, visitor, ranks)
    _show_stream(work, last + 1, stream)
    return work


def _show_stream(work: BlockPass, index: int, stream: Callable[[int, Chunk], None] | None) -> None:
    """Show what goes into a block, each chunk once."""
    if stream is None:
        return
    for chunk in work.chunks:
        chunk.done = False

    def rest() -> None:
        left = [chunk for chunk in work.chunks if not chunk.done]
        for chunk, here in work.hidden.coming(left, dense=False):
            stream(index, here)
            chunk.done = True
        work.hidden.settle()

    work.timed("stream", lambda: work.until_it_fits(rest))


def _one_block(
    work: BlockPass,
    index: int,
    keep: bool,
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
            keep=keep,
        ),
    )
    if ranks.several:
        work.timed("exchange", lambda: add_up(state, [None] * len(state), ranks, "dense pass"))
    work.timed("keep", lambda: visitor.finish(index, groups.groups, state))
