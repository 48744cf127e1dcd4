"""Watch the inputs of the layers of one block, each distinct input tensor once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from lm_calib_plugin.engine.batches import BlockCall, Chunk
from lm_calib_plugin.engine.capture import _Stop, replay
from lm_calib_plugin.engine.layers import TargetLayer
from lm_calib_plugin.errors import CalibError

# Takes a group number, input rows [tokens, in], and the row of the chunk each belongs to [tokens].
Listener = Callable[[int, Tensor, Tensor], None]


class InputGroups:
    """Layers of one block, grouped by the input tensor that they share.

    ``groups[i]`` are layers that receive one and the same tensor; ``leaders[i]`` is the module
    whose call is watched. Which layers share an input is found by running the block once on a
    probe; layers that the probe does not reach stand alone.
    """

    def __init__(
        self, block: nn.Module, layers: Sequence[TargetLayer], call: BlockCall, hidden: Tensor
    ) -> None:
        self.block = block
        self.groups: list[list[TargetLayer]] = []
        self.leaders: list[nn.Module] = []
        linear = [layer for layer in layers if layer.expert is None]
        order, shared = _trace(block, linear, call, hidden)
        self.order = order
        for layer in linear:
            key = shared.get(id(layer.module))
            place = [i for i, m in enumerate(self.leaders) if key and shared.get(id(m)) == key]
            if place:
                self.groups[place[0]].append(layer)
            else:
                self.groups.append([layer])
                self.leaders.append(layer.module)
        for layer in layers:
            if layer.expert is not None:
                self.groups.append([layer])
                self.leaders.append(layer.module)
        unseen = any(id(m) not in shared for m in self.leaders if isinstance(m, nn.Linear))
        calls = [i for i, m in enumerate(self.leaders) if id(m) in order]
        # The module whose input comes last; nothing after it has to run.
        self.last = None
        if calls and not unseen:
            self.last = self.leaders[max(calls, key=lambda i: order[id(self.leaders[i])])]

    def steps(self) -> list[list[TargetLayer]]:
        """Return the layers in the order in which their inputs arise, those of one input together.

        Second projections of experts come after first ones; layers that the probe did not reach
        come last.
        """
        found: dict[tuple[int, bool], list[TargetLayer]] = {}
        for group, leader in zip(self.groups, self.leaders, strict=True):
            place = self.order.get(id(leader), len(self.order))
            found.setdefault((place, group[0].part == "down"), []).extend(group)
        return [found[key] for key in sorted(found)]

    def watch(self, chunk: Chunk, index: int, listen: Listener, whole: bool) -> Tensor | None:
        """Run the block on a chunk and hand every distinct input to ``listen(group, rows)``.

        Parameters
        ----------
        chunk
            Its ``hidden`` and the recorded call number ``index`` are used.
        listen
            Receives the group number, the input rows ``[tokens, in]`` that count, and the row of
            the chunk that each belongs to, ``[tokens]``.
        whole
            Whether the block's output is wanted; else the pass ends at the last input.

        Returns
        -------
        The output hidden states, or None when the pass ended early.
        """
        valid, owners = chunk.counted(), chunk.owners()
        hooks = []
        experts: dict[int, list[int]] = {}
        for number, (group, leader) in enumerate(zip(self.groups, self.leaders, strict=True)):
            if group[0].expert is not None:
                experts.setdefault(id(leader), []).append(number)
                continue
            hook = _linear_hook(number, group[0].name, valid, owners, listen)
            hooks.append(leader.register_forward_pre_hook(hook, with_kwargs=True))
        for numbers in experts.values():
            layers = [(n, self.groups[n][0]) for n in numbers]
            hook = _experts_hook(layers, valid, owners, listen)
            hooks.append(self.leaders[numbers[0]].register_forward_pre_hook(hook, with_kwargs=True))
        if not whole and self.last is not None:
            hooks.append(self.last.register_forward_pre_hook(_stop))
        try:
            assert chunk.hidden is not None
            return replay(self.block, chunk.calls[index], chunk.hidden)
        except _Stop:
            return None
        finally:
            for hook in hooks:
                hook.remove()


def _stop(_module: nn.Module, _args: Any) -> None:
    raise _Stop


def _trace(
    block: nn.Module, layers: Sequence[TargetLayer], call: BlockCall, hidden: Tensor
) -> tuple[dict[int, int], dict[int, tuple[Any, ...]]]:
    """Return call order and input identity of each module, by ``id(module)``."""
    order: dict[int, int] = {}
    shared: dict[int, tuple[Any, ...]] = {}
    alive: list[Any] = []  # inputs are kept, so that no identity is used twice

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = _first(args, kwargs)
        alive.append(x)
        order[id(module)] = len(order)
        shared[id(module)] = (id(x), x._version)

    watched = {id(m): m for m in [layer.module for layer in layers]}
    watched |= {id(m): m for m in block.modules() if hasattr(m, "is_transposed")}
    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in watched.values()]
    try:
        replay(block, call, hidden)
    finally:
        for hook in hooks:
            hook.remove()
    return order, shared


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _linear_hook(
    number: int, name: str, valid: Tensor | None, owners: Tensor, listen: Listener
) -> Any:
    def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
        x = _first(args, kwargs)
        rows = x.reshape(-1, x.shape[-1])
        if valid is not None:
            if rows.shape[0] != valid.numel():
                raise CalibError(
                    f"{name} sees {rows.shape[0]} rows of {valid.numel()} positions: pads can not "
                    "be told from tokens there; use pack=concat or pack=longdoc."
                )
            rows = rows[valid.to(rows.device)]
        listen(number, rows, owners)

    return hook


def _experts_hook(
    layers: Sequence[tuple[int, TargetLayer]],
    valid: Tensor | None,
    owners: Tensor,
    listen: Listener,
) -> Any:
    """Watch a module of fused experts: each expert sees only the tokens routed to it."""

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        names = ("hidden_states", "top_k_index", "top_k_weights")
        given = dict(zip(names, args, strict=False)) | kwargs
        hidden = given["hidden_states"].reshape(-1, given["hidden_states"].shape[-1])
        chosen = given["top_k_index"].reshape(hidden.shape[0], -1)
        if valid is not None:
            real = valid.to(hidden.device)
            hidden, chosen = hidden[real], chosen[real]
        inputs: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for number, layer in layers:
            expert = layer.expert
            assert expert is not None
            if expert not in inputs:
                routed = (chosen == expert).any(dim=1)
                rows = hidden[routed]
                whose = owners[routed.to(owners.device)]
                inputs[expert] = (rows, _between(module, expert, rows), whose)
            first, second, whose = inputs[expert]
            listen(number, second if layer.part == "down" else first, whose)

    return hook


def _between(module: Any, expert: int, rows: Tensor) -> Tensor:
    """Return the input of the second projection of one expert, ``[tokens, intermediate]``."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    weight = getattr(module, first)[expert]
    weight = weight.t() if module.is_transposed else weight
    bias = getattr(module, f"{first}_bias")[expert] if module.has_bias else None
    out = functional.linear(rows, weight, bias)
    return module._apply_gate(out) if module.has_gate else module.act_fn(out)
