"""Digests of a model: the identity of what was compressed, and of the result."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from lm_calib_plugin.engine.activations import quantizers
from lm_calib_plugin.engine.kv_cache import kv_bits
from lm_calib_plugin.engine.residence import is_offloaded, value_of
from lm_calib_plugin.engine.ties import parameters
from lm_calib_plugin.execution import PackedLinear
from lm_calib_plugin.placement import META, execution_devices, is_meta
from lm_calib_plugin.quantization.activations import ActivationQuantizer
from lm_calib_plugin.storage import digest


def parameter_hashes(model: nn.Module) -> dict[str, list[Any]]:
    """Return shape, dtype and sha256 of the bytes of every parameter, by name.

    The same on every device, and for a packed model as for the simulated one: the weights that
    its levels stand for are hashed. Tensors are hashed in parallel (hashing releases the
    interpreter lock), at about one gigabyte a second and core. Weights that are offloaded are read
    where they are kept, a few at a time.
    """
    named: dict[str, Any] = dict(parameters(model))
    named |= {f"{n}.weight": m for n, m in packed_layers(model).items()}
    order = sorted(named)

    def described(name: str) -> list[Any]:
        # A packed weight is made when its turn comes, so that not all are in memory.
        owner = named[name]
        tensor = owner.weight if isinstance(owner, PackedLinear) else owner()
        return [list(tensor.shape), str(tensor.dtype), _tensor_hash(tensor)]

    # Two at a time where they have to be read: one is read while the other is hashed.
    workers = 2 if is_offloaded(model) else min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(max_workers=workers) as pool:
        return dict(zip(order, pool.map(described, order), strict=True))


def weights_digest(model: nn.Module, hashes: Mapping[str, list[Any]] | None = None) -> str:
    """Return a sha256 over name, shape, dtype and bytes of every parameter.

    Where inputs of layers, or keys and values, are rounded, also over how. ``hashes`` are those
    of :func:`parameter_hashes`, where they are known.
    """
    known = parameter_hashes(model) if hashes is None else hashes
    weights = [[name, *known[name]] for name in sorted(known)]
    return digest(weights + _rounded_on_the_way(model))


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """Return the layers that run on kernels, by name; empty for a simulated model."""
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}


def input_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Return what rounds the input of every layer, by name, also of layers on kernels."""
    rounded = quantizers(model)
    for name, module in packed_layers(model).items():
        # A packed layer does what the quantizer of the layer in its place did.
        for replaced in module.replaced:
            rounded |= quantizers(replaced, name)
    return rounded


def _rounded_on_the_way(model: nn.Module) -> list[list[Any]]:
    """Describe what the model rounds besides its weights; empty for most models."""
    found: list[list[Any]] = [
        [name, "input", q.spec.describe(), None if q.limit is None else float(q.limit).hex()]
        for name, q in sorted(input_quantizers(model).items())
    ]
    bits = kv_bits(model)
    return found if bits is None else [*found, ["", "keys and values", bits]]


def model_digest(model: nn.Module, hashes: Mapping[str, list[Any]] | None = None) -> str:
    """Return a digest of everything that decides what a model computes.

    Weights, buffers (routing biases, rotary frequencies and scales of embeddings, which a cast
    rounds) and the configuration as far as it differs from the defaults of its class, with the
    attention implementation. Names, versions and output switches are left out, and so are buffers
    that a forward pass rewrites: the digest is the same before and after. ``hashes`` are those of
    :func:`parameter_hashes`, where they are known.
    """
    buffers = {
        name: [list(tensor.shape), str(tensor.dtype), _tensor_hash(tensor)]
        for name, tensor in lasting_buffers(model)
    }
    config: Any = getattr(model, "config", None)
    settings = config.to_diff_dict() if config is not None else {}
    settings = {k: v for k, v in settings.items() if k not in _NOT_IDENTITY}
    attention = str(getattr(config, "_attn_implementation", None))
    text = json.dumps(settings, sort_keys=True, default=str)
    return digest([weights_digest(model, hashes), buffers, text, attention])


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


def lasting_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the buffers that stay as they are while a model is used, by name.

    Those that are stored with the model, and of the others all but these:

    - of roundings and packed layers, which :func:`weights_digest` tells of;
    - ``*_cached`` (cosines and sines in models with code of their own), which grow with the text;
    - ``inv_freq`` where it is computed anew for long texts: what it comes from stands beside it,
      as ``original_inv_freq``, and counts.
    """
    stored = model.state_dict(keep_vars=True).keys()
    found = []
    for path, module in model.named_modules():
        ours = isinstance(module, (ActivationQuantizer, PackedLinear))
        # With duplicates: after a long text the frequencies and their original may be one tensor.
        for own, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            name = f"{path}.{own}" if path else own
            passing = ours or own.endswith("_cached") or _follows_length(module, own)
            if name in stored or not passing:
                found.append((name, value_of(module, own) if is_meta(buffer) else buffer))
    return sorted(found, key=lambda pair: pair[0])


def circumstances(model: nn.Module) -> dict[str, Any]:
    """Return what decides, beside :func:`model_digest`, what a model computes to the last bit.

    Its class, how it computes its experts, and what it runs on.
    """
    kind = type(model)
    config: Any = getattr(model, "config", None)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "experts": str(getattr(config, "_experts_implementation", None)),
        "hardware": _hardware(model),
    }


def _hardware(model: nn.Module) -> list[str]:
    """Return the kinds of devices that run the model; of CUDA devices their names."""
    found = set()
    devices = {parameter.device for parameter in model.parameters()}
    if META in devices:
        devices = set(execution_devices(model).values())
    for device in devices:
        if device.type == "cuda":
            found.add(f"cuda {torch.cuda.get_device_name(device)}")
        elif device.type == "cpu":
            # Products are summed in another order where registers are wider, and where more
            # threads share the work: with no data, too, when a transform is checked for instance.
            kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
            found.add(f"cpu {kind} {torch.get_num_threads()} threads")
        else:
            found.add(device.type)
    return sorted(found)


def _follows_length(module: nn.Module, buffer: str) -> bool:
    """Tell whether a buffer holds rotary frequencies that depend on the length of a text."""
    layer_type, ending, _ = buffer.partition("inv_freq")
    if not ending or layer_type.endswith("original_"):
        return False
    kind: Any = getattr(module, "rope_type", None)
    if isinstance(kind, dict):
        kind = kind.get(layer_type.removesuffix("_"))
    return "dynamic" in str(kind) or kind == "longrope"


def _tensor_hash(tensor: Tensor) -> str:
    content = tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
    return hashlib.sha256(memoryview(content)).hexdigest()
