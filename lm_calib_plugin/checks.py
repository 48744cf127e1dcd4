"""What is looked at before any work: whether a recipe, its data and a model go together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from lm_calib_plugin import engine
from lm_calib_plugin.bank.mixtures import check_mixture
from lm_calib_plugin.calibration import (
    CalibrationSet,
    stored_sets,
    tokenizer_digest,
    validate_calibration,
)
from lm_calib_plugin.errors import UserError, listed, nearest
from lm_calib_plugin.joint import quantizer_of, with_part
from lm_calib_plugin.method import Method
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.runtime import Runtime

DEFAULT_SEQLEN = 2048


def check_calibration(recipe: Recipe) -> None:
    """Check the calibration of a recipe, mixtures too, without network, data or model.

    Raises
    ------
    UserError
        For an option, file, folder, task or number of sources that cannot be used.
    """
    validate_calibration(recipe)
    check_mixture(recipe)


def sequence_length(recipe: Recipe, config: Any) -> int:
    """Return the most tokens of a calibration sequence.

    As asked, else that of ``set:DIR``, else 2048; without being asked never beyond what the model
    accepts.

    Raises
    ------
    UserError
        When more is asked, or stored in a set, than the model has positions for, or less is
        asked than a set holds.
    """
    limit = getattr(engine.text_config(config), "max_position_embeddings", None)
    sets = stored_sets(recipe)
    for stored in sets:
        if recipe.seqlen is not None:
            stored.check_length(recipe.seqlen, "seqlen")
        elif limit:
            stored.check_length(limit, "what the model accepts")
    if recipe.seqlen is None:
        wanted = max((s.stored.seqlen for s in sets), default=DEFAULT_SEQLEN)
        return min(wanted, limit or wanted)
    if limit and recipe.seqlen > limit:
        raise UserError(
            "seqlen",
            f"got {recipe.seqlen}",
            f"the model accepts {limit} positions",
            f"use seqlen<={limit}",
        )
    return recipe.seqlen


def check_layers(
    method: Method, treated: dict[str, Method], layers: Sequence[engine.TargetLayer]
) -> None:
    """Refuse layers that the method can not treat, before any data is read."""
    for layer in layers:
        treated.get(layer.name, method).check_layer(layer.name, layer.shape)
        if method.needs_bias and layer.bias is None:
            raise UserError(
                "update",
                f"{layer.name} has no bias to correct",
                "models whose layers have biases (OPT, GPT-2, Phi)",
                f"leave it out (ignore={layer.name.rsplit('.', 1)[-1]}), or use another update",
            )


def check_heldout(method: Method, recipe: Recipe, calibration: CalibrationSet | None) -> None:
    """Refuse to choose by sequences held out when there are none, before any work."""
    quantizer = quantizer_of(method)
    chooses = quantizer is not None and quantizer.uses_heldout
    if not chooses and recipe.bits_budget is None:
        return
    count = calibration.nsamples if calibration is not None else 0
    if engine.heldout_indices(count, recipe.heldout):
        return
    raise UserError(
        "heldout",
        f"{recipe.heldout:g} of {count} sequences is less than one",
        f"`{recipe.method}` with these options chooses by the error on sequences held out",
        f"for instance nsamples={2 * max(count, 10)}, or heldout=0.5",
    )


def check_whole(model: nn.Module, argument: str, what: str, fix: str = "") -> None:
    """Refuse a model with offloaded weights for something that needs them all at once.

    Raises
    ------
    UserError
        With how to load it.
    """
    if engine.is_offloaded(model):
        places = " and ".join(sorted(engine.whereabouts(model)))
        raise UserError(
            argument,
            f"{what} needs the whole model on its devices, and its weights are on {places}",
            fix or "load it whole: drop parallelize and device_map, or raise the memory limits",
        )


def check_offloaded(
    model: nn.Module, recipe: Recipe, runtime: Runtime, layers: Sequence[engine.TargetLayer]
) -> None:
    """Refuse, for a model with offloaded weights, what is not done a block at a time.

    Raises
    ------
    UserError
        For structural methods, packed execution and ``cache``, and for an offload folder without
        room for the compressed weights.
    """
    if not engine.is_offloaded(model):
        return
    method = recipe.make_method()
    if method.scope == "model":
        check_whole(model, "method", f"`{recipe.method}`")
    if recipe.execution == "packed":
        check_whole(model, "execution", "packed", "drop execution=packed")
    if runtime.cache:
        check_whole(model, "cache", "a cache of compressed models", "drop `cache`")
    engine.check_room([model] if method.transform is not None else [x.module for x in layers])


def check_tokenizer(calibration: CalibrationSet, tokenizer: Any) -> None:
    """Refuse a calibration set that was made with another tokenizer."""
    mine = tokenizer_digest(tokenizer)
    if calibration.tokenizer and calibration.tokenizer != mine:
        raise UserError(
            "calibration",
            f"the set was made with tokenizer {calibration.tokenizer}, this model has {mine}",
            "token ids mean something else to another tokenizer",
            "build it again with this model's tokenizer",
        )


def vocab_size(model: nn.Module) -> int:
    """Return the number of rows of the input embeddings."""
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def overridden(
    method: Method, layers: Sequence[engine.TargetLayer], recipe: Recipe
) -> dict[str, Method]:
    """Return the method of every layer that a pattern of ``overrides`` names."""
    overrides = recipe.overrides or {}
    names = [layer.name for layer in layers]
    for pattern in overrides:
        if not any(engine.matches(name, pattern) for name in names):
            tails = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)
            raise UserError(
                "overrides",
                f"pattern `{pattern}` matched 0 of {len(names)} layers",
                nearest(pattern.strip("*."), tails),
                f"names: {listed(tails)}",
            )
    found: dict[str, Method] = {}
    for name in names:
        own = next((o for p, o in overrides.items() if engine.matches(name, p)), None)
        if own is not None:
            quantizer = quantizer_of(method)
            assert quantizer is not None
            found[name] = with_part(method, dataclasses.replace(quantizer, **own))
    return found


def in_force_by_layer(method: Method, treated: dict[str, Method], recipe: Recipe) -> dict[str, Any]:
    """Return what the key says of layers with options of their own that differ from the others'.

    Patterns may overlap, so their order matters, and they may say what holds anyway: layers tell.
    """
    everywhere = None if recipe.bits_budget is not None else method.identity()
    own = {name: [m.revision, m.identity()] for name, m in treated.items()}
    return {name: found for name, found in own.items() if found[1] != everywhere}
