"""``self:chat``: the model answers instructions in its own chat format.

An instruction is put into the tokenizer's chat template, the model answers by sampling, and
answers it ends by itself are kept. A conversation is used as ids: the rendered prompt, the answer
as it was written, its end token, and what the template puts behind it, special tokens included.
Conversations stand one after another, cut into windows of ``seqlen`` that do not overlap.
"""

from __future__ import annotations

import math
import random
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
from lm_calib_plugin.calibration.openings import INSTRUCTIONS, openings_file, read_openings
from lm_calib_plugin.calibration.options import ARGUMENT, Option
from lm_calib_plugin.calibration.sampling import Decoding
from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.calibration.sources.base import Context, IdSource
from lm_calib_plugin.calibration.sources.self_generated import (
    BATCH_SIZE,
    GUARDS,
    MARGIN,
    SAMPLING,
    SelfGenerated,
)
from lm_calib_plugin.calibration.text_cache import Written
from lm_calib_plugin.calibration.tokens import check_ids, encode
from lm_calib_plugin.calibration.writer import Writer, text_mask
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.storage import digest

_MARK = "answer"
_DATE = "01 Jan 2025"  # some templates write today's date; a draw must not change with it


class SelfChat(SelfGenerated, IdSource):
    """Windows of ``seqlen`` ids of conversations with the model."""

    name = "self:chat"
    variant = "chat"
    file_options = ("prompts",)
    options = {
        **SAMPLING,
        **GUARDS,
        **BATCH_SIZE,
        "prompts": Option(),
        "max_new_tokens": Option("whole", default=512, lowest=1),
    }

    def validate(self) -> None:
        """Check that a file of instructions is there."""
        if self.settings["prompts"] is not None:
            openings_file(self.settings["prompts"], "prompts")

    def sequences(self, context: Context) -> list[Tensor]:
        """Return ``context.count`` windows of exactly ``context.seqlen`` ids."""
        ids = [i for text in self._pool(context) if text.kept for i in text.ids]
        windows = torch.tensor(ids[: context.count * context.seqlen], dtype=torch.int64)
        return list(windows.view(context.count, context.seqlen))

    def _guards(self) -> Guards:
        return replace(super()._guards(), finished=True)

    def _prompts(self) -> list[str]:
        return read_openings(self.settings["prompts"], INSTRUCTIONS, "prompts")

    def _resolved(self, context: Context) -> dict[str, Any]:
        if not getattr(context.tokenizer, "chat_template", None):
            raise UserError(
                ARGUMENT,
                "`self:chat` needs a chat template, and the tokenizer of this model has none",
                "use self:prefix or self:bos, or a model made for chat",
            )
        prompts = [prompt_ids(context.tokenizer, prompt) for prompt in self._prompts()]
        longest = max(map(len, prompts))
        tail = closing_ids(context.tokenizer, end_ids(context.model, context.tokenizer))
        limit = position_limit(context.model)
        # The end token and what stands behind it are read by the model too.
        room = math.inf if limit is None else limit - longest - 1 - len(tail)
        if room < 1:
            raise UserError(
                ARGUMENT,
                f"`self:chat`: a prompt of {longest} tokens leaves no room to answer",
                f"the model takes {limit} positions",
                "name a file of shorter instructions: self:chat?prompts=FILE",
            )
        return {
            "prompts": digest(prompts),
            "closing": tail,
            "max_new_tokens": int(min(self.settings["max_new_tokens"], room)),
        }

    def _writer(self, context: Context, journal: Journal) -> Writer:
        model, tokenizer = context.model, context.tokenizer
        ends, closing = end_ids(model, tokenizer), self._settings["closing"]
        prompts = self._prompts()
        random.Random(derive_seed(context.seed, "prompts")).shuffle(prompts)  # noqa: S311
        rendered = [prompt_ids(tokenizer, prompt) for prompt in prompts]
        check_ids([i for ids in rendered for i in ids], context.vocab_size)

        def finish(prefix: Sequence[int], row: Continuation) -> Written:
            ids = (*prefix, *row.ids, *(() if row.end is None else (row.end, *closing)))
            text = tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            answer = tokenizer.decode(row.ids, skip_special_tokens=True).strip()
            score = perplexity(model, ids, first=len(prefix)) if answer else None
            return Written(text, len(row.ids), row.end is not None, score, ids=ids)

        return Writer(
            model,
            rendered,
            finish,
            decoding=Decoding(**{name: self.settings[name] for name in SAMPLING}),
            seed=context.seed,
            max_new_tokens=self._settings["max_new_tokens"],
            batch_size=self.settings["batch_size"],
            allowed=text_mask(tokenizer, context.vocab_size, ends),
            ends=ends,
            journal=journal,
        )

    def _estimate(self, context: Context, writer: Writer) -> int:
        # Answers of half the tokens allowed, as a first guess; further rounds know better.
        length = sum(map(len, writer.prefixes)) / len(writer.prefixes) + writer.max_new_tokens / 2
        wanted = context.count * context.seqlen / length / (1 - self.settings["drop"])
        return max(1, math.ceil(MARGIN * wanted))

    def _found(self, context: Context, kept: Sequence[Written]) -> int:
        return sum(len(text.ids) for text in kept) // context.seqlen


def prompt_ids(tokenizer: Any, instruction: str) -> list[int]:
    """Return the ids of an instruction in the chat template, up to where the answer begins."""
    text = _rendered(tokenizer, [{"role": "user", "content": instruction}], True)
    return encode(tokenizer, text)


def closing_ids(tokenizer: Any, ends: frozenset[int]) -> list[int]:
    """Return what the template puts behind the end token of an answer, often a line break."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
    ids = encode(tokenizer, _rendered(tokenizer, messages, False).rpartition(_MARK)[2])
    for place, i in enumerate(ids):
        if i in ends:
            return ids[place + 1 :]
    return []


def _rendered(tokenizer: Any, messages: list[dict[str, str]], ask: bool) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=ask,
            date_string=_DATE,
        )
    except Exception as error:  # a template is a program of its own and may raise anything
        raise UserError(
            ARGUMENT,
            f"`self:chat`: the chat template of this tokenizer fails on a user's message "
            f"({type(error).__name__}: {error})",
            "use self:prefix or self:bos",
        ) from error
    return text
