"""``self:bos``: the model writes from its start token, without any text given to it.

Self-calibration as in arXiv 2410.17170: sampling over the whole vocabulary from the start token,
with a temperature that begins high (varied openings) and ends at 1 (faithful samples). The
published values of the schedule are not known; ours are options. The sequences are the ids as
they were written: nothing is tokenized again, joined or cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lm_calib_plugin.calibration.generation import (
    Continuation,
    end_ids,
    perplexity,
    position_limit,
)
from lm_calib_plugin.calibration.guards import Guards
from lm_calib_plugin.calibration.journal import Journal
from lm_calib_plugin.calibration.options import ARGUMENT, Option
from lm_calib_plugin.calibration.sampling import UNTRUNCATED, Schedule
from lm_calib_plugin.calibration.sources.base import Context, IdSource
from lm_calib_plugin.calibration.sources.self_generated import (
    BATCH_SIZE,
    GUARDS,
    SelfGenerated,
)
from lm_calib_plugin.calibration.text_cache import Written
from lm_calib_plugin.calibration.tokens import check_ids
from lm_calib_plugin.calibration.writer import Writer, text_mask
from lm_calib_plugin.errors import UserError


class SelfFromStart(SelfGenerated, IdSource):
    """Sequences of exactly ``seqlen`` ids, the first of which is the start token.

    An end token stays in the sequence and is followed by the start token (if both are one token,
    it stands once); the schedule begins again there, and the earlier tokens stay in sight.
    """

    name = "self:bos"
    variant = "bos"
    options = {
        "t0": Option("number", default=Schedule.start, above=0),
        "t1": Option("number", default=Schedule.end, above=0),
        "ramp": Option("whole", default=Schedule.ramp, lowest=1),
        "eos": Option(default="restart", choices=("restart", "suppress")),
        "drop": replace(GUARDS["drop"], default=0.0),
        **BATCH_SIZE,
    }

    def __init__(self, argument: str = "", options: Any = ()) -> None:
        super().__init__(argument, options)
        self._facts: dict[str, Any] = {}

    def sequences(self, context: Context) -> list[Tensor]:
        """Return ``context.count`` sequences, from the cache when it holds them."""
        texts = [text for text in self._pool(context) if text.kept][: context.count]
        start = self._settings["start"]
        self._facts = {
            "mean_nll": [round(math.log(text.perplexity or 1.0), 6) for text in texts],
            "restarts": sum(text.ids[1:].count(start) for text in texts),
        }
        return [torch.tensor(text.ids, dtype=torch.int64) for text in texts]

    def provenance(self) -> dict[str, Any]:
        """Add the mean NLL of every sequence in nats per token, and how often text began anew."""
        return super().provenance() | self._facts

    def _guards(self) -> Guards:
        return Guards(self.settings["drop"], dedup=False, repetition=0.0)

    def _resolved(self, context: Context) -> dict[str, Any]:
        limit = position_limit(context.model)
        if context.seqlen < 2 or (limit is not None and context.seqlen > limit):
            raise UserError(
                "seqlen",
                f"got {context.seqlen}",
                f"`{self.name}` writes sequences of 2 to {limit or 'any number of'} tokens",
                f"seqlen={min(limit or 2048, 2048)}",
            )
        start = start_id(context.model, context.tokenizer)
        check_ids([start], context.vocab_size)
        return {"start": start}

    def _writer(self, context: Context, journal: Journal) -> Writer:
        model, tokenizer = context.model, context.tokenizer
        restarts = self.settings["eos"] == "restart"
        start, ends = self._settings["start"], end_ids(model, tokenizer) if restarts else ()

        def finish(prefix: Sequence[int], row: Continuation) -> Written:
            ids = (*prefix, *row.ids)
            text = tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            return Written(text, len(row.ids), False, perplexity(model, ids), ids=ids)

        allowed = text_mask(tokenizer, context.vocab_size, ends)
        if not restarts:  # an end token may be an ordinary one of the vocabulary
            allowed[[i for i in end_ids(model, tokenizer) if 0 <= i < len(allowed)]] = False
        return Writer(
            model,
            [[start]],
            finish,
            decoding=UNTRUNCATED,
            schedule=Schedule(self.settings["t0"], self.settings["t1"], self.settings["ramp"]),
            restart=start,
            seed=context.seed,
            max_new_tokens=context.seqlen - 1,
            batch_size=self.settings["batch_size"],
            allowed=allowed,
            ends=frozenset(ends),
            journal=journal,
        )

    def _estimate(self, context: Context, writer: Writer) -> int:
        return math.ceil(context.count / (1 - self.settings["drop"]) - 1e-9)

    def _found(self, context: Context, kept: Sequence[Written]) -> int:
        return len(kept)


def start_id(model: Any, tokenizer: Any) -> int:
    """Return the id a text begins with: the start token, else the end token.

    The tokenizer is asked first, then the generation config, then the config.

    Raises
    ------
    UserError
        When there is neither.
    """
    owners = (tokenizer, getattr(model, "generation_config", None), model.config)
    for name in ("bos_token_id", "eos_token_id"):
        for owner in owners:
            value = getattr(owner, name, None)
            if isinstance(value, (list, tuple)) and value:
                value = value[0]
            if isinstance(value, int):
                return value
    raise UserError(
        ARGUMENT,
        "`self:bos` starts from the start token or the end token, and neither the tokenizer nor "
        "the model has one",
        "use self:prefix, or set tokenizer.bos_token",
    )
