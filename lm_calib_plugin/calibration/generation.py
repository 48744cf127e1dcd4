"""Text written and scored by the model itself: batched sampling with a key-value cache, and NLL.

``model.generate`` draws from the global random generator and reads the model's generation
config; this loop does neither. Everything goes through the model's own ``forward``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lm_calib_plugin.calibration.sampling import Decoding, Schedule, next_tokens
from lm_calib_plugin.errors import NumericalError
from lm_calib_plugin.guard import evaluation_mode
from lm_calib_plugin.placement import execution_device

_NLL_SLICE = 256  # positions whose float32 log-probabilities are held at once
_SHRINK_AT = 0.75  # ended texts leave the batch when this share or less is still being written


def input_device(model: Any) -> torch.device:
    """Return the device that takes token ids, also of a model spread over several."""
    return execution_device(model.get_input_embeddings())


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


class Continuation(NamedTuple):
    """Ids written after a prefix, and the end token that ended them (not among them), if any."""

    ids: list[int]
    end: int | None


def write_batch(
    model: Any,
    prefixes: Sequence[Sequence[int]],
    numbers: Tensor,
    decoding: Decoding,
    allowed: Tensor,
    ends: frozenset[int],
    *,
    schedule: Schedule | None = None,
    restart: int | None = None,
    on_tokens: Callable[[int], object] | None = None,
) -> list[Continuation]:
    """Continue every prefix until an end token or as long as there are numbers.

    All rows stand at the same position, so that nothing is padded: where a prefix is longer than
    the shortest one, its next token is taken from it instead of being drawn.

    Parameters
    ----------
    model
        Causal language model; its modes are left as found.
    prefixes
        Lists of at least one id.
    numbers
        ``[batch, steps]`` float32 in [0, 1), one per token to write.
    allowed
        ``[vocabulary]`` bool.
    ends
        Ids that end a text.
    schedule
        Temperature by distance from the last start token, in place of that of ``decoding``.
    restart
        Start token put after an end token, which is then kept and ends nothing: the text goes on
        with the earlier tokens still in sight, the schedule from its beginning. If the start
        token is itself an end token, it stands once.
    on_tokens
        Called now and then with the number of tokens written since the last call.

    Raises
    ------
    NumericalError
        When the model's output is NaN or infinite.
    """
    rows = _Rows(prefixes, numbers, ends, restart, input_device(model))
    allowed = allowed.to(rows.device)
    often = _looks_every(rows.device)
    extra = {"logits_to_keep": 1} if _keeps_logits(model) else {}
    cache = None
    with evaluation_mode(model):
        for place in range(rows.shortest, rows.width):
            feed = rows.ids[:, place - 1 : place] if cache is not None else rows.ids[:, :place]
            output = model(
                input_ids=feed, past_key_values=cache, use_cache=True, return_dict=True, **extra
            )
            cache = output.past_key_values
            token, sound = next_tokens(
                output.logits[:, -1].to(rows.device, torch.float32),
                rows.ids[:, :place],
                decoding,
                allowed,
                rows.numbers_at(place),
                None if schedule is None else schedule.at(rows.age),
            )
            rows.put(place, token, sound)
            if (place - rows.shortest + 1) % often and place + 1 < rows.width:
                continue
            left, written = rows.look()
            if on_tokens is not None:
                on_tokens(written)
            if left == 0:
                break
            if left <= _SHRINK_AT * len(rows.ids) and _rows_can_be_dropped(cache):
                cache.batch_select_indices(rows.drop_ended())
    return rows.finish()


def _looks_every(device: torch.device) -> int:
    """Return the tokens between two looks at the rows: a look waits for an accelerator."""
    return 1 if device.type == "cpu" else 16


class _Rows:
    """The texts still being written: one row each, all at the same position."""

    def __init__(
        self,
        prefixes: Sequence[Sequence[int]],
        numbers: Tensor,
        ends: frozenset[int],
        restart: int | None,
        device: torch.device,
    ) -> None:
        total, steps = numbers.shape
        lengths = [len(prefix) for prefix in prefixes]
        self.device, self.restart = device, restart
        self.shortest, self.longest = min(lengths), max(lengths)
        self.width = self.longest + steps
        ids = torch.zeros(total, self.width, dtype=torch.int64)
        for row, prefix in enumerate(prefixes):
            ids[row, : len(prefix)] = torch.tensor(prefix)
        self.ids, self.numbers = ids.to(device), numbers.to(device)
        self.stops = torch.tensor(sorted(ends), dtype=torch.int64, device=device)
        self.first = torch.tensor(lengths, device=device)  # place of the first token to write
        self.count = torch.zeros_like(self.first)  # tokens written, the end token left out
        self.age = torch.zeros_like(self.first)  # tokens since the last start token
        self.end = torch.full_like(self.first, -1)
        self.alive = torch.ones(total, dtype=torch.bool, device=device)
        self.sound = torch.ones((), dtype=torch.bool, device=device)
        self.owner = torch.arange(total, device=device)
        self._ended: list[tuple[int, Continuation]] = []
        self._ended_tokens = self._reported = 0

    def numbers_at(self, place: int) -> Tensor:
        """Return the number of each row for the token at this place."""
        steps = self.numbers.shape[1]
        own = (place - self.first).clamp(0, steps - 1)
        return self.numbers.gather(1, own[:, None])[:, 0]

    def put(self, place: int, token: Tensor, sound: Tensor) -> None:
        """Note the tokens drawn for a place, where they are wanted."""
        given = place < self.first
        if place < self.longest:
            token = torch.where(given, self.ids[:, place], token)
        self.sound = self.sound & sound
        stop = torch.isin(token, self.stops) & ~given
        if self.restart is None:
            self.end = torch.where(stop & self.alive, token, self.end)
            self.alive = self.alive & ~stop
        else:
            before = self.ids[:, place - 1]
            again = torch.isin(before, self.stops) & (before != self.restart)
            token = torch.where(again & (place > self.first), self.restart, token)
            self.age = torch.where(token == self.restart, 0, self.age + 1)
        self.ids[:, place] = token
        self.count = self.count + (self.alive & ~given)
        if self.shortest < self.longest:
            self.alive = self.alive & (place + 1 < self.first + self.numbers.shape[1])

    def look(self) -> tuple[int, int]:
        """Return how many rows are being written, and how many tokens are new."""
        left, tokens, sound = torch.stack(
            [self.alive.sum(), self.count.sum(), self.sound.long()]
        ).tolist()
        if not sound:
            raise NumericalError("output head", "self-generated text", "logits are not finite")
        total = self._ended_tokens + tokens
        new, self._reported = total - self._reported, total
        return left, new

    def drop_ended(self) -> Tensor:
        """Leave ended rows behind; return the indices of the others."""
        self._keep(~self.alive)
        kept = self.alive.nonzero()[:, 0]
        for name in ("ids", "numbers", "first", "count", "age", "end", "alive", "owner"):
            setattr(self, name, getattr(self, name)[kept])
        return kept

    def finish(self) -> list[Continuation]:
        """Return every text, in the order of the prefixes."""
        self._keep(torch.ones_like(self.alive))
        return [text for _, text in sorted(self._ended, key=lambda pair: pair[0])]

    def _keep(self, chosen: Tensor) -> None:
        parts = [part[chosen].tolist() for part in (self.owner, self.first, self.count, self.end)]
        for owner, first, count, end, ids in zip(*parts, self.ids[chosen].tolist(), strict=True):
            text = Continuation(ids[first : first + count], end if end >= 0 else None)
            self._ended.append((owner, text))
            self._ended_tokens += count


def _keeps_logits(model: Any) -> bool:
    """Tell whether the model can be asked for the logits of the last position alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _rows_can_be_dropped(cache: Any) -> bool:
    """Tell whether every layer of the cache can leave ended texts behind."""
    layers = getattr(cache, "layers", [None])
    return all(hasattr(layer, "batch_select_indices") for layer in layers)


def mean_nll(model: Any, ids: Sequence[int], first: int = 1) -> float:
    """Return the mean negative log-likelihood in nats of the ids from ``first`` on (from 0).

    Every id is scored given all before it.

    Raises
    ------
    ValueError
        When no id is left to score.
    NumericalError
        When the result is NaN.
    """
    if len(ids) <= first or first < 1:
        raise ValueError("a mean negative log-likelihood needs an id with another before it")
    inputs = torch.tensor([list(ids)], dtype=torch.int64, device=input_device(model))
    with evaluation_mode(model):
        logits = model(input_ids=inputs, use_cache=False, return_dict=True).logits[
            0, first - 1 : -1
        ]
        targets = inputs[0, first:].to(logits.device)
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for start in range(0, len(targets), _NLL_SLICE):
            part = slice(start, start + _NLL_SLICE)
            total += functional.cross_entropy(logits[part].float(), targets[part], reduction="sum")
    mean = float(total) / len(targets)
    if math.isnan(mean):
        raise NumericalError("output head", "perplexity of self-generated text", "NaN")
    return mean


def perplexity(model: Any, ids: Sequence[int], first: int = 1) -> float:
    """Return exp of :func:`mean_nll`, at most exp(700)."""
    return math.exp(min(mean_nll(model, ids, first), 700.0))
