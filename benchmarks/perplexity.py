"""Token perplexity on fixed windows, shared by every benchmark run."""

from __future__ import annotations

import math

import torch


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows: list[list[int]]) -> float:
    """Exponential of the mean negative log-likelihood of each next token.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model whose output has ``logits``; used in the dtype it is in.
    windows : list of list of int
        Every window is scored on its own, from its second token on.

    Returns
    -------
    float
        ``exp(sum of -log p(token) / number of scored tokens)``.
    """
    total, scored = 0.0, 0
    for window in windows:
        ids = torch.tensor([window])
        log_probs = model(ids, use_cache=False).logits[:, :-1].float().log_softmax(dim=-1)
        picked = log_probs.gather(-1, ids[:, 1:, None])
        total -= picked.double().sum().item()
        scored += picked.numel()
    return math.exp(total / scored)


def perplexities(model: torch.nn.Module, evals: dict[str, list[list[int]]]) -> dict[str, float]:
    """Perplexity of each named list of windows."""
    return {name: perplexity(model, windows) for name, windows in evals.items()}
