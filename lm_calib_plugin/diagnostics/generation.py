"""What two models write, greedily, side by side: loops, lengths, refusals, first differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lm_calib_plugin import engine
from lm_calib_plugin.calibration.chat import DATE
from lm_calib_plugin.calibration.generation import end_ids, position_limit, write_batch
from lm_calib_plugin.calibration.openings import INSTRUCTIONS, OPENINGS, read_openings
from lm_calib_plugin.calibration.sampling import Decoding
from lm_calib_plugin.calibration.sources.text_files import READERS, open_documents
from lm_calib_plugin.calibration.tokens import encode
from lm_calib_plugin.checks import vocab_size
from lm_calib_plugin.comparison import two_level_bootstrap
from lm_calib_plugin.comparison.numbers import Interval
from lm_calib_plugin.diagnostics.document import Document
from lm_calib_plugin.diagnostics.health import (
    Loop,
    first_difference,
    loop_of,
    refuses,
    repeated_share,
)
from lm_calib_plugin.diagnostics.pair import Pair, check_pair, open_pair
from lm_calib_plugin.diagnostics.texts import draw_text, text_recipe
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.guard import left_as_found
from lm_calib_plugin.loading import Loading
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.runtime import Runtime

# Rows of one batch; they differ in last bits from rows alone, which decides near ties only.
BATCH = 8
# The likeliest token, the first of equals.
_GREEDY = Decoding(temperature=1.0, top_k=1, top_p=1.0, repetition_penalty=1.0)
SHORT = 0.5  # of the length of the dense text: what is shorter, and ended, ended early


@dataclass(frozen=True)
class Written:
    """One text: ids without end token, the token that ended it (None: cut), and how it reads."""

    ids: tuple[int, ...]
    end: int | None
    text: str

    @property
    def loop(self) -> Loop | None:
        """The loop it ends in."""
        return loop_of(self.ids)


@dataclass(frozen=True)
class Prompts:
    """What the models go on from: an expression, a file, or (None) texts of this package.

    Parameters
    ----------
    given
        Calibration expression; or a ``.txt`` with one prompt a line, or a file of records with a
        column ``prompt`` or ``text``.
    count
        How many: the first ones of a file, documents of a draw.
    length
        Tokens of a prompt that is drawn from text; those of a file are taken whole.
    chat
        Write each as a question of the user with the chat template.
    seed
        Of the draw.
    """

    given: str | None = None
    count: int = 16
    length: int = 16
    chat: bool = False
    seed: int = 0
    _texts: tuple[str, ...] = field(default=(), init=False)
    _recipe: Recipe | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        for name, number in (("prompt-count", self.count), ("prompt-length", self.length)):
            if number < 1:
                raise UserError(name, f"got {number}", "1 or more")
        texts = self._read()
        if texts is not None:
            if len(texts) < self.count:
                object.__setattr__(self, "count", len(texts))
            object.__setattr__(self, "_texts", tuple(texts[: self.count]))
            return
        size = {"nsamples": self.count, "seqlen": self.length, "calib_seed": self.seed}
        object.__setattr__(self, "_recipe", text_recipe(str(self.given), size, "prompts"))

    @property
    def name(self) -> str:
        """What they are, in a few words."""
        return self.given or (INSTRUCTIONS if self.chat else OPENINGS) + " of this package"

    def drawn(self, model: Any, tokenizer: Any, runtime: Runtime) -> list[list[int]]:
        """Return the token ids of every prompt."""
        start = _start(tokenizer)
        if self._recipe is not None:
            found = draw_text(self._recipe, model, tokenizer, runtime).sequences
            drawn = [ids.tolist() for ids in found]
            if not self.chat:
                return [ids if ids[:1] == start else [*start, *ids] for ids in drawn]
            texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in drawn]
        else:
            texts = list(self._texts)
        if not self.chat:
            return [[*start, *encode(tokenizer, text)] for text in texts]
        return [_asked(tokenizer, text) for text in texts]

    def _read(self) -> list[str] | None:
        """Return the texts of a file; None for an expression."""
        if self.given is None:
            return read_openings(None, INSTRUCTIONS if self.chat else OPENINGS)
        path = Path(self.given).expanduser()
        if path.suffix.lower() not in READERS or ":" in self.given:
            return None
        if not path.is_file():
            raise UserError("prompts", f"{path}: no such file", "a file, or an expression")
        try:
            return _lines(path)
        except UserError as error:
            raise error.renamed("prompts") from None


@dataclass(frozen=True)
class Side:
    """Measures of the texts of one model, one number a prompt."""

    texts: tuple[Written, ...]

    def measures(self) -> dict[str, list[float]]:
        """Return what is compared, by name; 0 or 1 where it is a yes or no."""
        return {
            "loops": [float(one.loop is not None) for one in self.texts],
            "repeated 4-grams": [repeated_share(one.ids) for one in self.texts],
            "refusals": [float(refuses(one.text)) for one in self.texts],
            "empty": [float(not one.text.strip()) for one in self.texts],
            "cut at the limit": [float(one.end is None) for one in self.texts],
            "tokens": [float(len(one.ids)) for one in self.texts],
        }


@dataclass(frozen=True)
class Generated:
    """What both models wrote for the same prompts."""

    prompts: tuple[str, ...]
    prompt_ids: tuple[tuple[int, ...], ...]
    dense: Side
    compressed: Side
    limit: int

    @property
    def differences(self) -> list[int | None]:
        """Place of the first token that differs, by prompt; None for equal texts."""
        pairs = zip(self.dense.texts, self.compressed.texts, strict=True)
        return [first_difference(_whole(one), _whole(other)) for one, other in pairs]

    def lengths(self) -> dict[str, list[int]]:
        """Return the prompts whose text has an odd length, beside that of the dense model.

        ``ended early``: ended by itself at less than half of the tokens; ``never ended``: cut at
        the limit, where the dense text had ended; ``empty``: nothing to read, where the dense text
        had something.
        """
        found: dict[str, list[int]] = {"ended early": [], "never ended": [], "empty": []}
        for number, (one, other) in enumerate(
            zip(self.dense.texts, self.compressed.texts, strict=True)
        ):
            if other.end is not None and len(other.ids) < SHORT * len(one.ids):
                found["ended early"].append(number)
            if other.end is None and one.end is not None:
                found["never ended"].append(number)
            if not other.text.strip() and one.text.strip():
                found["empty"].append(number)
        return found

    def survival(self) -> list[float]:
        """Return the share of texts that are the same up to token 1, 2, ... of the limit."""
        places = [self.limit if p is None else p for p in self.differences]
        return [sum(p >= t for p in places) / len(places) for t in range(1, self.limit + 1)]

    def compared(self) -> dict[str, tuple[float, float, Interval]]:
        """Return means of both and the difference, with its bootstrap interval over prompts."""
        own, other = self.dense.measures(), self.compressed.measures()
        found = {}
        for name, before in own.items():
            after = other[name]
            gap = two_level_bootstrap([after], [before])
            found[name] = (sum(before) / len(before), sum(after) / len(after), gap)
        return found


def greedy(
    model: Any,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    tokenizer: Any,
    *,
    batch: int = BATCH,
    progress: bool = False,
    title: str = "writing",
) -> list[Written]:
    """Let a model go on from prompts, each time with the likeliest token (the first of equals).

    Texts are what they are alone: prompts of other lengths beside one are not padded (see
    :func:`~lm_calib_plugin.calibration.generation.write_batch`), and rows of a batch differ from
    single ones in last bits alone. No random number is drawn, and ``generation_config`` is not
    asked but for the end tokens.

    Parameters
    ----------
    prompts
        Token ids, at least one each.
    tokens
        Most tokens to write.

    Raises
    ------
    UserError
        When the model has not so many positions.
    NumericalError
        When its logits are not finite.
    """
    _check_positions(model, prompts, tokens)
    ends = end_ids(model, tokenizer)
    allowed = torch.ones(vocab_size(model), dtype=torch.bool)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    found: dict[int, Written] = {}
    with (
        left_as_found(model),
        tqdm(total=len(order), desc=f"{title}, prompts", disable=not progress) as bar,
    ):
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            numbers = torch.zeros(len(part), tokens)
            rows = [prompts[i] for i in part]
            written = write_batch(model, rows, numbers, _GREEDY, allowed, ends)
            for i, one in zip(part, written, strict=True):
                text = str(tokenizer.decode(one.ids, skip_special_tokens=True))
                found[i] = Written(tuple(one.ids), one.end, text)
            bar.update(len(part))
    return [found[i] for i in range(len(prompts))]


def generated(
    pair: Pair, prompts: Sequence[Sequence[int]], tokens: int, progress: bool = True
) -> Generated:
    """Let both models of a pair go on from the same prompts."""
    sides = [
        Side(tuple(greedy(m, prompts, tokens, pair.tokenizer, progress=progress, title=name)))
        for name, m in (("dense", pair.dense), ("compressed", pair.compressed))
    ]
    texts = tuple(str(pair.tokenizer.decode(list(ids))) for ids in prompts)
    return Generated(texts, tuple(tuple(ids) for ids in prompts), sides[0], sides[1], tokens)


def diagnose(
    loading: Loading,
    prompts: Prompts,
    recipe: Recipe | None = None,
    compressed: str | None = None,
    tokens: int = 64,
    runtime: Runtime | None = None,
) -> Document:
    """Compare what a model and its compressed form write.

    Parameters
    ----------
    loading
        The dense model.
    recipe, compressed
        What is done to it, or the compressed model that is there.
    tokens
        Most tokens of each text.
    """
    from lm_calib_plugin.diagnostics.generation_report import document

    if tokens < 1:
        raise UserError("new-tokens", f"got {tokens}", "1 or more")
    check_pair(recipe, compressed)
    runtime = runtime or Runtime()
    pair = open_pair(loading, recipe, compressed, runtime)
    found = generated(
        pair, prompts.drawn(pair.dense, pair.tokenizer, runtime), tokens, runtime.progress
    )
    facts: Mapping[str, Any] = {
        "model": pair.dense_name,
        "compared with": pair.name,
        "model digest": engine.model_digest(pair.dense),
        "prompts": f"{len(found.prompts)} of {prompts.name}"
        + (", with the chat template" if prompts.chat else ""),
        "written": f"greedily, {tokens} tokens at most",
        "dtype": str(pair.dense.dtype).removeprefix("torch."),
    }
    return document(pair, found, facts)


def _lines(path: Path) -> list[str]:
    if path.suffix.lower() == ".txt":
        return read_openings(str(path))
    try:
        texts = list(open_documents(path, "prompt"))
    except UserError as error:
        try:
            texts = list(open_documents(path, "text"))
        except UserError:
            raise error from None
    return [text for text in texts if text.strip()]


def _whole(one: Written) -> tuple[int, ...]:
    return one.ids if one.end is None else (*one.ids, one.end)


def _start(tokenizer: Any) -> list[int]:
    """Return the start token, where the tokenizer puts one before a text."""
    start = getattr(tokenizer, "bos_token_id", None)
    puts = start is not None and encode(tokenizer, "a", special=True)[:1] == [start]
    if puts:
        return [int(start)]
    return []


def _asked(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a question, up to where the model answers."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "chat",
            "the tokenizer has no chat template",
            "instruct and chat models have one",
            "drop --chat",
        )
    written = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        tokenize=False,
        add_generation_prompt=True,
        date_string=DATE,
    )
    return encode(tokenizer, written)


def _check_positions(model: Any, prompts: Sequence[Sequence[int]], tokens: int) -> None:
    empty = next((i for i, ids in enumerate(prompts) if not ids), None)
    if empty is not None:
        raise UserError("prompts", f"prompt {empty} is empty", "at least one token")
    limit, longest = position_limit(model), max(map(len, prompts), default=0)
    if limit is not None and longest + tokens > limit:
        raise UserError(
            "new-tokens",
            f"got {tokens} after a prompt of {longest} tokens",
            f"the model accepts {limit} positions",
            f"--new-tokens {max(1, limit - longest)}, or shorter prompts",
        )
