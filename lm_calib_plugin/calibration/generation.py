"""Text written and scored by the model itself: batched sampling with a key-value cache, and NLL.

``model.generate`` draws from the global random generator and reads the model's generation
config; this loop does neither. Everything goes through the model's own ``forward``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lm_calib_plugin.calibration.sampling import Decoding, candidates, pick
from lm_calib_plugin.errors import NumericalError
from lm_calib_plugin.guard import evaluation_mode

_NLL_SLICE = 256  # positions whose float32 log-probabilities are held at once
_SHRINK_AT = 0.75  # ended texts leave the batch when this share or less is still being written


def input_device(model: Any) -> torch.device:
    """Return the device that takes token ids, also of a model spread over several."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def position_limit(model: Any) -> int | None:
    """Return the most positions the model takes, or None when its config names no limit."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if limit else None


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the ids that end a text, as generation config, config and tokenizer name them."""
    found: set[int] = set()
    for owner in (getattr(model, "generation_config", None), model.config, tokenizer):
        value = getattr(owner, "eos_token_id", None)
        found.update([value] if isinstance(value, int) else value or ())
    return frozenset(found)


def write_batch(
    model: Any,
    prefixes: Tensor,
    numbers: Tensor,
    decoding: Decoding,
    allowed: Tensor,
    ends: frozenset[int],
    on_step: Callable[[int], object] | None = None,
) -> list[list[int]]:
    """Continue every prefix until an end token or as long as there are numbers.

    Parameters
    ----------
    model
        Causal language model; its modes are left as found.
    prefixes
        ``[batch, prefix]`` int64, equally long, so that nothing is padded.
    numbers
        ``[batch, steps]`` float32 in [0, 1), one per token to write.
    allowed
        ``[vocabulary]`` bool.
    ends
        Ids that end a text; they are not returned.
    on_step
        Called after each step with the number of texts still being written.

    Returns
    -------
    list of list of int
        The ids written after each prefix.
    """
    device = input_device(model)
    prefixes, numbers, allowed = (t.to(device) for t in (prefixes, numbers, allowed))
    stops = torch.tensor(sorted(ends), dtype=torch.int64, device=device)
    total, steps = numbers.shape
    written = torch.zeros(total, steps, dtype=torch.int64, device=device)
    lengths = torch.zeros(total, dtype=torch.int64, device=device)
    rows = torch.arange(total, device=device)  # texts still in the batch
    alive = torch.ones(total, dtype=torch.bool, device=device)  # of those, not ended
    feed, cache = prefixes, None
    with evaluation_mode(model):
        for step in range(steps):
            history = torch.cat([prefixes[rows], written[rows, :step]], dim=1)
            output = model(
                input_ids=feed,
                attention_mask=torch.ones_like(history),
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
            )
            cache = output.past_key_values
            logits = output.logits[:, -1].to(device, torch.float32)
            token = pick(*candidates(logits, history, decoding, allowed), numbers[rows, step])
            written[rows, step] = token
            alive = alive & ~torch.isin(token, stops)
            lengths[rows] += alive
            feed, left = token[:, None], int(alive.sum())
            if on_step is not None:
                on_step(left)
            if left == 0:
                break
            if left <= _SHRINK_AT * len(rows) and _rows_can_be_dropped(cache):
                kept = alive.nonzero()[:, 0]
                cache.batch_select_indices(kept)
                rows, feed, alive = rows[kept], feed[kept], alive[kept]
    return [row[:n] for row, n in zip(written.tolist(), lengths.tolist(), strict=True)]


def _rows_can_be_dropped(cache: Any) -> bool:
    """Tell whether every layer of the cache can leave ended texts behind."""
    layers = getattr(cache, "layers", [None])
    return all(hasattr(layer, "batch_select_indices") for layer in layers)


def perplexity(model: Any, ids: list[int]) -> float:
    """Return exp(mean negative log-likelihood in nats) of ids 2 to n, given those before.

    Raises
    ------
    ValueError
        For fewer than two ids.
    NumericalError
        When the result is NaN.
    """
    if len(ids) < 2:
        raise ValueError("perplexity needs at least two tokens")
    inputs = torch.tensor([ids], dtype=torch.int64, device=input_device(model))
    with evaluation_mode(model):
        logits = model(input_ids=inputs, use_cache=False, return_dict=True).logits[0, :-1]
        targets = inputs[0, 1:].to(logits.device)
        total = 0.0
        for start in range(0, len(targets), _NLL_SLICE):
            part = slice(start, start + _NLL_SLICE)
            loss = functional.cross_entropy(logits[part].float(), targets[part], reduction="sum")
            total += float(loss)
    mean = total / len(targets)
    if math.isnan(mean):
        raise NumericalError("output head", "perplexity of self-generated text", "NaN")
    return math.exp(min(mean, 700.0))
