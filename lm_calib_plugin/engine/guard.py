"""Everything of the process and the model that a run borrows is given back as it was."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn


@contextlib.contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Put the model in inference mode and restore every global state at the end.

    Restored, also after an exception: random state of Python, NumPy and torch (all devices),
    default dtype, grad and inference mode, matmul precision, and the training flag of every module.
    """
    training = {module: module.training for module in model.modules()}
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    dtype = torch.get_default_dtype()
    precision = torch.get_float32_matmul_precision()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with (
            torch.random.fork_rng(devices=devices),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            torch.set_float32_matmul_precision("highest")
            model.eval()
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_default_dtype(dtype)
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        for module, flag in training.items():
            module.training = flag
