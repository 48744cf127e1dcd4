"""Gradient traces of every layer, and the mix of sources whose traces look like a target's.

TASA (arXiv 2607.00908) searches a calibration mix by a "training-free gradient-trace alignment
criterion". We know that much of it, from the abstract; the formulas below are our own reading:

* the trace of a layer is that of its empirical Fisher matrix, the mean over sequences of
  ``||dL/dW||_F^2``, with L the mean next-token loss of the sequence;
* the profile of a set is its traces divided by their sum over the layers;
* the mix is the one whose profile has the least squared distance to the target's.

Numbers of the paper are not to be expected from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from lm_calib_plugin.calibration.selectors.probes import keep_parameters_still
from lm_calib_plugin.engine import TargetLayer
from lm_calib_plugin.engine.layers import HEAD
from lm_calib_plugin.errors import NumericalError, UnsupportedModelError, UserError
from lm_calib_plugin.guard import left_as_found
from lm_calib_plugin.placement import execution_device

_ELEMENTS = 1 << 24  # of the largest product that is held at a time: 64 MiB
_RIDGE = 1e-10  # makes the answer unique where several mixes are equally good


def gradient_traces(
    model: Any,
    layers: Sequence[TargetLayer],
    sequences: Sequence[Tensor],
    *,
    progress: bool = False,
) -> Tensor:
    """Return the trace of the empirical Fisher matrix of every layer.

    That is the mean over sequences of ``||dL/dW||_F^2`` for the dense weights, L being the mean
    next-token loss of a sequence in nats. No gradient of a weight is ever stored: from the inputs
    x ``[tokens, in]`` of a layer and the gradients g ``[tokens, out]`` of its outputs follows
    ``dL/dW = g^T x``, and its norm is taken piece by piece, or as ``sum((g g^T) * (x x^T))`` where
    that is less work.

    One sequence is in work at a time; the memory needed is that of its activations and logits. The
    model is left as it was found, also its ``requires_grad`` and ``.grad``.

    Parameters
    ----------
    model
        A causal language model, whole and in memory.
    layers
        Layers inside its decoder blocks.
    sequences
        Token ids ``[length]``, at least two each; no padding.
    progress
        Show a bar.

    Returns
    -------
    Tensor
        ``[layers]`` float64 on the CPU, in nats squared per weight unit squared. A layer that no
        token reached has 0.

    Raises
    ------
    UnsupportedModelError
        For experts stored in one tensor, and for the output head.
    UserError
        For no sequences, or one of fewer than two tokens.
    NumericalError
        When a gradient is not finite; the layer is named.
    """
    _check(layers, sequences)
    total = torch.zeros(len(layers), dtype=torch.float64)
    embeddings = model.get_input_embeddings()
    device = execution_device(embeddings)
    with left_as_found(model), keep_parameters_still(model), _Listener(layers) as listener:
        # No parameter takes a gradient, so the graph has to begin at the embedded tokens.
        handle = embeddings.register_forward_hook(
            lambda module, given, output: output.detach().requires_grad_(True).clone()
        )
        try:
            for ids in tqdm(sequences, desc="gradient traces, sequences", disable=not progress):
                with torch.enable_grad():
                    _summed_loss(model, ids.to(device)).backward()
                # The loss was summed, which keeps half-precision gradients away from zero.
                total += listener.finish() / (len(ids) - 1) ** 2
        finally:
            handle.remove()
    return total / len(sequences)


def align_shares(sources: Tensor, target: Tensor, floor: float = 0.0) -> Tensor:
    """Return the shares of the sources whose mixed trace profile is nearest to the target's.

    The traces of a mix are the weighted mean of its sources' traces. With t_i the traces of source
    i and s the shares, minimized is ``|| T / sum(T) - target / sum(target) ||^2`` for
    ``T = sum_i s_i t_i``, over shares that sum to 1, none below ``floor``. This is our own formula
    for the criterion that TASA's abstract names. The minimum is exact: in
    ``u_i ~ s_i sum(t_i)`` it is the point of a convex hull nearest to the target. Where several
    mixes are equally good (equal sources), the answer is the most even one in ``u``.

    The profile of the target is matched best by the target's own text. When that is among the
    sources it takes everything that ``floor`` leaves; the paper warns that such a set can hurt.

    Parameters
    ----------
    sources
        ``[sources, layers]``, from :func:`gradient_traces`.
    target
        ``[layers]``.
    floor
        The least share of each source, 0 to 1 / sources.

    Returns
    -------
    Tensor
        ``[sources]`` float64.

    Raises
    ------
    UserError
        For shapes that do not fit, traces that are negative, not finite or all 0, and a floor out
        of range.
    """
    traces = sources.detach().cpu().double().numpy()
    wanted = target.detach().cpu().double().numpy()
    if traces.ndim != 2 or not len(traces) or wanted.shape != traces.shape[1:]:
        raise UserError(
            "sources",
            f"shapes {traces.shape} and {wanted.shape}",
            "traces [sources, layers] and target [layers] are needed",
        )
    every = np.vstack([traces, wanted])
    if not np.isfinite(every).all() or (every < 0).any() or (every.sum(1) <= 0).any():
        raise UserError("sources", "traces negative, not finite or all 0", "traces are squares")
    count = len(traces)
    if not 0 <= floor <= 1 / count:
        raise UserError("floor", f"got {floor}", f"0 to 1/{count}, as there are {count} sources")
    # Shares with a floor are mixes of the corners of a smaller simplex, with shares of any size.
    corners = floor + (1 - count * floor) * np.eye(count)
    blends = corners @ traces
    sizes = blends.sum(1)
    hull = _nearest_in_hull(blends / sizes[:, None], wanted / wanted.sum())
    found = (hull / sizes) @ corners
    return torch.from_numpy(found / found.sum())


def _nearest_in_hull(points: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return weights on the simplex whose mean of ``points [n, d]`` is nearest to the target.

    With A the points seen from the target, ``min ||A y||^2 + (sum(y) - 1)^2`` over y >= 0 has the
    value ``d / (1 + d)`` for the best multiple of any weights u of distance ``d = ||A u||^2``; so
    its solution, scaled to sum 1, is the nearest point.
    """
    away = points - target
    longest = np.sqrt(np.square(away).sum(1).max())
    if longest > 0:
        away = away / longest
    count = len(points)
    system = np.vstack([away.T, _RIDGE**0.5 * np.eye(count), np.ones((1, count))])
    right = np.zeros(len(system))
    right[-1] = 1
    found, _ = nnls(system, right)
    return np.asarray(found / found.sum())


def squared_norm(g: Tensor, x: Tensor) -> float:
    """Return ``||g^T x||_F^2`` of ``g [tokens, out]`` and ``x [tokens, in]``, in bounded memory."""
    g, x = g.float(), x.float()
    tokens, out, width = len(x), g.shape[1], x.shape[1]
    total = torch.zeros((), dtype=torch.float64)
    if tokens * (out + width) < out * width:
        step = max(1, _ELEMENTS // tokens)
        for start in range(0, tokens, step):
            part = slice(start, start + step)
            total += ((g[part] @ g.t()) * (x[part] @ x.t())).sum(dtype=torch.float64).cpu()
    else:
        step = max(1, _ELEMENTS // width)
        for start in range(0, out, step):
            total += (g[:, start : start + step].t() @ x).square().sum(dtype=torch.float64).cpu()
    return max(0.0, total.item()) if torch.isfinite(total) else float("nan")


def _summed_loss(model: Any, ids: Tensor) -> Tensor:
    given = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    logits = model(**given, use_cache=False, return_dict=True).logits[0, :-1]
    return functional.cross_entropy(logits.float(), ids[1:].to(logits.device), reduction="sum")


def _check(layers: Sequence[TargetLayer], sequences: Sequence[Tensor]) -> None:
    for layer in layers:
        if layer.expert is not None:
            raise UnsupportedModelError(
                "model",
                f"{layer.name} is one of several experts in one tensor",
                "gradient traces need linear layers",
                "leave them out with ignore=*experts*",
            )
        if layer.block == HEAD:
            raise UnsupportedModelError(
                "targets", f"{layer.name} is outside the decoder blocks", "layers of the blocks"
            )
    if not layers:
        raise UserError("layers", "none given", "at least one layer is needed")
    if not sequences:
        raise UserError("sequences", "none given", "at least one sequence is needed")
    short = [n for n, ids in enumerate(sequences) if ids.dim() != 1 or len(ids) < 2]
    if short:
        raise UserError(
            "sequences",
            f"sequence {short[0]} has shape {tuple(sequences[short[0]].shape)}",
            "token ids of at least two tokens have a next-token loss",
        )


class _Listener:
    """Collects inputs on the way forward and takes norms on the way back."""

    def __init__(self, layers: Sequence[TargetLayer]) -> None:
        self._layers = layers
        self._handles: list[Any] = []
        self._forget()

    def __enter__(self) -> _Listener:
        for number, layer in enumerate(self._layers):
            hook = self._hook(number)
            self._handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._forget()

    def _forget(self) -> None:
        count = len(self._layers)
        self._traces = torch.zeros(count, dtype=torch.float64)
        self._calls = [0] * count
        self._pairs: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(count)]

    def _hook(self, number: int) -> Any:
        def forward(module: Any, given: Any, named: Any, output: Tensor) -> None:
            x = (given[0] if given else named["input"]).detach()
            self._calls[number] += 1

            def backward(gradient: Tensor) -> None:
                # A module used twice has one weight: its gradients add up before the norm.
                self._pairs[number].append((gradient.flatten(0, -2), x.flatten(0, -2)))
                if len(self._pairs[number]) == self._calls[number]:
                    self._take(number)

            if output.requires_grad:
                output.register_hook(backward)

        return forward

    def _take(self, number: int) -> None:
        gradients, inputs = zip(*self._pairs[number], strict=True)
        self._pairs[number] = []
        value = squared_norm(torch.cat(gradients), torch.cat(inputs))
        if value != value:
            name = self._layers[number].name
            raise NumericalError(
                name, "gradient traces", "gradients not finite", "try dtype=float32"
            )
        self._traces[number] = value

    def finish(self) -> Tensor:
        """Return ``[layers]`` of this sequence and forget it."""
        for number, pairs in enumerate(self._pairs):
            if pairs:
                self._take(number)
        found = self._traces
        self._forget()
        return found
