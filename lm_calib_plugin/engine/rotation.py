"""Rotate a whole model: the same logits, from weights and activations without outlying channels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lm_calib_plugin.engine.discovery import Blocks, text_config
from lm_calib_plugin.engine.residence import resident
from lm_calib_plugin.engine.ties import is_tied, untie_head
from lm_calib_plugin.engine.wiring import key_value_heads
from lm_calib_plugin.errors import NumericalError, UnsupportedModelError, listed
from lm_calib_plugin.placement import execution_device
from lm_calib_plugin.quantization.hadamard import Hadamard

FLOAT32_TOLERANCE = 1e-4
# Of the precision of a 16-bit dtype; a wrong rotation changes logits by about their own size.
ROUNDINGS = 16.0
PROBE_TOKENS = 16
# Rows that are held in float64 at a time.
ROWS = 8192
# By config.model_type: what the norms add to their weight.
MAPPED = {
    **{n: 0.0 for n in ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "smollm3")},
    **{n: 0.0 for n in ("mixtral", "qwen2_moe", "qwen3_moe")},
    "gemma": 1.0,
}
_QKV = tuple(f"self_attn.{n}.weight" for n in ("q_proj", "k_proj", "v_proj", "qkv_proj"))
_OUTPUT = ("self_attn.o_proj.weight",)
# Experts hold several matrices in one parameter, [experts, out, in].
_MLP = (
    *(f"mlp.{n}.weight" for n in ("gate_proj", "up_proj", "gate_up_proj", "gate")),
    *(f"mlp.shared_expert{n}.weight" for n in (".gate_proj", ".up_proj", "_gate")),
    "mlp.experts.gate_up_proj",
)
_DOWN = ("mlp.down_proj.weight", "mlp.shared_expert.down_proj.weight", "mlp.experts.down_proj")


@dataclass(frozen=True, eq=False)
class _Part:
    """One block: each norm with what reads it, writers with their biases, and the attention."""

    norms: tuple[tuple[nn.Parameter, tuple[nn.Parameter, ...]], ...]
    writers: tuple[tuple[nn.Parameter, nn.Parameter | None], ...]
    values: nn.Linear
    output: nn.Linear


@dataclass(frozen=True, eq=False)
class _Plan:
    shift: float
    embeddings: nn.Embedding
    head: nn.Linear
    final: nn.Module
    heads: int
    kv_heads: int


def check_rotation(model: nn.Module, blocks: Blocks) -> None:
    """Refuse a model that can not be rotated; nothing is changed.

    Raises
    ------
    UnsupportedModelError
        For an architecture that is not mapped, or a model that is not made as its map says.
    """
    _plan(model, blocks)


@torch.no_grad()
def rotate(model: nn.Module, blocks: Blocks, seed: int, r2: bool = True) -> dict[str, Any]:
    """Rotate the residual stream, and the values of attention, by random Hadamard matrices.

    Gains of norms are folded into the layers that read them, since only a norm without gain lets a
    rotation pass. A head tied to the embeddings gets a weight of its own: the gain of the last norm
    goes into the head alone. All is computed in float64, a piece of one matrix at a time, and
    stored in place in the dtype of each parameter.

    Parameters
    ----------
    model, blocks
        The model, in inference mode, and its decoder blocks.
    seed
        Chooses the random signs.
    r2
        Whether the values of each key/value head are rotated, too.

    Returns
    -------
    What was done: sizes of the rotations and whether they are Hadamard matrices, whether the head
    was untied, and the difference of the logits.

    Raises
    ------
    UnsupportedModelError
        As :func:`check_rotation`, before any change.
    NumericalError
        When the logits of a few tokens change: in float32 those of any token by more than 1e-4 of
        their norm; in 16 bits, where all weights are rounded once more and a token may be sent to
        other experts, those of half of the tokens by more than 16 units of the last place.
    """
    plan = _plan(model, blocks)
    before = _probe(model, plan)
    tied = is_tied(model)
    if tied:
        untie_head(model)
    width = plan.embeddings.embedding_dim
    residual = Hadamard.random(width, _derive(seed, "residual"))
    with resident(plan.embeddings):
        _rotate_inputs(plan.embeddings.weight, residual)
    with resident(plan.final, plan.head):
        _fold(plan.final.weight, (plan.head.weight,), plan.shift, residual)
    values = []
    for index, block in enumerate(blocks.modules):
        with resident(block):
            part = _part(f"{blocks.path}.{index}", block, width)
            _rotate_block(part, plan, residual)
            if r2:
                size = part.output.in_features // plan.heads
                values.append(Hadamard.random(size, _derive(seed, f"values {index}")))
                _rotate_values(part, plan, values[-1])
    return {
        "seed": seed,
        "hidden_size": residual.size,
        "head_dim": values[0].size if values else None,
        "hadamard": residual.exact and all(matrix.exact for matrix in values),
        "head_untied": tied,
        "logits_difference": _check(model, plan, before),
    }


def _rotate_block(part: _Part, plan: _Plan, residual: Hadamard) -> None:
    """Rotate what a block reads from the residual stream and adds to it."""
    for norm, readers in part.norms:
        _fold(norm, readers, plan.shift, residual)
    for weight, bias in part.writers:
        _rotate_outputs(weight, residual)
        if bias is not None:
            bias.data.copy_(residual.apply(bias.data))


def _rotate_inputs(weight: nn.Parameter, matrix: Hadamard, gain: Tensor | None = None) -> None:
    """Rotate the inputs of a weight ``[..., out, in]``, after multiplying them by a gain."""
    pieces = weight.data if weight.dim() == 3 else weight.data.split(ROWS)
    for piece in pieces:
        value = piece.double() if gain is None else piece.double() * gain
        piece.copy_(matrix.apply(value))


def _rotate_outputs(weight: nn.Parameter, matrix: Hadamard) -> None:
    """Rotate the outputs of a weight ``[..., out, in]``."""
    pieces = weight.data if weight.dim() == 3 else weight.data.split(ROWS, dim=1)
    for piece in pieces:
        piece.copy_(matrix.apply(piece.t()).t())


def _fold(
    norm: nn.Parameter, readers: tuple[nn.Parameter, ...], shift: float, matrix: Hadamard
) -> None:
    """Move the gain of a norm into its readers, whose inputs are rotated."""
    gain = norm.data.double() + shift
    for weight in readers:
        _rotate_inputs(weight, matrix, gain.to(weight.device))
    norm.data.fill_(1.0 - shift)


def _rotate_values(part: _Part, plan: _Plan, matrix: Hadamard) -> None:
    """Rotate the values of every key/value head, and back in all query heads that receive them."""
    rows = plan.kv_heads * matrix.size
    weight, bias = part.values.weight.data[-rows:], part.values.bias
    heads = weight.reshape(plan.kv_heads, matrix.size, -1).transpose(1, 2)
    weight.copy_(matrix.apply(heads).transpose(1, 2).reshape(weight.shape))
    if bias is not None:
        last = bias.data[-rows:]
        last.copy_(matrix.apply(last.reshape(-1, matrix.size)).reshape(-1))
    output = part.output.weight.data
    output.copy_(matrix.apply(output.reshape(-1, plan.heads, matrix.size)).reshape(output.shape))


def _derive(seed: int, use: str) -> int:
    hashed = hashlib.sha256(f"rotation {seed} {use}".encode()).digest()
    return int.from_bytes(hashed[:8], "big") >> 1


def _probe(model: nn.Module, plan: _Plan) -> Tensor:
    """Return the logits of a few tokens, ``[tokens, vocabulary]``, float32."""
    generator = torch.Generator().manual_seed(0)
    rows = plan.embeddings.weight.shape[0]
    ids = torch.randint(0, rows, (1, PROBE_TOKENS), generator=generator)
    output = model(input_ids=ids.to(execution_device(plan.embeddings)), use_cache=False)
    logits: Tensor = output.logits[0].float()
    return logits


def _check(model: nn.Module, plan: _Plan, before: Tensor) -> float:
    difference = (_probe(model, plan) - before).norm(dim=1) / before.norm(dim=1).clamp(min=1e-30)
    dtype = plan.embeddings.weight.dtype
    if dtype == torch.float32:
        found, tolerance = float(difference.max()), FLOAT32_TOLERANCE
    else:
        found = float(difference.median())
        tolerance = max(FLOAT32_TOLERANCE, ROUNDINGS * torch.finfo(dtype).eps)
    if not found <= tolerance:
        raise NumericalError(
            type(model).__name__,
            "rotation",
            f"the logits change by {found:.2g}, more than {tolerance:.2g}",
            "use transform=none, or load the model in float32",
        )
    return found


def _plan(model: Any, blocks: Blocks) -> _Plan:
    config = text_config(getattr(model, "config", None))
    kind = str(getattr(config, "model_type", ""))
    if kind not in MAPPED:
        raise UnsupportedModelError(
            "transform",
            f"{type(model).__name__} ({kind}) can not be rotated",
            f"architectures: {listed(sorted(MAPPED))}; norms that subtract a mean, or stand behind "
            "a sub-layer, let no rotation pass",
            "use transform=awq, smoothquant or none",
        )
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    final = getattr(model.get_submodule(blocks.path.rpartition(".")[0]), "norm", None)
    width = getattr(embeddings, "embedding_dim", None)
    if not isinstance(embeddings, nn.Embedding) or not isinstance(head, nn.Linear):
        raise _refused(type(model).__name__, "has no plain embeddings and head")
    if not _is_norm(final, width):
        raise _refused(type(model).__name__, "has no RMSNorm behind its blocks")
    for index, block in enumerate(blocks.modules):
        _part(f"{blocks.path}.{index}", block, width)
    heads, kv_heads = int(config.num_attention_heads), key_value_heads(config)
    return _Plan(MAPPED[kind], embeddings, head, final, heads, kv_heads)


def _part(prefix: str, block: nn.Module, width: int) -> _Part:
    parameters, modules = dict(block.named_parameters()), dict(block.named_modules())
    norms = []
    for norm, names in (("input_layernorm", _QKV), ("post_attention_layernorm", _MLP)):
        readers = tuple(parameters[n] for n in names if n in parameters)
        if not readers or not _is_norm(modules.get(norm), width):
            raise _refused(prefix, f"has no RMSNorm {norm} with layers that read it")
        norms.append((parameters[f"{norm}.weight"], readers))
    names = [n for n in (*_OUTPUT, *_DOWN) if n in parameters]
    writers = [(parameters[n], parameters.get(n.removesuffix("weight") + "bias")) for n in names]
    known = {id(p) for _, readers in norms for p in readers} | {id(p) for p, _ in writers}
    other = [n for n, p in parameters.items() if p.dim() > 1 and id(p) not in known]
    other += [
        n for n, m in modules.items() if getattr(m, "is_transposed", False) and n not in other
    ]
    if other:
        raise _refused(prefix, f"has other matrices: {listed(other[:4])}")
    wrong = [p for _, readers in norms for p in readers if p.shape[-1] != width]
    wrong += [p for p, _ in writers if p.shape[-2] != width]
    values = modules.get("self_attn.v_proj") or modules.get("self_attn.qkv_proj")
    output = modules.get("self_attn.o_proj")
    if wrong or not isinstance(values, nn.Linear) or not isinstance(output, nn.Linear):
        raise _refused(prefix, "has layers of other sizes or kinds than expected")
    return _Part(tuple(norms), tuple(writers), values, output)


def _is_norm(module: Any, width: int | None) -> bool:
    """Tell whether a module is a norm that subtracts no mean and adds no bias."""
    weight = getattr(module, "weight", None)
    plain = not isinstance(module, nn.LayerNorm) and getattr(module, "bias", None) is None
    return isinstance(weight, nn.Parameter) and plain and weight.shape == (width,)


def _refused(name: str, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "transform",
        f"{name} {what}",
        "models made as the library makes them",
        "use transform=none",
    )
