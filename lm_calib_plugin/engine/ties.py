"""An output head and input embeddings that share one weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lm_calib_plugin.engine.discovery import text_config
from lm_calib_plugin.engine.offloaded import kind_of_home
from lm_calib_plugin.engine.residence import give_own_home, value_of
from lm_calib_plugin.placement import is_meta, offload_hook


def is_tied(model: Any) -> bool:
    """Tell whether head and embeddings share one weight."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    ours, theirs = (getattr(m, "weight", None) for m in (model.get_input_embeddings(), head))
    if ours is None or theirs is None:
        return False
    if is_meta(ours) or is_meta(theirs):
        # Tensors without data say nothing: each is made anew after every forward pass.
        return any(model.get_submodule(n.rpartition(".")[0]) is head for n in _second_names(model))
    return ours is theirs


def parameters(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Return by name what gives the value of each parameter; those that are away on the CPU.

    The names are those of ``named_parameters`` of the model in memory: of tied weights the first.
    """
    found: dict[str, Callable[[], Tensor]] = {}
    named = dict(model.named_parameters())
    away = {name for name, parameter in named.items() if is_meta(parameter)}
    second = _second_names(model) if away else ()
    for name, parameter in named.items():
        path, _, attribute = name.rpartition(".")
        if name not in away:
            found[name] = parameter.detach
        elif name not in second:
            found[name] = partial(value_of, model.get_submodule(path), attribute)
    return found


def values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of every parameter, as :func:`parameters` gives them."""
    for name, value in parameters(model).items():
        yield name, value()


def whereabouts(model: nn.Module) -> dict[str, int]:
    """Return how many bytes of parameters are at home where: ``cpu``, ``disk``, or a device."""
    found: dict[str, int] = {}
    for name in parameters(model):
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        parameter = getattr(owner, attribute)
        hook = offload_hook(owner)
        away = is_meta(parameter) and hook is not None
        place = kind_of_home(hook, attribute) if away else str(parameter.device)
        found[place] = found.get(place, 0) + parameter.numel() * parameter.element_size()
    return found


def untie_head(model: Any) -> Callable[[], None]:
    """Give a head that is tied to the embeddings a weight of its own.

    Returns
    -------
    callable
        Ties them again; for an error that comes before the weight is used.
    """
    head, old = model.get_output_embeddings(), model.get_output_embeddings().weight
    configs = [model.config, text_config(model.config)]
    flags = [getattr(config, "tie_word_embeddings", None) for config in configs]
    back: Callable[[], None] = lambda: None  # noqa: E731
    if is_meta(old):
        head.weight = nn.Parameter(torch.empty_like(old), requires_grad=old.requires_grad)
        back = give_own_home(head, "weight")
    else:
        head.weight = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
    for config in configs:
        config.tie_word_embeddings = False

    def tie() -> None:
        back()
        head.weight = old
        for config, flag in zip(configs, flags, strict=True):
            config.tie_word_embeddings = flag

    return tie


def _second_names(model: Any) -> list[str]:
    """Return names of parameters that are away, and are those of another, earlier name, too."""
    config = getattr(model, "config", None)
    if not any(getattr(c, "tie_word_embeddings", False) for c in (config, text_config(config))):
        return []
    declared = getattr(model, "all_tied_weights_keys", None) or {}
    order = {name: p for name, p in model.named_parameters(remove_duplicate=False)}
    places = {name: place for place, name in enumerate(order)}
    pairs = [pair for pair in declared.items() if all(name in places for name in pair)]
    second = [max(pair, key=places.__getitem__) for pair in pairs]
    return [name for name in second if is_meta(order[name])]
