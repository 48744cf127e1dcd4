"""How fast the evaluation itself was: tokens and seconds of every forward pass and generation.

On several processes, those of the first; generation includes the pass over the prompt.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch


class Speed:
    """Sums of tokens and seconds: scored (prompts and continuations in one pass), and generated.

    Pads are counted: they are multiplied like any token.
    """

    def __init__(self) -> None:
        self.tokens = {"scored": 0, "generated": 0}
        self.seconds = {"scored": 0.0, "generated": 0.0}
        self._counts = True

    @contextlib.contextmanager
    def timed(self, kind: str, like: torch.Tensor) -> Iterator[Callable[[int], None]]:
        """Time what is done inside; the function given takes the number of tokens.

        ``like`` is on the device whose work is waited for.
        """

        done: list[int] = []
        _wait(like)
        start = time.perf_counter()
        yield done.append
        _wait(like)
        if self._counts:
            # A pass that fails, for want of memory, ends above and is not counted.
            self.tokens[kind] += sum(done)
            self.seconds[kind] += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing inside."""
        before, self._counts = self._counts, False
        try:
            yield
        finally:
            self._counts = before

    def summary(self) -> dict[str, Any]:
        """Return tokens, seconds and tokens a second of what was done."""
        found: dict[str, Any] = {}
        for kind, tokens in self.tokens.items():
            if tokens:
                seconds = self.seconds[kind]
                found[f"{kind}_tokens"] = tokens
                found[f"{kind}_seconds"] = round(seconds, 3)
                found[f"{kind}_tokens_per_second"] = round(tokens / max(seconds, 1e-9), 1)
        return found


def _wait(like: torch.Tensor) -> None:
    if like.device.type == "cuda":
        torch.cuda.synchronize(like.device)
