"""Facts and floors of the machine that a benchmark runs on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def facts() -> dict[str, Any]:
    """Return what a reader has to know of the machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    found: dict[str, Any] = {
        "cpu": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # Of all programs; far above the number of threads, ratios are good for their order only.
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    """Return the median seconds of some work, after one run that does not count.

    By events of the GPU where there is one.
    """
    work()
    found = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            work()
            last.record()
            torch.cuda.synchronize()
            found.append(first.elapsed_time(last) / 1000)
        else:
            start = time.perf_counter()
            work()
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def matmul_rate(dtype: torch.dtype, device: str = "cpu", size: int = 0) -> float:
    """Return measured FLOP/s of a matrix product of tokens with a weight."""
    size = size or (8192 if device != "cpu" else 1536)
    x = torch.randn(4096, size, device=device).to(dtype)
    w = torch.randn(size, size, device=device).to(dtype)
    return 2 * 4096 * size * size / seconds(lambda: x @ w)


def copy_rate(device: str = "cpu", count: int = 1 << 27) -> float:
    """Return measured bytes a second, read and written, of a copy within memory."""
    x = torch.zeros(count // 4, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / seconds(lambda: y.copy_(x))


def floors(
    config: Any, tokens: int, seqlen: int, weight_bytes: int, flops: float, bandwidth: float
) -> dict[str, float]:
    """Return the least seconds of the parts of a compression of a Llama-shaped model.

    Parameters
    ----------
    config
        Of the model: Llama names.
    tokens, seqlen
        Calibration tokens, and tokens in a sequence.
    weight_bytes
        Of all blocks.
    flops, bandwidth
        Measured rates, per second.

    Returns
    -------
    dict
        ``two_passes``: forward through the blocks twice, matrix products and causal attention;
        ``gram``: one product of every distinct input with itself, half of it by symmetry;
        ``weights``: reading them three times and writing them once.
    """
    hidden, inner, depth = (
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
    )
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads
    linear = hidden * (queries + 2 * keys) + queries * hidden + 3 * hidden * inner
    attention = queries * seqlen  # scores and values, half of each by causality
    one_pass = 2 * tokens * depth * (linear + attention)
    gram = tokens * depth * (2 * hidden**2 + queries**2 + inner**2)
    return {
        "two_passes": 2 * one_pass / flops,
        "gram": gram / flops,
        "weights": 4 * weight_bytes / bandwidth,
    }
