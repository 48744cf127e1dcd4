"""Where the hidden states of all chunks wait between two blocks, and how they travel.

On the device as long as they take little of it; else in the memory of the host, pinned, from where
the next chunk is fetched while one is computed. What is computed does not depend on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lm_calib_plugin.engine.batches import Chunk
from lm_calib_plugin.engine.residence import is_offloaded

# Part of the free memory of a device that hidden states may take there.
SHARE = 0.25
HOST = torch.device("cpu")


class HiddenStates:
    """Keeps hidden states of chunks, on the device where they are computed or on the host.

    Parameters
    ----------
    device
        Where blocks take them.
    on_host
        Whether they wait in the memory of the host.
    """

    def __init__(self, device: torch.device, on_host: bool = False) -> None:
        self.device, self.on_host = device, on_host
        # One stream for both ways: what is written is read again in order.
        self._stream: torch.cuda.Stream | None = None
        if on_host and device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def put(self, hidden: Tensor, into: Tensor | None = None) -> Tensor:
        """Return hidden states where they wait; on the host in the memory of ``into`` if given.

        They may be on their way until :meth:`settle`.
        """
        if not self.on_host or hidden.device == HOST:
            return hidden
        if into is None or into.shape != hidden.shape or into.dtype != hidden.dtype:
            pinned = self._stream is not None
            into = torch.empty_like(hidden, device=HOST, pin_memory=pinned)
        if self._stream is None or hidden.device != self.device:
            # A model over several devices: what is not of the first is copied at once.
            return into.copy_(hidden)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            into.copy_(hidden, non_blocking=True)
        hidden.record_stream(self._stream)
        return into

    def twin(self, hidden: Tensor) -> Tensor:
        """Return a copy that waits in the same place."""
        self.settle()
        into = torch.empty_like(hidden, pin_memory=hidden.is_pinned())
        return into.copy_(hidden)

    def coming(self, chunks: Sequence[Chunk], dense: bool) -> Iterator[tuple[Chunk, Chunk]]:
        """Yield every chunk, and it with its hidden states on the device.

        While one is in use the next is on its way. With ``dense`` those of the dense model come,
        too; else they are left out.
        """
        ahead = self._fetched(chunks[0], dense) if chunks else None
        for number, chunk in enumerate(chunks):
            here, ahead = ahead, None
            assert here is not None
            self._arrive(here)
            if number + 1 < len(chunks):
                ahead = self._fetched(chunks[number + 1], dense)
            yield chunk, here

    def settle(self) -> None:
        """Wait until everything has arrived."""
        if self._stream is not None:
            self._stream.synchronize()

    def _fetched(self, chunk: Chunk, dense: bool) -> Chunk:
        also = self._get(chunk.dense) if dense else None
        return dataclasses.replace(chunk, hidden=self._get(chunk.hidden), dense=also)

    def _get(self, hidden: Tensor | None) -> Tensor | None:
        if hidden is None or not self.on_host:
            return hidden
        if self._stream is None:
            return hidden.to(self.device)
        with torch.cuda.stream(self._stream):
            return hidden.to(self.device, non_blocking=True)

    def _arrive(self, chunk: Chunk) -> None:
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        for hidden in (chunk.hidden, chunk.dense):
            if hidden is not None:
                hidden.record_stream(current)


def waits_on_host(
    model: nn.Module, chunks: Sequence[Chunk], like: Tensor, device: torch.device
) -> bool:
    """Tell whether hidden states are to wait in the memory of the host.

    That is so on an accelerator, where weights of the model are offloaded, or where the hidden
    states of all chunks would take more than a quarter of its free memory.

    Parameters
    ----------
    like
        Hidden states of a few tokens, ``[batch, length, hidden]``.
    """
    if device.type != "cuda":
        return False
    if is_offloaded(model):
        return True
    needed = sum(chunk.ids.numel() for chunk in chunks) * like.shape[-1] * like.element_size()
    free, _ = torch.cuda.mem_get_info(device)
    return needed > SHARE * free
