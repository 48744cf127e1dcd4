"""Everything of the process and the model that a run borrows is given back as it was."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from lm_calib_plugin.errors import CalibError, listed


def several_processes() -> bool:
    """Tell whether torch's process group is up: other processes do the same work."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def local_rank() -> int | None:
    """Return the number of this process on its machine, where ``torchrun`` started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "MASTER_ADDR" not in os.environ:
        return None
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextlib.contextmanager
def launched_together() -> Iterator[None]:
    """Join the processes that ``torchrun`` started, for as long as the context lasts.

    Nothing is done for a process that is alone, or whose group is up already.
    """
    place = local_rank()
    if place is None or not torch.distributed.is_available() or several_processes():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(place)
        backend = "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(backend)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def random_state_untouched() -> Iterator[None]:
    """Put the global generators of Python, NumPy and torch back, also after an exception.

    Our own code draws from its own generators; this guards against libraries called on the way
    (data sets, harness tasks, custom model code).
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off and gradients off; put every module's own flag back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


@contextlib.contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode, with exact float32 products, and restore every global
    state at the end: random generators, default dtype, grad and inference mode, matmul precision
    and the training flag of every module. Also after an exception.
    """
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    try:
        with random_state_untouched(), evaluation_mode(model):
            torch.set_float32_matmul_precision("highest")
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_default_dtype(dtype)


def check_agreed(digests: Sequence[str]) -> None:
    """Refuse to go on where processes (one digest each) do not hold the same weights."""
    if len(set(digests)) > 1:
        raise CalibError(
            f"{len(set(digests))} different results on {len(digests)} processes: "
            f"{listed(digest[:12] for digest in digests)}. Run on one kind of device, with one "
            "version of every package."
        )
