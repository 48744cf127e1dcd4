"""Digests of a model: the identity of what was compressed, and of the result."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from lm_calib_plugin.engine.activations import quantizers
from lm_calib_plugin.engine.kv_cache import kv_bits
from lm_calib_plugin.storage import digest


def weights_digest(model: nn.Module) -> str:
    """Return a sha256 over name, shape, dtype and bytes of every parameter.

    Where inputs of layers, or keys and values, are rounded, also over how. The same on every
    device. Tensors are hashed in parallel (hashing releases the interpreter
    lock), at about one gigabyte a second and core.
    """
    named = sorted(model.named_parameters())
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        hashes = list(pool.map(_tensor_hash, [p.detach() for _, p in named]))
    weights = [
        [name, list(p.shape), str(p.dtype), h] for (name, p), h in zip(named, hashes, strict=True)
    ]
    return digest(weights + _rounded_on_the_way(model))


def _rounded_on_the_way(model: nn.Module) -> list[list[Any]]:
    """Describe what the model rounds besides its weights; empty for most models."""
    found: list[list[Any]] = [
        [name, "input", q.spec.describe(), None if q.limit is None else float(q.limit).hex()]
        for name, q in sorted(quantizers(model).items())
    ]
    bits = kv_bits(model)
    return found if bits is None else [*found, ["", "keys and values", bits]]


def model_digest(model: nn.Module) -> str:
    """Return a digest of everything that decides what a model computes.

    Weights, persistent buffers (routing biases, for instance) and the configuration as far as it
    differs from the defaults of its class, with the attention implementation. Names, versions and
    output switches are left out.
    """
    buffers = {name: _tensor_hash(tensor) for name, tensor in _persistent_buffers(model)}
    config: Any = getattr(model, "config", None)
    settings = config.to_diff_dict() if config is not None else {}
    settings = {k: v for k, v in settings.items() if k not in _NOT_IDENTITY}
    attention = str(getattr(config, "_attn_implementation", None))
    text = json.dumps(settings, sort_keys=True, default=str)
    return digest([weights_digest(model), buffers, text, attention])


_NOT_IDENTITY = (
    "_name_or_path",
    "architectures",
    "dtype",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


def _persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    stored = model.state_dict(keep_vars=True).keys()
    return sorted((name, b) for name, b in model.named_buffers() if name in stored)


def _tensor_hash(tensor: Tensor) -> str:
    content = tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
    return hashlib.sha256(memoryview(content)).hexdigest()
