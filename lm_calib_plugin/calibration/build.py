"""From a recipe to a calibration set: source, then packing, term by term.

A stage that selects among more documents or sequences than asked for belongs between source and
packer; a source of control sequences is an :class:`~...sources.base.IdSource`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lm_calib_plugin import registry
from lm_calib_plugin.calibration.calibration_set import CalibrationSet
from lm_calib_plugin.calibration.options import ARGUMENT
from lm_calib_plugin.calibration.packers import Packed, Packer
from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.calibration.sources.base import Context, IdSource, Source
from lm_calib_plugin.calibration.tokens import check_ids, tokenizer_digest
from lm_calib_plugin.errors import CalibError, UserError
from lm_calib_plugin.expression import SourceTerm, shares
from lm_calib_plugin.guard import random_state_untouched
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.runtime import Runtime


def make_source(term: SourceTerm) -> Source:
    """Return the source of a term, options checked; a named corpus is an ``hf`` source.

    Raises
    ------
    UserError
        For an option that the source does not take.
    CalibError
        When the registered class (of another package) is no source.
    """
    corpus = registry.CORPORA.get(term.name)
    name, argument = ("hf", corpus) if corpus else (term.name, term.argument)
    entry = registry.find("calibration", name, ARGUMENT)
    made = entry.load()
    if not (isinstance(made, type) and issubclass(made, Source)):
        raise CalibError(
            f"calibration source `{name}` of {entry.distribution}: {entry.target} is not a "
            f"subclass of {Source.__module__}.Source."
        )
    return made.of(argument, term.options)


def validate_calibration(recipe: Recipe) -> None:
    """Check every term of a recipe without network, data or model.

    Raises
    ------
    UserError
        For an option, file, folder or task that cannot be used.
    """
    with random_state_untouched():
        for term in recipe.terms:
            make_source(term).validate()


def build_calibration(
    recipe: Recipe,
    tokenizer: Any,
    model: Any = None,
    *,
    seqlen: int,
    model_id: str,
    vocab_size: int,
    runtime: Runtime = Runtime(),  # noqa: B008 - frozen
) -> CalibrationSet:
    """Draw the calibration set of a recipe.

    Parameters
    ----------
    recipe
        ``terms``, ``nsamples``, ``calib_seed`` and ``pack`` are read.
    tokenizer
        Tokenizer of the model.
    model
        The dense model on its device, needed by ``self`` alone; left as found.
    seqlen
        Most tokens of a sequence.
    model_id
        Digest of the weights, the name under which generated text is kept; empty: not kept.
    vocab_size
        Rows of the embedding table; an id beyond them is refused.
    runtime
        Progress bars.

    Returns
    -------
    CalibrationSet
        Exactly ``recipe.nsamples`` sequences. Those of several sources are interleaved evenly,
        so that every stretch of the set holds each source by its share.

    Raises
    ------
    UserError
        When the recipe has no source, a source cannot be used or holds too little.
    """
    if not recipe.terms:
        raise UserError(ARGUMENT, "no source", "this recipe uses no data", "calibration=self")
    with random_state_untouched():
        drawn = []
        counts = shares(recipe.terms, recipe.nsamples)
        for position, (term, count) in enumerate(zip(recipe.terms, counts, strict=True)):
            context = Context(
                tokenizer=tokenizer,
                count=count,
                seqlen=seqlen,
                seed=derive_seed(recipe.calib_seed, position),
                vocab_size=vocab_size,
                model=model,
                model_id=model_id,
                runtime=runtime,
            )
            drawn.append(_draw(term, recipe.pack, context))
    order = interleaved([len(part.sequences) for part in drawn])
    sources = []
    for number, part in enumerate(drawn):
        rows = [row for row, (owner, _) in enumerate(order) if owner == number]
        sources.append(part.record | {"rows": rows})
    return CalibrationSet.of(
        [drawn[owner].sequences[place] for owner, place in order],
        seqlen=seqlen,
        seed=recipe.calib_seed,
        tokenizer=tokenizer_digest(tokenizer),
        sources=sources,
    )


@dataclass(frozen=True)
class _Drawn:
    """Sequences of one term and their record."""

    sequences: list[list[int]]
    record: dict[str, Any]


def _draw(term: SourceTerm, pack: str | None, context: Context) -> _Drawn:
    """Draw the sequences of one term; a share of zero opens nothing."""
    source = make_source(term)
    source.validate()
    if isinstance(source, IdSource):
        pack = None
        sequences = [ids.tolist() for ids in source.sequences(context)] if context.count else []
        packed = Packed(sequences, [], 0, 0)
    else:
        pack = pack or source.default_pack
        packed = _packed(source, pack, context) if context.count else Packed([], [], 0, 0)
    for ids in packed.sequences:
        check_ids(ids, context.vocab_size)
    record = {
        "source": term.text(),
        "weight": term.weight,
        "nsequences": len(packed.sequences),
        "pack": pack,
        "licence": None,
        "fingerprint": None,
        "documents": packed.documents,
        "truncated": packed.truncated,
        **packed.facts,
        **(source.provenance() if context.count else {}),
        "indices": packed.indices,
    }
    return _Drawn(packed.sequences, record)


def _packed(source: Source, pack: str, context: Context) -> Packed:
    packer: Packer = registry.find("packing", pack, "pack").load()()

    def windows(texts: Sequence[str]) -> int:
        return int(packer.windows(texts, context, source.joiner))

    asked = replace(context, order=packer.order, windows=windows, pack=pack)
    return packer.pack(source.documents(asked), asked, source.joiner)


def interleaved(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return (list, place) pairs that take from lists of these lengths evenly.

    The element ``i`` of a list of ``n`` stands at ``(i + 1/2) / n`` of the way; equal places go
    to the earlier list.
    """
    marks = [
        ((place + 0.5) / length, owner, place)
        for owner, length in enumerate(lengths)
        for place in range(length)
    ]
    return [(owner, place) for _, owner, place in sorted(marks)]
