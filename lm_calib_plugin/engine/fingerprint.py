"""A digest of the weights of a model: the identity of what was compressed and of the result."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from lm_calib_plugin.storage import digest


def weights_digest(model: nn.Module) -> str:
    """Return a sha256 over name, shape, dtype and bytes of every parameter.

    The same on every device. Tensors are hashed in parallel (hashing releases the interpreter
    lock), at about one gigabyte a second and core.
    """
    named = sorted(model.named_parameters())
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        hashes = list(pool.map(_tensor_hash, [p.detach() for _, p in named]))
    return digest(
        [[name, list(p.shape), str(p.dtype), h] for (name, p), h in zip(named, hashes, strict=True)]
    )


def _tensor_hash(tensor: Tensor) -> str:
    content = tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
    return hashlib.sha256(memoryview(content)).hexdigest()
