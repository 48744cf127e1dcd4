"""Which format a recipe is stored in, and what no format holds: said before any work is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lm_calib_plugin import engine
from lm_calib_plugin.checks import check_whole, overridden
from lm_calib_plugin.engine.width import find_units
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.export import check, gptq, gptq_check, quantized
from lm_calib_plugin.export.architecture import check_biases, check_built
from lm_calib_plugin.export.quantized import QuantizedLayer, flattened_inputs
from lm_calib_plugin.guard import left_as_found
from lm_calib_plugin.joint import quantizer_of
from lm_calib_plugin.method import Method
from lm_calib_plugin.recipe import Recipe

DENSE, PACKED, GPTQ = "dense", "compressed-tensors", "gptq"
PLAIN = "models that plain transformers can load and run as they were evaluated"


@dataclass(frozen=True)
class LevelFormat:
    """How levels are stored and found again.

    ``refusal`` (levels, inputs, dtype) and ``layer_refusal`` (layer, levels, inputs) return why it
    can not be done, or None; ``tensors`` what is stored instead of the weight of a layer,
    ``settings`` what ``config.json`` says of quantized and other linear layers; ``compare`` loads a
    written folder.
    """

    refusal: Callable[..., str | None]
    layer_refusal: Callable[..., str | None]
    tensors: Callable[[QuantizedLayer], dict[str, Tensor]]
    settings: Callable[[Sequence[QuantizedLayer], Sequence[str]], dict[str, Any]]
    compare: Callable[..., dict[str, Any]]
    one_kind: bool = False  # whether all layers have to be on levels of the same kind


def _packed_refusal(layer: engine.TargetLayer, levels: Any, inputs: Any) -> str | None:
    return quantized.module_refusal(layer.module, quantized.packs_weights(levels, inputs))


LEVELS = {
    PACKED: LevelFormat(
        quantized.refusal,
        _packed_refusal,
        quantized.layer_tensors,
        quantized.quantization_config,
        check.compare_with_folder,
    ),
    GPTQ: LevelFormat(
        gptq.refusal,
        lambda layer, _levels, _inputs: gptq.layer_refusal(layer),
        gptq.layer_tensors,
        gptq.quantization_config,
        gptq_check.compare_with_folder,
        one_kind=True,
    ),
}


def check_export(recipe: Recipe, asked: str = "auto") -> str:
    """Return the format a recipe is stored in: ``dense``, ``compressed-tensors`` or ``gptq``.

    Only the recipe is looked at, so this runs before anything is loaded.

    Parameters
    ----------
    asked
        ``auto``, ``dense``, ``compressed-tensors`` or ``gptq``.

    Raises
    ------
    UserError
        When the format can not hold the result, with what can.
    """
    method = recipe.make_method()
    if method.scope == "model":
        _check_structure(method)
    if method.kv_bits is not None:
        raise UserError(
            "kv_bits",
            "keys and values are rounded while the model runs, which no folder can say",
            PLAIN,
            "export without kv_bits",
        )
    levels = _levels(method)
    if levels is None and method.activations is None:
        if asked in LEVELS:
            raise UserError(
                "export_format",
                f"{asked} holds quantized weights, and `{recipe.method}` leaves numbers",
                DENSE,
                f"export_format={DENSE}",
            )
        return DENSE
    if asked == DENSE:
        _check_dense(method)
        return DENSE
    found = asked if asked in LEVELS else PACKED
    reason = LEVELS[found].refusal(levels, method.activations)
    quantizer = quantizer_of(method)
    if reason is None and levels is not None and quantizer.rounding.real_zeros:
        reason = f"`{method.label}` has zero points between levels"
    if reason is None and recipe.bits_budget is not None and LEVELS[found].one_kind:
        reason = f"all its layers have the same levels, and bits={recipe.bits} gives several"
    if reason is not None:
        raise _refused(found, reason, method)
    return found


def check_model(model: nn.Module, recipe: Recipe, asked: str = "auto") -> str:
    """Return the format as :func:`check_export`, after a look at the layers of a loaded model.

    Raises
    ------
    UserError
        Names the first layer that the format can not hold.
    """
    found = check_export(recipe, asked)
    check_whole(model, "export", "an export")
    check_built(model)
    method = recipe.make_method()
    blocks = engine.find_blocks(model, recipe.block_path)
    if method.scope == "model" and method.unit == "width":
        check_biases(model, [group.output.name for group in find_units(blocks)])
    if found == DENSE:
        return found
    layers, _ = engine.select_layers(model, blocks, recipe.targets, recipe.ignore, recipe.untie)
    treated: dict[str, Any] = overridden(method, layers, recipe)
    how, kinds = LEVELS[found], set()
    for layer in layers:
        own = treated.get(layer.name, method)
        levels = _levels(own)
        kinds |= set() if levels is None else {levels}
        reason = how.layer_refusal(layer, levels, own.activations)
        reason = reason or how.refusal(levels, own.activations, layer.parameter.dtype)
        if reason is None and how.one_kind and len(kinds) > 1:
            reason = "all layers have the same levels there, and this one has others"
        if reason is not None:
            raise _refused(found, f"{layer.name}: {reason}", own)
    spec = method.activations
    if spec is not None and spec.dynamic and spec.number in ("int", "fp8"):
        _check_inputs(model, [layer.name for layer in layers])
    return found


def _check_inputs(model: Any, names: list[str]) -> None:
    with left_as_found(model):
        flat = flattened_inputs(model, names)
    if flat:
        raise UserError(
            "export_format",
            f"{PACKED}: {flat[0]} receives [tokens, inputs], for which the loader takes one range "
            "for all tokens instead of one for each",
            "layers that receive [sequences, tokens, inputs], or calibrated ranges",
            f"act_dynamic=false, or ignore=*{flat[0].rpartition('.')[2]}",
        )


def _levels(method: Method) -> Any:
    quantizer = quantizer_of(method)
    return None if quantizer is None or quantizer.keeps_weights else quantizer.spec


def _check_dense(method: Method) -> None:
    if method.activations is None:
        return
    raise UserError(
        "export_format",
        f"{DENSE} holds weights alone, and the recipe rounds the inputs of layers, too",
        PACKED,
        f"export_format={PACKED}, or act_bits=16",
    )


def _refused(found: str, reason: str, method: Method) -> UserError:
    if method.activations is not None and found == GPTQ:
        return UserError(
            "export_format", f"{GPTQ}: {reason}", PACKED, f"export_format={PACKED}, or act_bits=16"
        )
    if method.activations is not None:
        return UserError("export_format", f"{found}: {reason}", PLAIN, "see docs/export.md")
    return UserError(
        "export_format",
        f"{found}: {reason}",
        f"{DENSE} stores the same weights as ordinary numbers, at the size of the base model",
        f"export_format={DENSE}",
    )


def _check_structure(method: Any) -> None:
    """Refuse what leaves a model that no configuration describes."""
    if method.unit != "depth":
        return
    kind = method.sublayer_kind
    if kind != "block":
        raise UserError(
            "sublayer",
            f"a model without some of its {kind} parts has no configuration that says so",
            "whole blocks",
            "sublayer=block",
        )
    if method.update is not None:
        raise UserError(
            "update",
            "what stands in for removed blocks is no part of the architecture",
            PLAIN,
            "update=none",
        )
