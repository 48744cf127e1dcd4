"""Which module feeds which layers, so that factors of channels can move from one to the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lm_calib_plugin.engine.discovery import Blocks, text_config
from lm_calib_plugin.errors import UnsupportedModelError, listed

NORM, LINEAR = "norm", "linear"
_ACTIVATION = "it reads what an activation function other than ReLU returns"
_ROUTED = "it shares its norm with the router"
_POST_NORM = "the norm before it is also what the residual stream goes on with"
_OTHER = "nothing in the block feeds it alone"


@dataclass(frozen=True)
class Route:
    """Names inside a block: what divides, and every layer that reads its output.

    ``values`` tells how a linear layer that returns the values of attention orders its outputs:
    ``last`` (behind those of queries and keys, if it returns them too), ``grouped`` (queries, key
    and value of one key/value head after another), or ``""`` where it returns no values; then its
    last outputs are the inputs of the reader.
    """

    source: str
    readers: tuple[str, ...]
    values: str = ""


@dataclass(frozen=True)
class Map:
    """Routes of the blocks of one architecture.

    ``shift`` is what a norm adds to its weight; ``why`` tells, for the first name that the name of
    a layer starts with, why it has no route.
    """

    routes: tuple[Route, ...]
    shift: float = 0.0
    why: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, eq=False)
class Feed:
    """A norm or a linear layer, and all layers that read its output and nothing else.

    ``rows`` (``[in]``) is the output channel of the source from which each input channel comes: a
    channel of a key/value head feeds several query heads.
    """

    name: str
    kind: str
    source: nn.Module
    reader_names: tuple[str, ...]
    readers: tuple[nn.Module, ...]
    rows: Tensor
    shift: float = 0.0

    def tie(self, x: Tensor) -> Tensor:
        """Average values ``[in]`` over the channels that must share a factor."""
        rows = self.rows.to(x.device)
        width = int(rows.max()) + 1
        sums = x.new_zeros(width).index_add_(0, rows, x)
        counts = x.new_zeros(width).index_add_(0, rows, torch.ones_like(x))
        # Channels of their own are kept bit for bit.
        return torch.where(counts[rows] == 1, x, sums[rows] / counts[rows])

    @torch.no_grad()
    def divide(self, s: Tensor) -> Tensor:
        """Divide the output of the source by ``s`` (``[in]``, tied), in place.

        Returns
        -------
        The factors by which the output really became smaller, ``[in]``, float32. Stored in 16
        bits, the gain of a norm is not exactly what was asked for (where the norm computes
        ``1 + w``, it can be far off); the readers make up for what was stored, so the function
        stays.
        """
        weight = self.source.weight
        s, rows = s.to(weight.device, torch.float32), self.rows.to(weight.device)
        bias = getattr(self.source, "bias", None)
        if self.kind == NORM:
            s = self._divide_gain(weight, s)
            every = s
        else:
            transposed = isinstance(self.source, Conv1D)
            stored = weight.data.t() if transposed else weight.data
            every = torch.ones(stored.shape[0], device=s.device)
            every[rows] = s
            stored.copy_(stored.float() / every[:, None])
        if bias is not None:
            bias.data.copy_(bias.data.float() / every)
        return s

    def _divide_gain(self, weight: Tensor, s: Tensor) -> Tensor:
        gain = weight.data.float() + self.shift
        small = (gain / s - self.shift).to(weight.dtype)
        stored = small.float() + self.shift
        # A gain that would vanish in this dtype stays what it was.
        lost = (stored == 0) & (gain != 0)
        weight.data.copy_(torch.where(lost, weight.data, small))
        s = torch.where(lost, torch.ones_like(s), s)
        same = (stored == 0) | lost | (s == 1)
        return torch.where(same, s, gain / torch.where(same, gain.new_ones(()), stored))

    @torch.no_grad()
    def multiply(self, s: Tensor) -> None:
        """Multiply the columns of every reader by ``s`` (``[in]``), in place."""
        for reader in self.readers:
            weight = reader.weight
            factor = s.to(weight.device, torch.float32)
            factor = factor[:, None] if isinstance(reader, Conv1D) else factor
            weight.data.copy_(weight.data.float() * factor)


@dataclass(frozen=True, eq=False)
class Wiring:
    """The feeds of every block; ``left`` are linear layers without one, and why."""

    blocks: tuple[tuple[Feed, ...], ...]
    left: tuple[tuple[str, str], ...]

    def feeds(self, index: int) -> list[Feed]:
        """Return the feeds of a block; those from linear layers come first."""
        return list(self.blocks[index])


def wiring_of(model: nn.Module, blocks: Blocks) -> Wiring:
    """Find what feeds which layers.

    Raises
    ------
    UnsupportedModelError
        For an architecture that is not mapped, or a block that is not made as its map says.
    """
    config = text_config(getattr(model, "config", None))
    kind = str(getattr(config, "model_type", ""))
    if kind not in MAPS:
        raise UnsupportedModelError(
            "transform",
            f"which layers feed which is not known for {type(model).__name__} ({kind})",
            f"architectures: {listed(sorted(MAPS))}",
            "use transform=none",
        )
    found, left = [], []
    for index, block in enumerate(blocks.modules):
        prefix = f"{blocks.path}.{index}"
        plan = MAPS[kind](config)
        made = [_feed(prefix, block, route, plan.shift, config) for route in plan.routes]
        feeds = sorted((f for f in made if f is not None), key=lambda f: f.kind == NORM)
        found.append(tuple(feeds))
        left += _left(prefix, block, plan, {n for f in feeds for n in f.reader_names})
    return Wiring(tuple(found), tuple(left))


def _feed(prefix: str, block: nn.Module, route: Route, shift: float, config: Any) -> Feed | None:
    modules = dict(block.named_modules())
    source = modules.get(route.source)
    readers = tuple(modules.get(name) for name in route.readers)
    if all(r is None for r in readers):
        # Blocks of a mixture of experts have no plain MLP, and the other way round.
        return None
    name = f"{prefix}.{route.source}"
    odd = [n for n, r in zip(route.readers, readers, strict=True) if not _is_linear(r)]
    if odd:
        raise _refused(f"{prefix}.{odd[0]}", block, "is not a linear layer")
    weight = getattr(source, "weight", None)
    if not isinstance(weight, nn.Parameter):
        raise _refused(name, block, "has no weight")
    width = _sizes(readers[0])[1]
    if _is_linear(source):
        kind, rows = LINEAR, _rows(name, block, route, _sizes(source)[0], width, config)
    else:
        kind, rows = NORM, torch.arange(width)
        if weight.shape != (width,):
            raise _refused(name, block, f"has a weight of shape {tuple(weight.shape)}")
    names = tuple(f"{prefix}.{n}" for n in route.readers)
    return Feed(name, kind, source, names, readers, rows, shift)  # type: ignore[arg-type]


def _rows(name: str, block: nn.Module, route: Route, out: int, width: int, config: Any) -> Tensor:
    """Return the output channel of a linear layer from which each input channel comes."""
    if not route.values:
        if out not in (width, 2 * width):
            raise _refused(name, block, f"has {out} outputs for {width} inputs")
        return torch.arange(out - width, out)
    heads, kv = int(config.num_attention_heads), key_value_heads(config)
    size, group = width // heads, heads // kv
    owner = torch.arange(heads) // group
    together = (heads + 2 * kv) * size
    allowed = (together,) if route.values == "grouped" else (together, kv * size)
    if width % heads or heads % kv or out not in allowed:
        raise _refused(name, block, f"has {out} outputs for {heads} heads of {size}")
    if route.values == "grouped":
        first = (owner * (group + 2) + group + 1) * size
    else:
        first = out - kv * size + owner * size
    return (first[:, None] + torch.arange(size)).reshape(-1)


def key_value_heads(config: Any) -> int:
    """Return how many key/value heads an attention has."""
    heads = int(config.num_attention_heads)
    if config.model_type == "falcon":
        if config.new_decoder_architecture:
            return int(config.num_kv_heads)
        return 1 if config.multi_query else heads
    return int(getattr(config, "num_key_value_heads", None) or heads)


def _is_linear(module: nn.Module | None) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _sizes(module: Any) -> tuple[int, int]:
    """Return ``(out, in)``."""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _left(prefix: str, block: nn.Module, plan: Map, read: set[str]) -> list[tuple[str, str]]:
    left = []
    for local, module in block.named_modules():
        name = f"{prefix}.{local}"
        experts = isinstance(getattr(module, "down_proj", None), nn.Parameter)
        if (_is_linear(module) or experts) and name not in read:
            why = next((w for start, w in plan.why if local.startswith(start)), _OTHER)
            left.append((name, why))
    return left


def _refused(name: str, block: nn.Module, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "transform",
        f"{name} ({type(block).__name__}) {what}",
        "blocks made as the library makes them",
        "use transform=none",
    )


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = ("mlp.gate_proj", "mlp.up_proj")
_ATTENTION = (
    Route("self_attn.v_proj", ("self_attn.o_proj",), "last"),
    Route("input_layernorm", _QKV),
)
_LLAMA = (
    *_ATTENTION,
    Route("mlp.up_proj", ("mlp.down_proj",)),
    Route("post_attention_layernorm", _GATED),
)
# Routers read the norm before the experts, and their statistics differ from expert to expert.
_MOE = Map(
    (*_LLAMA, Route("mlp.shared_expert.up_proj", ("mlp.shared_expert.down_proj",))),
    why=(("mlp.experts", _ROUTED), ("mlp", _ROUTED)),
)
_AROUND = (
    *_ATTENTION,
    Route("mlp.up_proj", ("mlp.down_proj",)),
    Route("pre_feedforward_layernorm", _GATED),
)
_PHI3 = Map(
    (
        Route("self_attn.qkv_proj", ("self_attn.o_proj",), "last"),
        Route("input_layernorm", ("self_attn.qkv_proj",)),
        Route("mlp.gate_up_proj", ("mlp.down_proj",)),
        Route("post_attention_layernorm", ("mlp.gate_up_proj",)),
    )
)
_PHI = Map(
    (
        Route("self_attn.v_proj", ("self_attn.dense",), "last"),
        Route("input_layernorm", (*_QKV, "mlp.fc1")),
    ),
    why=(("mlp.fc2", _ACTIVATION),),
)
_GPT2 = Map(
    (
        Route("attn.c_attn", ("attn.c_proj",), "last"),
        Route("ln_1", ("attn.c_attn",)),
        Route("ln_2", ("mlp.c_fc",)),
    ),
    why=(("mlp.c_proj", _ACTIVATION),),
)


def _fused(attention: str, norms: tuple[Route, ...], why: tuple[tuple[str, str], ...] = ()) -> Map:
    query = f"{attention}.query_key_value"
    values = Route(query, (f"{attention}.dense",), "grouped")
    return Map((values, *norms), why=(("mlp.dense_4h_to_h", _ACTIVATION), *why))


def _two_norms(attention: str, first: str, second: str) -> tuple[Route, Route]:
    query = Route(first, (f"{attention}.query_key_value",))
    return query, Route(second, ("mlp.dense_h_to_4h",))


def _opt(config: Any) -> Map:
    routes = [Route("self_attn.v_proj", ("self_attn.out_proj",), "last")]
    why = []
    if config.activation_function == "relu":
        # max(0, x) / s = max(0, x / s) for positive s.
        routes.append(Route("fc1", ("fc2",)))
    else:
        why.append(("fc2", _ACTIVATION))
    if config.do_layer_norm_before and config.layer_norm_elementwise_affine:
        routes += [Route("self_attn_layer_norm", _QKV), Route("final_layer_norm", ("fc1",))]
    else:
        why += [("self_attn", _POST_NORM), ("fc1", _POST_NORM)]
    return Map(tuple(routes), why=tuple(why))


def _bloom(config: Any) -> Map:
    if config.apply_residual_connection_post_layernorm:
        return _fused("self_attention", (), (("", _POST_NORM),))
    norms = _two_norms("self_attention", "input_layernorm", "post_attention_layernorm")
    return _fused("self_attention", norms)


def _falcon(config: Any) -> Map:
    place = "self_attention"
    if not config.parallel_attn:
        norms = _two_norms(place, "input_layernorm", "post_attention_layernorm")
    elif config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2):
        norms = _two_norms(place, "ln_attn", "ln_mlp")
    else:
        readers = (f"{place}.query_key_value", "mlp.dense_h_to_4h")
        return _fused(place, (Route("input_layernorm", readers),))
    return _fused(place, norms)


def _fixed(plan: Map) -> Callable[[Any], Map]:
    return lambda _config: plan


# By config.model_type; each is tested to leave the output of its blocks as it was.
MAPS: dict[str, Callable[[Any], Map]] = {
    **{n: _fixed(Map(_LLAMA)) for n in ("llama", "mistral", "qwen2", "qwen3")},
    **{n: _fixed(Map(_LLAMA)) for n in ("granite", "smollm3")},
    **{n: _fixed(_MOE) for n in ("mixtral", "qwen2_moe", "qwen3_moe")},
    "gemma": _fixed(Map(_LLAMA, shift=1.0)),
    "gemma2": _fixed(Map(_AROUND, shift=1.0)),
    "gemma3_text": _fixed(Map(_AROUND, shift=1.0)),
    "phi": _fixed(_PHI),
    "phi3": _fixed(_PHI3),
    "gpt2": _fixed(_GPT2),
    "gpt_neox": _fixed(
        _fused("attention", _two_norms("attention", "input_layernorm", "post_attention_layernorm"))
    ),
    "opt": _opt,
    "bloom": _bloom,
    "falcon": _falcon,
}
