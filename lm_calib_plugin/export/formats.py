"""Which format a recipe is stored in, and what no format holds: said before any work is done."""

from __future__ import annotations

from typing import Any

from torch import nn

from lm_calib_plugin import engine
from lm_calib_plugin.checks import overridden
from lm_calib_plugin.engine.width import find_units
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.export.architecture import check_biases
from lm_calib_plugin.export.quantized import (
    flattened_inputs,
    module_refusal,
    packs_weights,
    refusal,
)
from lm_calib_plugin.guard import left_as_found
from lm_calib_plugin.joint import quantizer_of
from lm_calib_plugin.method import Method
from lm_calib_plugin.recipe import Recipe

DENSE, PACKED = "dense", "compressed-tensors"
PLAIN = "models that plain transformers can load and run as they were evaluated"


def check_export(recipe: Recipe, asked: str = "auto") -> str:
    """Return the format a recipe is stored in: ``dense`` or ``compressed-tensors``.

    Only the recipe is looked at, so this runs before anything is loaded.

    Parameters
    ----------
    asked
        ``auto``, ``dense`` or ``compressed-tensors``.

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
        if asked == PACKED:
            raise UserError(
                "export_format",
                f"{PACKED} holds quantized weights, and `{recipe.method}` leaves numbers",
                DENSE,
                f"export_format={DENSE}",
            )
        return DENSE
    if asked == DENSE:
        _check_dense(method)
        return DENSE
    reason = refusal(levels, method.activations)
    quantizer = quantizer_of(method)
    if reason is None and levels is not None and quantizer.rounding.real_zeros:
        reason = f"`{method.label}` has zero points between levels"
    if reason is not None:
        raise _refused(reason, method)
    return PACKED


def check_model(model: nn.Module, recipe: Recipe, asked: str = "auto") -> str:
    """Return the format as :func:`check_export`, after a look at the layers of a loaded model.

    Raises
    ------
    UserError
        Names the first layer that the format can not hold.
    """
    found = check_export(recipe, asked)
    method = recipe.make_method()
    blocks = engine.find_blocks(model, recipe.block_path)
    if method.scope == "model" and method.unit == "width":
        check_biases(model, [group.output.name for group in find_units(blocks)])
    if found == DENSE:
        return found
    layers, _ = engine.select_layers(model, blocks, recipe.targets, recipe.ignore, recipe.untie)
    treated: dict[str, Any] = overridden(method, layers, recipe)
    for layer in layers:
        own = treated.get(layer.name, method)
        levels = _levels(own)
        reason = module_refusal(layer.module, packs_weights(levels, own.activations))
        reason = reason or refusal(levels, own.activations, layer.parameter.dtype)
        if reason is not None:
            raise _refused(f"{layer.name}: {reason}", own)
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


def _refused(reason: str, method: Method) -> UserError:
    if method.activations is not None:
        return UserError("export_format", f"{PACKED}: {reason}", PLAIN, "see docs/export.md")
    return UserError(
        "export_format",
        f"{PACKED}: {reason}",
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
