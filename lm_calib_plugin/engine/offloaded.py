"""The places where accelerate keeps weights that are away: read, and changed for the better."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import uuid
import weakref
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset, named_module_tensors
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lm_calib_plugin.errors import CalibError
from lm_calib_plugin.storage import ABANDONED, require_space

CPU, DISK, NOWHERE = "cpu", "disk", "unknown"
# Folders of changed weights inside an offload folder.
PREFIX = "calib-"
# What a weights map of accelerate remembers of us.
_OURS = "_lm_calib_folder"


def names_at_home(module: nn.Module, hook: Any) -> list[str]:
    """Return the names of tensors of one module that its hook brings."""
    tensors = named_module_tensors(
        module, include_buffers=hook.offload_buffers, recurse=False, remove_non_persistent=True
    )
    return [name for name, _ in tensors]


def fetch(hook: Any, name: str, dtype: torch.dtype) -> Tensor:
    """Return what a hook would bring, on the CPU where it is kept there or on a disk.

    May be the very tensor that is kept.
    """
    store, key = _root(hook.weights_map, name)
    file = None
    if isinstance(store, OffloadedWeightsLoader) and key not in store.state_dict:
        file = store.index[key].get("safetensors_file")
    if file is None:
        found: Tensor = store[key]
    else:
        # Read here: the loader would read it to the device.
        with safe_open(file, framework="pt", device="cpu") as tensors:
            found = tensors.get_tensor(store.index[key].get("weight_name", key))
    return found.detach().to(dtype)


@torch.no_grad()
def put_away(hook: Any, name: str, value: Tensor) -> None:
    """Store a changed weight where the hook reads it from.

    Raises
    ------
    CalibError
        When it can not be written; what was there is still read then.
    """
    store, key = _root(hook.weights_map, name)
    if isinstance(store, OffloadedWeightsLoader) and key not in store.state_dict:
        _write(store, key, value)
        return
    table: Any = store.state_dict if isinstance(store, OffloadedWeightsLoader) else store
    old = table[key]
    if old.dtype == value.dtype:
        old.detach().copy_(value)
    else:
        table[key] = value.to(old.device, copy=True)


def keep_own(hook: Any, name: str) -> Callable[[], None]:
    """Let a weight be stored apart from another that has the same storage; return the way back."""
    store, key = _root(hook.weights_map, name)
    if isinstance(store, OffloadedWeightsLoader):
        if key not in store.state_dict:
            before = store.index[key]
            return lambda: _back(store.index, key, before)
        store = store.state_dict
    old = store[key]
    store[key] = old.detach().clone()
    return lambda: _back(store, key, old)


def _back(table: Any, key: str, value: Any) -> None:
    table[key] = value


def kind_of_home(hook: Any, name: str) -> str:
    """Return ``cpu``, ``disk``, or ``unknown`` for a mapping that can not be changed."""
    store, key = _root(hook.weights_map, name)
    if isinstance(store, OffloadedWeightsLoader):
        if key in store.state_dict:
            return CPU
        known = key in store.index and isinstance(store.index, MutableMapping)
        return DISK if known else NOWHERE
    return CPU if isinstance(store, MutableMapping) and key in store else NOWHERE


def folder_of(hook: Any) -> Path | None:
    """Return the offload folder of a hook, None where it has none."""
    store, _ = _root(hook.weights_map, "")
    folder = getattr(store, "save_folder", None)
    return None if folder is None else Path(folder)


def _root(store: Any, key: str) -> tuple[Any, str]:
    """Return the mapping behind prefixes, and the name that a tensor has there."""
    while isinstance(store, PrefixedDataset):
        store, key = store.dataset, f"{store.prefix}{key}"
    return store, key


def _write(store: OffloadedWeightsLoader, key: str, value: Tensor) -> None:
    """Write a weight into a file of its own, and let the loader read it from there."""
    folder = _own_folder(store)
    before = store.index[key]
    file = folder / f"{uuid.uuid4().hex}.safetensors"
    try:
        require_space(folder, value.numel() * value.element_size() + 4096, key)
        save_file({key: value.contiguous()}, file)
    except Exception as error:
        file.unlink(missing_ok=True)
        raise CalibError(
            f"{key} could not be written to the offload folder ({error}). The weights written "
            "before are compressed, the others are not: load the model again."
        ) from error
    dtype = str(value.dtype).removeprefix("torch.")
    store.index[key] = {"safetensors_file": str(file), "weight_name": key, "dtype": dtype}
    old = Path(str(before.get("safetensors_file") or "/"))
    if old.parent == folder:
        old.unlink(missing_ok=True)


def _own_folder(store: OffloadedWeightsLoader) -> Path:
    """Return the folder of this model's changed weights; made when it is first needed."""
    known = getattr(store, _OURS, None)
    if known is not None:
        return Path(known)
    parent = Path(store.save_folder)
    parent.mkdir(parents=True, exist_ok=True)
    _sweep(parent)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent)).absolute()
    lock = FileLock(folder / "lock")
    lock.acquire()
    setattr(store, _OURS, str(folder))
    weakref.finalize(store, _remove, folder, lock, os.getpid())
    return folder


def _remove(folder: Path, lock: FileLock, owner: int) -> None:
    """Delete the folder when the model goes, or the process ends; not in a fork of it."""
    if os.getpid() == owner:
        with contextlib.suppress(OSError):
            lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Delete what processes left that were killed: their locks are free."""
    for folder in parent.glob(f"{PREFIX}*"):
        file = folder / "lock"
        with contextlib.suppress(OSError, Timeout):
            if time.time() - file.stat().st_mtime > ABANDONED:
                with FileLock(file, timeout=0):
                    shutil.rmtree(folder, ignore_errors=True)
