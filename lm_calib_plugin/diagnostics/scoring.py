"""Models scored on sequences by teacher forcing: all of the vocabulary, a few sequences at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from lm_calib_plugin.diagnostics.tokens import TokenDivergence, token_divergence
from lm_calib_plugin.errors import NumericalError
from lm_calib_plugin.guard import evaluation_mode
from lm_calib_plugin.placement import execution_device

# Numbers of one tensor of logits: 256 MiB in float32.
_LOGITS = 2**26


def divergence_of(
    dense: Any, compressed: Any, sequences: Sequence[Tensor], progress: bool = True
) -> list[TokenDivergence]:
    """Compare two models on sequences.

    Parameters
    ----------
    sequences
        Token ids, 1-D each; every position but the first is scored.

    Returns
    -------
    list of TokenDivergence
        One a sequence, in order, with one entry a scored position.

    Raises
    ------
    NumericalError
        When the logits of a model are not finite.
    """
    found: dict[int, TokenDivergence] = {}
    with evaluation_mode(dense), evaluation_mode(compressed), torch.inference_mode():
        for numbers, ids in _batches(sequences, dense, progress, "divergence"):
            first, second = logits_of(dense, ids, "dense"), logits_of(compressed, ids, "compressed")
            for row, number in enumerate(numbers):
                found[number] = token_divergence(first[row, :-1], second[row, :-1], ids[row, 1:])
    return [found[number] for number in range(len(sequences))]


def nll_of(model: Any, sequences: Sequence[Tensor], progress: bool = True) -> list[Tensor]:
    """Return the negative log-likelihood (nats) of every position but the first, by sequence."""
    found: dict[int, Tensor] = {}
    with evaluation_mode(model), torch.inference_mode():
        for numbers, ids in _batches(sequences, model, progress, "scoring"):
            logits = logits_of(model, ids, "scored")
            for row, number in enumerate(numbers):
                where = ids[row, 1:].to(logits.device)
                loss = functional.cross_entropy(logits[row, :-1].float(), where, reduction="none")
                found[number] = loss.double().cpu()
    return [found[number] for number in range(len(sequences))]


def logits_of(model: Any, ids: Tensor, name: str) -> Tensor:
    """Return logits ``[batch, length, vocabulary]`` of ids without pads.

    Raises
    ------
    NumericalError
        When they are not finite.
    """
    device = execution_device(model.get_input_embeddings())
    logits: Tensor = model(ids.to(device), use_cache=False).logits
    if not bool(torch.isfinite(logits).all()):
        raise NumericalError(
            f"the {name} model", "scoring", "NaN or Inf in its logits", "try dtype=float32"
        )
    return logits


def _batches(
    sequences: Sequence[Tensor], model: Any, progress: bool, title: str
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield numbers and ids of sequences of one length; no pads, which would cost and could count.

    The longest come first: memory runs out at once, or never.
    """
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), i))
    with tqdm(total=len(order), desc=f"{title}, sequences", disable=not progress) as bar:
        for length, group in groupby(order, key=lambda i: len(sequences[i])):
            numbers = list(group)
            size = max(1, _LOGITS // (vocabulary * max(1, length)))
            for start in range(0, len(numbers), size):
                part = numbers[start : start + size]
                yield part, torch.stack([sequences[i] for i in part])
                bar.update(len(part))
