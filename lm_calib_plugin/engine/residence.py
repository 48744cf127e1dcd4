"""Weights that wait on the CPU or on a disk: brought to their device for the work on one block.

``accelerate`` brings the weights of a module for each of its forward passes and drops them
afterwards. Compression runs a block many times and changes it, so that here a whole block is
brought once, stays for the work on it, and goes back where it came from if it was changed:

- on the CPU, into the tensors that the hooks read from;
- on a disk, into new files in a folder of this process inside the offload folder, which goes when
  the model does. Checkpoints and files that were there before are only ever read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lm_calib_plugin.engine.offloaded import (
    DISK,
    NOWHERE,
    fetch,
    folder_of,
    keep_own,
    kind_of_home,
    names_at_home,
    put_away,
)
from lm_calib_plugin.errors import CalibError, UnsupportedModelError, UserError
from lm_calib_plugin.placement import is_meta, offload_hook
from lm_calib_plugin.storage import require_space


@dataclass(eq=False)
class _Guest:
    """One tensor of a module, brought from its home; ``away`` is what stood in its place."""

    module: nn.Module
    name: str
    hook: Any
    away: Tensor
    buffer: bool

    @property
    def live(self) -> Tensor:
        found: Tensor = getattr(self.module, self.name)
        return found

    def set(self, tensor: Tensor) -> None:
        table: Any = self.module._buffers if self.buffer else self.module._parameters
        table[self.name] = tensor


class Ahead:
    """Fetches the weights of the next block into pinned memory while one is in work.

    Done for weights that are to go to an accelerator; elsewhere nothing would be gained. It takes
    one more block of memory on the host, and none on the device.

    Parameters
    ----------
    everywhere
        Fetch for every device, without pinning; for tests.
    """

    def __init__(self, everywhere: bool = False) -> None:
        self._everywhere = everywhere
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[tuple[int, str], Future[Tensor]] = {}

    def fetch(self, module: nn.Module) -> None:
        """Begin to fetch the weights of a module; what else was fetched is let go."""
        self._coming = {}
        for owner in module.modules():
            hook = offload_hook(owner)
            if hook is None or not hook.offload:
                continue
            cuda = torch.device(hook.execution_device).type == "cuda"
            if not (cuda or self._everywhere):
                continue
            self._pool = self._pool or ThreadPoolExecutor(max_workers=1)
            for name in names_at_home(owner, hook):
                dtype = getattr(owner, name).dtype
                self._coming[id(owner), name] = self._pool.submit(_waiting, hook, name, dtype, cuda)

    def take(self, owner: nn.Module, name: str) -> Tensor | None:
        """Return a tensor that was fetched, None for any other."""
        coming = self._coming.pop((id(owner), name), None)
        return None if coming is None else coming.result()


def _waiting(hook: Any, name: str, dtype: torch.dtype, pinned: bool) -> Tensor:
    value = fetch(hook, name, dtype)
    return value.pin_memory() if pinned and value.device.type == "cpu" else value


@contextlib.contextmanager
def resident(
    *modules: nn.Module, changes: bool = True, ahead: Ahead | None = None
) -> Iterator[None]:
    """Have all weights of modules on the device where they compute.

    Nothing happens for those that are there anyway, so that one such context inside another is
    harmless. At the end what was changed is written where it came from; after an exception it is
    not, and what was away is what it was.

    Parameters
    ----------
    modules
        For instance a decoder block, or embeddings and head.
    changes
        Whether weights may change; else nothing is compared or written.
    ahead
        What may have been fetched before.

    Raises
    ------
    CalibError
        When changed weights can not be written.
    """
    owners = [owner for module in modules for owner in module.modules()]
    with _resident(owners, changes, ahead):
        yield


@contextlib.contextmanager
def around(model: nn.Module, blocks: nn.ModuleList) -> Iterator[None]:
    """Have what is around the blocks where it computes, such as embeddings; but not the head.

    As :func:`resident`, to look at only.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    inside = {id(module) for module in blocks.modules()} | {id(head)}
    with _resident([owner for owner in model.modules() if id(owner) not in inside], False):
        yield


@contextlib.contextmanager
def _resident(
    owners: Iterable[nn.Module], changes: bool, ahead: Ahead | None = None
) -> Iterator[None]:
    guests: list[_Guest] = []
    try:
        for owner in owners:
            hook = offload_hook(owner)
            if hook is not None and hook.offload:
                _bring(owner, hook, guests, ahead)
        yield
        for guest in guests if changes else ():
            _send_home(guest)
    finally:
        for guest in guests:
            guest.set(guest.away)
            guest.hook.offload = True


def _bring(owner: nn.Module, hook: Any, guests: list[_Guest], ahead: Ahead | None) -> None:
    """Put the weights of one module in place, and tell its hook to leave them alone."""
    here = {id(guest.away): guest.live for guest in guests}
    for name in names_at_home(owner, hook):
        away, buffer = getattr(owner, name), name in owner._buffers
        if not is_meta(away):
            continue
        if id(away) in here:  # one parameter with two names
            value = here[id(away)]
        else:
            found = None if ahead is None else ahead.take(owner, name)
            found = fetch(hook, name, away.dtype) if found is None else found
            value = found.to(torch.device(hook.execution_device), non_blocking=True)
            if not buffer:
                value = nn.Parameter(value, requires_grad=away.requires_grad)
        guest = _Guest(owner, name, hook, away, buffer)
        guests.append(guest)
        guest.set(value)
        hook.offload = False


@torch.no_grad()
def _send_home(guest: _Guest) -> None:
    live = guest.live.detach()
    if live.shape != guest.away.shape or live.dtype != guest.away.dtype:
        raise CalibError(
            f"{guest.name} of a {type(guest.module).__name__} has another shape or dtype than the "
            "weight that is offloaded. Load the model whole."
        )
    home = fetch(guest.hook, guest.name, live.dtype)
    if home.data_ptr() == live.data_ptr() and home.device == live.device:
        return  # the very tensor was changed in place
    now = live.to(home.device)
    if not torch.equal(now.view(torch.uint8), home.view(torch.uint8)):
        put_away(guest.hook, guest.name, now)


def value_of(module: nn.Module, name: str) -> Tensor:
    """Return a parameter to look at; where it is away, a copy on the CPU."""
    found: Tensor = getattr(module, name)
    if not is_meta(found):
        return found.detach()
    hook = offload_hook(module)
    if hook is None:
        raise CalibError(f"{name} of a {type(module).__name__} has no data, and nobody has it.")
    return fetch(hook, name, found.dtype)


def give_own_home(module: nn.Module, name: str) -> Callable[[], None]:
    """Let an offloaded weight be stored by itself, should it share storage with another.

    Returns
    -------
    callable
        Takes that back.
    """
    return keep_own(offload_hook(module), name)


def is_offloaded(model: nn.Module) -> bool:
    """Tell whether weights of a model are away, and brought when they are needed."""
    return any(
        is_meta(p) and offload_hook(owner) is not None
        for owner in model.modules()
        for p in owner.parameters(recurse=False)
    )


def check_residence(model: nn.Module) -> None:
    """Refuse a model with weights that can not be brought, or not be stored once they changed.

    Raises
    ------
    UnsupportedModelError, UserError
        Says which, and how to load the model.
    """
    name = type(model).__name__
    lost = []
    for path, owner in model.named_modules():
        hook = offload_hook(owner)
        if hook is not None and hook.offload and hook.place_submodules:
            raise UnsupportedModelError(
                "model",
                f"the weights of {path or name} ({type(owner).__name__}) are brought all at once",
                "weights that are offloaded module by module",
                "dispatch it without preload_module_classes",
            )
        own = owner.named_parameters(recurse=False)
        if hook is None:
            lost += [f"{path}.{n}" for n, p in own if is_meta(p)]
            continue
        for own_name in names_at_home(owner, hook):
            _check_home(hook, own_name, f"{path}.{own_name}")
    if lost:
        raise UnsupportedModelError(
            "model",
            f"{len(lost)} tensors of {name} have no data (meta), and no hook of accelerate that "
            "has it",
            f"first: {lost[0]}",
            "load it with from_pretrained",
        )


def _check_home(hook: Any, name: str, path: str) -> None:
    kind = kind_of_home(hook, name)
    if kind == NOWHERE:
        raise UnsupportedModelError(
            "model", f"{path} is offloaded to where it can not be changed", "the CPU or a disk"
        )
    if kind == DISK and folder_of(hook) is None:
        raise UserError(
            "offload_folder",
            f"missing, and {path} is read from the checkpoint, which is never changed",
            "a folder with room for the compressed weights",
            "for instance offload_folder=offload",
        )


def check_room(modules: Iterable[nn.Module]) -> None:
    """Refuse weights on a disk that has no room for all of them once more.

    Raises
    ------
    UserError
        Names the offload folder.
    """
    needed: dict[Path, dict[tuple[int, str], int]] = {}
    for module in modules:
        for owner in module.modules():
            hook = offload_hook(owner)
            for name, p in owner.named_parameters(recurse=False):
                if hook is None or not is_meta(p) or kind_of_home(hook, name) != DISK:
                    continue
                folder = folder_of(hook)
                assert folder is not None
                size = p.numel() * p.element_size()
                needed.setdefault(folder, {})[id(owner), name] = size
    for folder, sizes in needed.items():
        require_space(folder.absolute(), sum(sizes.values()), "a copy of the compressed weights")
