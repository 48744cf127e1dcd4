"""Record how a model calls its blocks, so that each block can be replayed by itself.

The arguments of a block (masks, rotary tables, position ids, whatever the architecture passes) do
not depend on the hidden states of the blocks before it. So the model runs once with every block
replaced by the identity: that is nearly free, records the arguments of *every* block (they differ
between sliding and full attention) and never runs the output head.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lm_calib_plugin.engine.batches import BlockCall, Chunk
from lm_calib_plugin.engine.discovery import Blocks
from lm_calib_plugin.errors import UnsupportedModelError
from lm_calib_plugin.placement import execution_device

_CALL = ("forward", "_forward_hooks", "_forward_pre_hooks")


class _Stop(BaseException):
    """Ends a forward pass on purpose. Private, so that nothing else can catch it by accident."""


def forward_hidden(output: Any) -> Tensor:
    """Return the hidden states of what a block returned: a tensor, or the first of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def replay(block: nn.Module, call: BlockCall, hidden: Tensor) -> Tensor:
    """Run one block on ``hidden`` (``[batch, length, hidden]``) with its recorded arguments.

    Hidden states that wait elsewhere go to where the block computes.
    """
    return called(block, call, hidden.to(execution_device(block)))


def called(block: Callable[..., Any], call: BlockCall, hidden: Tensor) -> Tensor:
    """Call a function of the hidden states in the place of a block, as :func:`replay` does."""
    args, kwargs = list(call.args), dict(call.kwargs)
    if isinstance(call.position, int):
        args[call.position] = hidden
    else:
        kwargs[call.position] = hidden
    return forward_hidden(block(*args, **kwargs))


class Recorder:
    """Records the block calls of one model.

    Parameters
    ----------
    model, blocks
        The model and its decoder blocks.
    device
        Where inputs go.
    """

    def __init__(self, model: nn.Module, blocks: Blocks, device: torch.device) -> None:
        self.model, self.blocks, self.device = model, blocks, device
        self.templates: list[Any] = []
        self._seen: list[Tensor] = []

    def inputs(self, chunk: Chunk) -> dict[str, Any]:
        """Return the keyword arguments of the model's forward for a chunk."""
        mask = torch.ones_like(chunk.ids) if chunk.mask is None else chunk.mask
        return {
            "input_ids": chunk.ids.to(self.device),
            "attention_mask": mask.to(self.device),
            "use_cache": False,
        }

    def probe(self, chunk: Chunk) -> None:
        """Learn what blocks return, and make sure that replaying them gives the model's result.

        Raises
        ------
        UnsupportedModelError
            When the replayed blocks do not reproduce the hidden states of the whole model.
        """
        outputs: list[Any] = []
        hooks = [
            block.register_forward_hook(lambda _m, _a, output: outputs.append(output))
            for block in self.blocks.modules
        ]
        try:
            self.model(**self.inputs(chunk))
        finally:
            for hook in hooks:
                hook.remove()
        if len(outputs) != len(self.blocks):
            raise UnsupportedModelError(
                "model",
                f"{len(outputs)} block calls in one forward pass of {len(self.blocks)}",
                "models that call every block once",
            )
        self.templates = outputs
        self.record(chunk)
        hidden = chunk.hidden
        assert hidden is not None
        for block, call in zip(self.blocks.modules, chunk.calls, strict=True):
            hidden = replay(block, call, hidden)
        whole = forward_hidden(outputs[-1])
        close = torch.allclose(hidden.float(), whole.float(), rtol=1e-2, atol=1e-3)
        if not close and bool(whole.isfinite().all()):
            worst = float((hidden.float() - whole.float()).abs().max())
            raise UnsupportedModelError(
                "model",
                f"the blocks of {type(self.model).__name__}, replayed one by one, do not "
                f"reproduce the model (largest difference {worst:.3g})",
                "models whose blocks depend on nothing but their arguments",
            )

    def record(self, chunk: Chunk) -> None:
        """Fill ``chunk.calls``, and ``chunk.hidden`` with the input of the first block if unset."""
        calls: list[BlockCall] = []

        def visit(index: int, call: BlockCall, hidden: Tensor) -> Any:
            if index == 0 and chunk.hidden is None:
                chunk.hidden = hidden.detach().clone()
            calls.append(self._shared(call))
            if index == len(self.blocks) - 1:
                raise _Stop
            return self._like(index, hidden)

        self._run_stubbed(chunk, visit)
        chunk.calls = calls

    def forget(self) -> None:
        """Let go of shared arguments; those still in use stay with their calls."""
        self._seen.clear()

    def after_blocks(self, chunk: Chunk, module: nn.Module) -> Tensor:
        """Return what ``module`` (the output head) receives when the blocks end with
        ``chunk.hidden``; shape ``[batch, length, in]``."""
        received: list[Tensor] = []

        def take(_module: nn.Module, args: tuple[Any, ...]) -> None:
            received.append(args[0])
            raise _Stop

        def visit(index: int, call: BlockCall, hidden: Tensor) -> Any:
            if index == len(self.blocks) - 1 and chunk.hidden is not None:
                return self._like(index, chunk.hidden.to(hidden.device))
            return self._like(index, hidden)

        hook = module.register_forward_pre_hook(take)
        try:
            self._run_stubbed(chunk, visit)
        finally:
            hook.remove()
        return received[0]

    def logits(self, chunk: Chunk, hidden: Tensor) -> Tensor:
        """Return the logits of the model when the blocks end with ``hidden``.

        Shape ``[batch, length, vocabulary]``; everything behind the blocks is run, scaling and
        capping of logits too.
        """
        last = len(self.blocks) - 1

        def visit(index: int, call: BlockCall, received: Tensor) -> Any:
            return self._like(index, hidden.to(received.device) if index == last else received)

        with self._stubs(visit):
            output = self.model(**self.inputs(chunk))
        found: Tensor = output.logits
        return found

    def _run_stubbed(self, chunk: Chunk, visit: Callable[[int, BlockCall, Tensor], Any]) -> None:
        with self._stubs(visit), contextlib.suppress(_Stop):
            self.model(**self.inputs(chunk))

    @contextlib.contextmanager
    def _stubs(self, visit: Callable[[int, BlockCall, Tensor], Any]) -> Iterator[None]:
        """Replace the forward of every block, hooks included, since replaying runs them again.

        Instance attributes are put back as they were.
        """
        before = [
            {name: block.__dict__.get(name) for name in _CALL} for block in self.blocks.modules
        ]
        try:
            for index, block in enumerate(self.blocks.modules):
                block._forward_hooks, block._forward_pre_hooks = OrderedDict(), OrderedDict()
                block.forward = _stub(index, block, visit)  # type: ignore[method-assign]
            yield
        finally:
            for block, attributes in zip(self.blocks.modules, before, strict=True):
                for name, value in attributes.items():
                    block.__dict__.pop(name, None)
                    if value is not None:
                        block.__dict__[name] = value

    def _like(self, index: int, hidden: Tensor | None) -> Any:
        template = self.templates[index]
        if isinstance(template, Tensor):
            return hidden
        return (hidden, *template[1:])

    def _shared(self, call: BlockCall) -> BlockCall:
        """Keep one copy of tensors that are equal between blocks and chunks."""
        return BlockCall(
            tuple(_mapped(a, self._intern) for a in call.args),
            {k: _mapped(v, self._intern) for k, v in call.kwargs.items()},
            call.position,
        )

    def _intern(self, tensor: Tensor) -> Tensor:
        for known in self._seen:
            if known is tensor:
                return known
        for known in self._seen:
            if (
                known.shape == tensor.shape
                and known.dtype == tensor.dtype
                and known.device == tensor.device
                and torch.equal(known, tensor)
            ):
                return known
        self._seen.append(tensor)
        return tensor


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(v, change) for v in value)
    if type(value) is dict:
        return {k: _mapped(v, change) for k, v in value.items()}
    return value


def _stub(
    index: int, block: nn.Module, visit: Callable[[int, BlockCall, Tensor], Any]
) -> Callable[..., Any]:
    name = next(p for p in inspect.signature(type(block).forward).parameters if p != "self")

    def forward(*args: Any, **kwargs: Any) -> Any:
        if args:
            return visit(index, BlockCall((None, *args[1:]), kwargs, 0), args[0])
        rest = {k: v for k, v in kwargs.items() if k != name}
        return visit(index, BlockCall((), rest, name), kwargs[name])

    return forward
