"""Whether a model that was loaded is the one that its folder describes: counted, not believed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lm_calib_plugin import engine
from lm_calib_plugin.engine.activations import QUANTIZER
from lm_calib_plugin.errors import CalibError
from lm_calib_plugin.guard import left_as_found
from lm_calib_plugin.quantization.activations import ActivationQuantizer
from lm_calib_plugin.recipe import Recipe

DENSE = "dense"


def compare_with_record(
    model: Any,
    recipe: Recipe,
    facts: Mapping[str, Any],
    report: Mapping[str, Any],
    stored_dtype: str | None,
) -> str:
    """Compare a loaded model with what was evaluated.

    The digest of its weights has to be that of the evaluated model, with what is known of the
    rounding of inputs; zeros of every layer are counted again. In another dtype than the stored
    one the digest says nothing, and zeros may only have become more.

    Parameters
    ----------
    model
        As plain transformers loaded it. One token goes through a packed one: its weights unfold
        then.
    facts, report
        Of the record, and the content of ``report.json``.
    stored_dtype
        What ``config.json`` says.

    Returns
    -------
    str
        What was found, for people.

    Raises
    ------
    CalibError
        When the weights are not those that the record describes.
    """
    if any(p.device.type == "meta" for p in model.parameters()):
        return "weights not compared, some are offloaded"
    if facts.get("format") != DENSE:
        _unfold(model)
    weights = _weights(model)
    if weights is None:
        return "weights not compared, they stay packed"
    cast = str(model.dtype).removeprefix("torch.") != str(stored_dtype).removeprefix("torch.")
    zeros = _count_zeros(weights, report, exactly=not cast)
    if cast:
        return f"cast to {model.dtype}, so only zeros were compared ({zeros})"
    inputs = {} if facts.get("format") == DENSE else _inputs(recipe, report, weights)
    evaluated = _without_added(weights, facts.get("added") or [])
    expected = facts.get("weights_digest")
    if engine.weights_digest(_Described(evaluated, inputs)) != expected:
        raise _other(f"their digest is not {str(expected)[:12]}")
    return f"weights are those that were evaluated, {zeros} zeros counted"


def _without_added(weights: dict[str, Tensor], added: Any) -> dict[str, Tensor]:
    """Return the weights without the zeros that an export put where biases were missing."""
    if not isinstance(added, list):
        raise _other("the record does not say by name what was added")
    for name in added:
        if name not in weights or bool(weights[name].any()):
            raise _other(f"{name} was added as zeros")
    return {name: w for name, w in weights.items() if name not in added}


class _Described(nn.Module):
    """Weights and quantizers under their names, as a model has them."""

    def __init__(self, weights: dict[str, Tensor], inputs: dict[str, ActivationQuantizer]) -> None:
        super().__init__()
        self._weights, self._inputs = weights, inputs

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """Yield the weights."""
        yield from self._weights.items()

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        """Yield the quantizers."""
        for name, quantizer in self._inputs.items():
            yield f"{name}.{QUANTIZER}", quantizer


def _unfold(model: Any) -> None:
    device = model.get_input_embeddings().weight.device
    with left_as_found(model):
        model(torch.zeros((1, 1), dtype=torch.long, device=device), use_cache=False)


def _weights(model: Any) -> dict[str, Tensor] | None:
    """Return the parameters that the model has without packing; None where some stay packed."""
    found = dict(model.named_parameters())
    if getattr(model.config, "quantization_config", None) is None:
        return found
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with left_as_found(model), torch.device("meta"):
        names = dict(type(model)(config).named_parameters())
    state = model.state_dict(keep_vars=True)
    if not names.keys() <= state.keys():
        return None
    return {name: state[name].detach() for name in names}


def _inputs(
    recipe: Recipe, report: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> dict[str, ActivationQuantizer]:
    """Return what rounded the inputs of the evaluated model, by layer."""
    spec = recipe.make_method().activations
    found: dict[str, ActivationQuantizer] = {}
    for row in [] if spec is None else _rows(report):
        name, limit = row["name"], row.get("input_limit")
        if limit is not None:
            limit = spec.storable(limit, weights[f"{name}.weight"].dtype)
        found[name] = ActivationQuantizer(spec, limit)
    return found


def _count_zeros(weights: dict[str, Tensor], report: Mapping[str, Any], exactly: bool) -> int:
    total = 0
    for row in _rows(report):
        weight = weights.get(f"{row['name']}.weight")
        if weight is None:
            continue  # part of a fused parameter, which the digest covers
        zeros = weight.numel() - int(weight.count_nonzero())
        said = round(row["removed"] * weight.numel())
        if zeros < said or (exactly and zeros != said):
            raise _other(f"{row['name']} has {zeros} zeros, and the report says {said}")
        total += zeros
    return total


def _rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list((report.get("table") or {}).get("layers") or [])


def _other(what: str) -> CalibError:
    return CalibError(
        f"The files are as they were written, but the weights loaded from them are not those that "
        f"were evaluated: {what}. Load with the versions that the model card names."
    )
