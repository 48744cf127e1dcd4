"""Simulated quantization of the keys and values that a cache would hold.

transformers looks up the attention function by the name in the configuration. Here a function of
another name rounds keys and values, and then calls the one that the model had. Every vector is
rounded by itself, so that it does not matter whether it comes fresh from its layer (scoring) or
out of the cache (generation): the cache keeps exact vectors, which round to the same every time.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from lm_calib_plugin.engine.discovery import Blocks, find_blocks
from lm_calib_plugin.errors import UnsupportedModelError, UserError
from lm_calib_plugin.guard import left_as_found
from lm_calib_plugin.placement import execution_device
from lm_calib_plugin.quantization.activations import round_tokens

BASES = ("sdpa", "eager")
BITS = tuple(range(2, 9))
_NAME = re.compile(r"calib_kv(\d+)_(.+)")
_PROBE_TOKENS = 5
# While this holds a list, attention is as it was, and the modules that call it are noted.
_calls: ContextVar[list[nn.Module] | None] = ContextVar("_calls", default=None)


def quantize_kv(model: Any, bits: int | None, blocks: Blocks | None = None) -> None:
    """Round keys and values of every attention layer from now on; in place.

    Every key (after rotary embedding) and value vector of each token and head is rounded to
    symmetric integers with a scale of its own, see
    :class:`~lm_calib_plugin.quantization.activations.ActivationSpec`. Weights and stored
    configuration stay as they are. A width installed before is replaced.

    Parameters
    ----------
    model
        A causal language model of transformers.
    bits
        2 to 8; None or 16 leave keys and values as they are.
    blocks
        The decoder blocks, where they are known.

    Raises
    ------
    UserError
        For other widths, and for attention implementations other than ``sdpa`` and ``eager``.
    UnsupportedModelError
        When attention of the model does not go through the interface of transformers, in any of
        its blocks; the model is as before then.
    """
    if bits not in (None, 16, *BITS):
        raise UserError("kv_bits", f"got {bits}", "2 to 8, or 16 for none")
    if bits is None or bits == 16:
        remove_kv(model)
        return
    blocks = find_blocks(model) if blocks is None else blocks
    check_kv(model, blocks)
    configs = _configs(blocks)
    _set(configs, [_registered(bits, _base(config)) for config in configs])


def check_kv(model: Any, blocks: Blocks | None = None) -> None:
    """Refuse a model whose keys and values can not be rounded; nothing is changed.

    A few tokens go through the model, twice.

    Raises
    ------
    UserError, UnsupportedModelError
        As :func:`quantize_kv`.
    """
    blocks = find_blocks(model) if blocks is None else blocks
    configs = _configs(blocks)
    before = [config._attn_implementation for config in configs]
    plain = [_base(config) for config in configs]
    # Any width: nothing is rounded while calls are noted.
    names = [_registered(BITS[-1], base) for base in plain]
    try:
        _probe(model, blocks, configs, names, plain)
    finally:
        _set(configs, before)


def remove_kv(model: nn.Module) -> None:
    """Leave keys and values as they are from now on."""
    configs = _all_configs(model.modules())
    _set(configs, [_base(config) for config in configs])


def kv_bits(model: nn.Module) -> int | None:
    """Return the width to which keys and values are rounded; None where they are not."""
    for config in _all_configs(model.modules()):
        found = _NAME.fullmatch(str(config._attn_implementation))
        if found:
            return int(found[1])
    return None


def _configs(blocks: Blocks) -> list[Any]:
    """Return the configurations that the decoder blocks look their attention up in."""
    found = _all_configs(module for block in blocks.modules for module in block.modules())
    if not found:
        raise _unreachable(blocks.modules[0])
    return found


def _all_configs(modules: Any) -> list[Any]:
    found: dict[int, Any] = {}
    for module in modules:
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found.setdefault(id(config), config)
    return list(found.values())


def _base(config: Any) -> str | None:
    """Return the name of the attention function without rounding."""
    name: str | None = config._attn_implementation
    found = _NAME.fullmatch(str(name))
    return found[2] if found else name


def _set(configs: list[Any], names: Sequence[str | None]) -> None:
    for config, name in zip(configs, names, strict=True):
        # Not the property: it would set the parts of a multimodal configuration, too.
        config._attn_implementation_internal = name


def _registered(bits: int, base: str | None) -> str:
    """Return the name of the rounding version of an attention function; make it if needed."""
    if base not in BASES:
        raise UserError(
            "kv_bits",
            f"keys and values can not be rounded with attn_implementation={base}",
            "sdpa or eager",
            "load the model with attn_implementation=sdpa",
        )
    name = f"calib_kv{bits}_{base}"
    AttentionInterface.register(name, _attention(bits, base))
    AttentionMaskInterface.register(name, AttentionMaskInterface()[base])
    return name


def _attention(bits: int, base: str) -> Callable[..., Any]:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        calls = _calls.get()
        if calls is None:
            key, value = round_tokens(key, bits), round_tokens(value, bits)
        else:
            calls.append(module)
        return _plain(module, base)(module, query, key, value, *args, **kwargs)

    return attend


def _plain(module: nn.Module, base: str) -> Callable[..., Any]:
    """Return the attention function of a name; every model file has an ``eager`` one of its own."""
    if base != "eager":
        function: Callable[..., Any] = AttentionInterface()[base]
        return function
    for kind in type(module).__mro__:
        found = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    raise _unreachable(module)


def _unreachable(module: nn.Module) -> UnsupportedModelError:
    return UnsupportedModelError(
        "kv_bits",
        f"keys and values can not be reached in {type(module).__name__}",
        "models whose attention goes through the attention interface of transformers 5 in every "
        "decoder block",
        "leave kv_bits out",
    )


def _probe(
    model: Any,
    blocks: Blocks,
    configs: list[Any],
    names: Sequence[str | None],
    plain: Sequence[str | None],
) -> None:
    """Make sure that every block calls the function, and that nothing but the rounding changes."""
    embeddings = model.get_input_embeddings()
    ids = torch.arange(_PROBE_TOKENS)[None] % embeddings.weight.shape[0]
    ids = ids.to(execution_device(embeddings))
    with left_as_found(model):
        _set(configs, plain)
        expected = model(input_ids=ids, use_cache=False).logits
        _set(configs, names)
        with _noted() as calls:
            found = model(input_ids=ids, use_cache=False).logits
    called = {id(module) for module in calls}
    for block in blocks.modules:
        if not called & {id(module) for module in block.modules()}:
            raise _unreachable(block)
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise _unreachable(model)


@contextmanager
def _noted() -> Iterator[list[nn.Module]]:
    calls: list[nn.Module] = []
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)
