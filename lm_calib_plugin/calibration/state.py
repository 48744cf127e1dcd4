"""Leave things as found: random generators of the process, and the modes of a model."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from lm_calib_plugin.storage import canonical_json


def derive_seed(*parts: int | str) -> int:
    """Return a seed of 63 bits made of the parts; equal parts give an equal seed everywhere."""
    hashed = hashlib.sha256(canonical_json(list(parts)).encode()).digest()
    return int.from_bytes(hashed[:8], "big") >> 1


@contextlib.contextmanager
def random_state_untouched() -> Iterator[None]:
    """Put the global generators of python, numpy and torch back, also after an exception.

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
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training
