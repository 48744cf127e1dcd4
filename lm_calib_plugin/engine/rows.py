"""The rows of hidden states that count: no pads, and each as often as its sequence weighs."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_calib_plugin.engine.batches import Chunk


def rows(chunk: Chunk, hidden: Tensor) -> Tensor:
    """Return the rows of the positions that count, ``[tokens, hidden]``."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    counted = chunk.counted()
    return flat if counted is None else flat[counted.to(flat.device)]


def row_weights(chunk: Chunk, like: Tensor) -> Tensor:
    """Return how many times each of these rows counts, float64."""
    if chunk.weights is None:
        return torch.ones(like.shape[0], dtype=torch.float64, device=like.device)
    return chunk.weights.double()[chunk.owners()].to(like.device)


def last_rows(chunk: Chunk, hidden: Tensor) -> Tensor:
    """Return the hidden state of the last real token of every sequence, ``[rows, hidden]``."""
    if chunk.mask is None:
        return hidden[:, -1]
    last = chunk.mask.sum(dim=1) - 1
    return hidden[torch.arange(chunk.rows), last.to(hidden.device)]
