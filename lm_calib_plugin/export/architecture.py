"""The configuration that describes a compressed model, or the refusal when none does."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lm_calib_plugin.errors import UnsupportedModelError, listed
from lm_calib_plugin.guard import random_state_untouched

CAST = "load a model with dtype=, not .to(dtype)"
# Switches by which configurations give layers a bias.
BIASES = ("attention_bias", "mlp_bias")


def plain_config(model: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return a configuration that builds the model, and tensors that it has beside the model's.

    Where compression gave biases to some layers, the configuration gets the switch that gives
    them to all of a kind; those that had none get zeros, which changes nothing.

    Returns
    -------
    config
        A copy; the model keeps its own.
    added
        Zero biases by name.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "_name_or_path"):
        config._name_or_path = ""  # a published folder tells no local path
    state = model.state_dict()
    extra = state.keys() - _expected(model, config).keys()
    if not extra or not all(name.endswith(".bias") for name in extra):
        return config, {}
    for switch in BIASES:
        if getattr(config, switch, None) is False:
            setattr(config, switch, True)
            if not extra & _expected(model, config).keys():
                setattr(config, switch, False)
    added = {}
    for name, like in _expected(model, config).items():
        if name not in state and name.endswith(".bias"):
            weight = state[f"{name.removesuffix('bias')}weight"]
            added[name] = torch.zeros(like.shape, dtype=weight.dtype, device=weight.device)
    return config, added


def described(model: Any, config: Any, added: dict[str, Tensor]) -> None:
    """Refuse a model that its configuration does not build.

    Raises
    ------
    UnsupportedModelError
        Names tensors that would be missing, left over, or of another shape.
    """
    expected = {n: tuple(t.shape) for n, t in _expected(model, config).items()}
    state = {n: tuple(t.shape) for n, t in {**model.state_dict(), **added}.items()}
    wrong = sorted(n for n in {*expected, *state} if expected.get(n) != state.get(n))
    if not wrong:
        return
    raise UnsupportedModelError(
        "export",
        f"the configuration of {type(model).__name__} does not build the compressed model: "
        f"{len(wrong)} tensors differ ({listed(wrong[:3])})",
        "models that plain transformers builds from config.json",
    )


def _expected(model: Any, config: Any) -> dict[str, Tensor]:
    """Return the state, without data, of a model that is built from a configuration."""
    with random_state_untouched(), torch.device("meta"):
        skeleton: nn.Module = type(model)(copy.deepcopy(config))
    return skeleton.state_dict()


def check_biases(model: Any, layers: list[str]) -> None:
    """Refuse, before any work, layers that no configuration of the model gives a bias.

    Raises
    ------
    UnsupportedModelError
        Names the first one.
    """
    config = copy.deepcopy(model.config)
    for switch in BIASES:
        if getattr(config, switch, None) is False:
            setattr(config, switch, True)
    there = _expected(model, config)
    lacking = [name for name in layers if f"{name}.bias" not in there]
    if lacking:
        raise UnsupportedModelError(
            "export",
            f"the method gives {lacking[0]} a bias, and {type(model).__name__} has none there",
            "models whose output projections may have one, such as Llama and OPT",
            "evaluate it without exporting",
        )


def check_built(model: Any) -> None:
    """Refuse, before any work, a model that its configuration does not give back.

    Raises
    ------
    UnsupportedModelError
        For tensors that differ, and for rotary frequencies that were cast with the weights.
    """
    described(model, model.config, {})
    stored = model.state_dict()
    with random_state_untouched(), torch.device("meta"):
        expected = dict(type(model)(copy.deepcopy(model.config)).named_buffers())
    for name, buffer in model.named_buffers():
        other = expected.get(name)
        if name not in stored and other is not None and other.dtype != buffer.dtype:
            raise UnsupportedModelError(
                "export",
                f"{name} is in {str(buffer.dtype).removeprefix('torch.')}, and "
                f"{str(other.dtype).removeprefix('torch.')} in a loaded model",
                "models that compute what their folder gives",
                CAST,
            )
