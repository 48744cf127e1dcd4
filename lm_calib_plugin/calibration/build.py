"""From a recipe to a calibration set: source, fold, packing, selection, term by term.

A source of control sequences is an :class:`~...sources.base.IdSource`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lm_calib_plugin import registry
from lm_calib_plugin.calibration.calibration_set import CalibrationSet, identity
from lm_calib_plugin.calibration.folds import FoldFilter, fold_seed, in_fold
from lm_calib_plugin.calibration.options import ARGUMENT
from lm_calib_plugin.calibration.packers import Packed, Packer
from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.calibration.selectors import stage
from lm_calib_plugin.calibration.sources.base import Context, IdSource, Source
from lm_calib_plugin.calibration.tokens import check_ids, tokenizer_digest
from lm_calib_plugin.errors import CalibError, UserError
from lm_calib_plugin.expression import SourceTerm, expression_text, shares
from lm_calib_plugin.guard import random_state_untouched
from lm_calib_plugin.recipe import RANDOM_SELECTION, Recipe
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
    return made(argument, term.options)


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
        with _about_the_target():
            for term in recipe.select_target or ():
                make_source(term).validate()
        stage.make_selector(recipe.select)


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
        ``terms``, ``nsamples``, ``calib_seed``, ``pack``, ``fold``, ``select``, ``pool`` and
        ``select_target`` are read.
    tokenizer
        Tokenizer of the model.
    model
        The dense model on its device, needed by ``self`` and by most selectors; left as found.
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
    stage.check_model(recipe, model)
    context = Context(
        tokenizer=tokenizer,
        count=0,
        seqlen=seqlen,
        seed=recipe.calib_seed,
        vocab_size=vocab_size,
        model=model,
        model_id=model_id,
        runtime=runtime,
        fold=recipe.fold,
    )
    with random_state_untouched():
        drawn = _draw_all(recipe, context)
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


@contextlib.contextmanager
def _about_the_target() -> Iterator[None]:
    """Name ``select_target`` in what a source says about ``calibration``."""
    try:
        yield
    except UserError as error:
        raise error.renamed("select_target") if error.argument == ARGUMENT else error from None


def _draw_all(recipe: Recipe, context: Context) -> list[_Drawn]:
    """Draw every term, or a pool of each and the chosen ones of it."""
    counts = shares(recipe.terms, recipe.nsamples)
    pools = stage.pool_sizes(recipe, counts)
    pooled = "nsamples" if pools == counts else "pool"
    targets: list[list[int]] = []
    terms = recipe.select_target or ()
    for place, (term, count) in enumerate(zip(terms, shares(terms, stage.TARGETS), strict=True)):
        seed = derive_seed(recipe.calib_seed, "target", place)
        asked = replace(context, count=count, seed=seed, count_of="select_target")
        with _about_the_target():
            targets += _draw(term, recipe.pack, asked).sequences
    drawn = []
    for place, (term, pool, count) in enumerate(zip(recipe.terms, pools, counts, strict=True)):
        seed = derive_seed(recipe.calib_seed, place)
        asked = replace(context, count=pool, seed=seed, count_of=pooled)
        part = _draw(term, recipe.pack, asked)
        selecting = recipe.select != RANDOM_SELECTION or recipe.pool is not None
        drawn.append(_select(recipe, part, count, asked, targets) if selecting else part)
    return drawn


def _select(
    recipe: Recipe, part: _Drawn, count: int, context: Context, targets: list[list[int]]
) -> _Drawn:
    """Keep the chosen sequences of a pool; ``indices`` become those of the chosen."""
    if not count:
        return part
    chosen, facts = stage.choose(recipe, part.sequences, count, context, targets)
    if targets:
        facts["target"] = {
            "source": expression_text(recipe.select_target or ()),
            "nsequences": len(targets),
            "digest": identity(tokenizer_digest(context.tokenizer), targets),
        }
    indices = part.record["indices"]
    record = part.record | {
        "nsequences": count,
        "selection": facts,
        "indices": [indices[i] for i in chosen] if indices else [],
        "chosen": chosen,
    }
    return _Drawn([part.sequences[i] for i in chosen], record)


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
        asked = replace(context, seed=fold_seed(context.seed, context.fold))
        sequences = [ids.tolist() for ids in source.sequences(asked)] if context.count else []
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
        "fold": context.fold,
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
        usable = [text for text in texts if in_fold(text, context.fold)]
        return int(packer.windows(usable, context, source.joiner))

    asked = replace(context, order=packer.order, windows=windows, pack=pack)
    chosen = FoldFilter(context.fold)
    packed = packer.pack(chosen(source.documents(asked)), asked, source.joiner)
    return replace(packed, facts={**packed.facts, "left_out": chosen.left_out})


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
