"""A digest of the weights of a model, fast enough to take on every load."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lm_calib_plugin.storage import digest

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 24
_MULTIPLIER = -7046029254386353131  # 2^64 / golden ratio, as a signed 64-bit number


def weights_digest(model: nn.Module) -> str:
    """Return a sha256 over name, shape, dtype and a positional 64-bit sum of every tensor.

    The sum is taken over the bits of the elements, so any single changed bit changes it; it runs
    on the device of the tensor. It guards against accidents, not against forgery.
    """
    rows = [
        [name, list(tensor.shape), str(tensor.dtype), _positional_sum(tensor)]
        for name, tensor in sorted(model.named_parameters())
    ]
    return digest(rows)


def _positional_sum(tensor: Tensor) -> int:
    flat = tensor.detach().reshape(-1)
    words = flat.view(_WORDS[flat.element_size()])
    total = 0
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK].long()
        place = torch.arange(start, start + part.numel(), device=part.device)
        # Odd weights, well mixed: a change of one element can not vanish.
        weight = ((place * 2 + 1) * _MULTIPLIER) | 1
        total = (total + int((part * weight).sum().item())) % (1 << 64)
    return total
