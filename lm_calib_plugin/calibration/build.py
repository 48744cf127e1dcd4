"""From a recipe to a calibration set: source, fold, packing, selection, term by term.

A source of control sequences is an :class:`~...sources.base.IdSource`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lm_calib_plugin import registry
from lm_calib_plugin.calibration.calibration_set import CalibrationSet
from lm_calib_plugin.calibration.chat import ChatWriter
from lm_calib_plugin.calibration.folds import FoldFilter, fold_seed, in_fold
from lm_calib_plugin.calibration.options import ARGUMENT
from lm_calib_plugin.calibration.packers import Packed, Packer
from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.calibration.selectors import stage
from lm_calib_plugin.calibration.sources.base import Context, IdSource, Source
from lm_calib_plugin.calibration.sources.named import NamedCorpus
from lm_calib_plugin.calibration.sources.sets import StoredSet
from lm_calib_plugin.calibration.tokens import check_ids, tokenizer_digest
from lm_calib_plugin.errors import CalibError, UserError
from lm_calib_plugin.expression import SourceTerm, every_term, shares
from lm_calib_plugin.guard import random_state_untouched
from lm_calib_plugin.recipe import ALL_FOLDS, RANDOM_SELECTION, Recipe
from lm_calib_plugin.runtime import Runtime


def make_source(term: SourceTerm) -> Source:
    """Return the source of a term, options checked.

    Raises
    ------
    UserError
        For an option that the source does not take.
    CalibError
        When the registered class (of another package) is no source.
    """
    if term.name in registry.CORPORA:
        return NamedCorpus(term.name, term.argument, term.options)
    entry = registry.find("calibration", term.name, ARGUMENT)
    made = entry.load()
    if not (isinstance(made, type) and issubclass(made, Source)):
        raise CalibError(
            f"calibration source `{term.name}` of {entry.distribution}: {entry.target} is not a "
            f"subclass of {Source.__module__}.Source."
        )
    if term.inner:
        return made(term.argument, term.options, term.inner)
    return made.of(term.argument, term.options)


def validate_calibration(recipe: Recipe) -> None:
    """Check every term of a recipe without network, data or model.

    Raises
    ------
    UserError
        For an option, file, folder or task that cannot be used.
    """
    with random_state_untouched():
        _validate(recipe.terms)
        _check_sets(recipe.terms, recipe.nsamples, recipe)
        with _about_the_target():
            _validate(recipe.select_target or ())
        stage.make_selector(recipe.select)


def _check_sets(terms: Sequence[SourceTerm], count: int, recipe: Recipe) -> None:
    """Check every ``set:DIR``, those inside other sources too, against the share it gives."""
    for term, part in zip(terms, shares(terms, count) if terms else (), strict=True):
        if term.name == StoredSet.name:
            _check_stored(term, part, recipe)
        # A mixture shares the sequences out itself, and checks how many there are.
        mixture = term.name in registry.table("mixture")
        _check_sets(term.inner, 0 if mixture else part, recipe)


def _check_stored(term: SourceTerm, count: int, recipe: Recipe) -> None:
    source = make_source(term)
    assert isinstance(source, StoredSet)
    if recipe.nsamples_given or not recipe.whole_set:
        source.check_count(count)
    if recipe.fold != ALL_FOLDS:
        source.check_made_with("fold", recipe.fold)
    if recipe.whole_set and recipe.pack:
        source.check_made_with("pack", recipe.pack)


def _validate(terms: Sequence[SourceTerm]) -> None:
    for term in every_term(terms):
        if term.name not in registry.table("mixture"):
            make_source(term).validate()


def stored_sets(recipe: Recipe) -> list[StoredSet]:
    """Return the ``set:DIR`` terms of a recipe, inside others too; nothing is read yet."""
    made = [make_source(t) for t in every_term(recipe.terms) if t.name == StoredSet.name]
    return [source for source in made if isinstance(source, StoredSet)]


def needs_model(terms: Sequence[SourceTerm]) -> bool:
    """Tell whether sequences of these terms can only be made with the model in memory."""
    return any(
        term.name in registry.table("mixture") or make_source(term).needs_model
        for term in every_term(terms)
    )


def model_needed(recipe: Recipe) -> bool:
    """Tell whether the set of a recipe can only be made with the model in memory."""
    terms = (*recipe.terms, *(recipe.select_target or ()))
    return needs_model(terms) or stage.selection_needs_model(recipe)


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
        Exactly ``recipe.nsamples`` sequences (all of ``set:DIR`` when it stands alone and
        ``nsamples`` was not given). Those of several sources are interleaved evenly,
        so that every stretch of the set holds each source by its share.

    Raises
    ------
    UserError
        When the recipe has no source, a source cannot be used or holds too little.
    """
    if not recipe.terms:
        raise UserError(ARGUMENT, "no source", "this recipe uses no data", "calibration=self")
    if recipe.whole_set:
        (stored,) = stored_sets(recipe)
        stored.check_fits(tokenizer, vocab_size, seqlen)
        made = stored.first(recipe.nsamples if recipe.nsamples_given else None)
        if recipe.calib_seed not in (Recipe.model_fields["calib_seed"].default, made.seed):
            note = f"calib_seed={recipe.calib_seed} draws nothing from a set that is used whole"
            first = made.sources[0] | {"warnings": [*made.sources[0].get("warnings", ()), note]}
            made = replace(made, sources=(first, *made.sources[1:]))
        return made
    stage.check_model(recipe, model)
    if recipe.chat_template:
        ChatWriter(tokenizer)  # a tokenizer without template stops here
    with random_state_untouched():
        base = Context(
            tokenizer=tokenizer,
            count=recipe.nsamples,
            seqlen=seqlen,
            seed=recipe.calib_seed,
            vocab_size=vocab_size,
            model=model,
            model_id=model_id,
            runtime=runtime,
            fold=recipe.fold,
            pack_options=recipe.packing_options(),
            chat_template=recipe.chat_template,
        )
        choice = _choice(recipe, base)
        made = draw_terms(recipe.terms, recipe.nsamples, recipe.pack, base, choice=choice)
        sequences, sources, weights = made
    return CalibrationSet.of(
        sequences,
        seqlen=seqlen,
        seed=recipe.calib_seed,
        tokenizer=tokenizer_digest(tokenizer),
        sources=sources,
        weights=weights,
    )


@contextlib.contextmanager
def _about_the_target() -> Iterator[None]:
    """Name ``select_target`` in what a source says about ``calibration``."""
    try:
        yield
    except UserError as error:
        raise error.renamed("select_target") if error.argument == ARGUMENT else error from None


def _choice(recipe: Recipe, base: Context) -> stage.Choice | None:
    """Return how sequences are chosen from pools; None when they are taken as they come."""
    if recipe.pool is None and recipe.select == RANDOM_SELECTION:
        return None
    seed = derive_seed(recipe.calib_seed, "target")
    asked = replace(base, seed=seed, count_of="select_target")
    terms = recipe.select_target or ()
    with _about_the_target():
        targets, _, _ = draw_terms(terms, stage.TARGETS, recipe.pack, asked)
    return stage.Choice(recipe, targets)


def draw_terms(
    terms: Sequence[SourceTerm],
    count: int,
    pack: str | None,
    base: Context,
    first: int = 0,
    choice: stage.Choice | None = None,
) -> tuple[list[list[int]], list[dict[str, Any]], list[float] | None]:
    """Draw ``count`` sequences from a sum of terms.

    Parameters
    ----------
    pack
        Packing of every term; None: each source's own.
    base
        Context whose ``seed`` is the seed of the whole draw.
    first
        Position of the first term. The seed of a term is made of the seed of the draw and its
        position, and a term inside another starts at the position of that one: so
        ``null:shuffle(A)`` shuffles what A draws in its place.
    choice
        Chooses each term's share from a pool of that term; terms inside others give whole pools.

    Returns
    -------
    tuple
        The sequences, those of several terms interleaved evenly; a record for each term; the
        weights of the sequences, None when no term has any.
    """
    drawn = []
    parts = shares(terms, count) if terms else []
    for position, (term, part) in enumerate(zip(terms, parts, strict=True), first):

        def inner(
            terms: tuple[SourceTerm, ...], count: int, position: int = position
        ) -> tuple[list[list[int]], list[dict[str, Any]]]:
            sequences, records, _ = draw_terms(terms, count, pack, base, position)
            return sequences, records

        seed = derive_seed(base.seed, position)
        asked = replace(base, count=part, seed=seed, draw=inner)
        if choice is not None:
            asked = choice.widened(term, asked)
        made = _draw(term, pack, asked)
        drawn.append(made if choice is None else _chosen(choice, made, part, asked))
    order = interleaved([len(part.sequences) for part in drawn])
    records = []
    for number, one in enumerate(drawn):
        rows = [row for row, (owner, _) in enumerate(order) if owner == number]
        # `weight` is the share that was asked for, `share` the one that came out.
        share = len(rows) / count if count else 0.0
        records.append(one.record | {"share": share, "rows": rows})
    sequences = [drawn[owner].sequences[place] for owner, place in order]
    return sequences, records, _weights(drawn, order)


@dataclass(frozen=True)
class _Drawn:
    """Sequences of one term, their record, and their weights (None: all one)."""

    sequences: list[list[int]]
    record: dict[str, Any]
    weights: list[float] | None = None


def _chosen(choice: stage.Choice, made: _Drawn, count: int, context: Context) -> _Drawn:
    """Keep the chosen sequences of a pool; ``indices`` become those of the chosen."""
    if not count:
        return made
    places, facts = choice.choose(made.sequences, count, context)
    indices = made.record["indices"]
    record = made.record | {
        "nsequences": count,
        "selection": {k: v for k, v in facts.items() if k != "warnings"},
        "warnings": [*made.record.get("warnings", ()), *facts.get("warnings", ())],
        "indices": [indices[i] for i in places] if indices else [],
        "chosen": places,
    }
    sequences = [made.sequences[i] for i in places]
    weights = None
    if made.weights is not None:  # a token counts once on average, as in the pool
        weights = [made.weights[i] for i in places]
        counted = sum(w * len(ids) for w, ids in zip(weights, sequences, strict=True))
        weights = [w * sum(map(len, sequences)) / counted for w in weights]
    return _Drawn(sequences, record, weights)


def _weights(drawn: Sequence[_Drawn], order: Sequence[tuple[int, int]]) -> list[float] | None:
    """Return the weights in the order of the set; None when no term has any."""
    if all(part.weights is None for part in drawn):
        return None
    weights = [part.weights or [1.0] * len(part.sequences) for part in drawn]
    return [weights[owner][place] for owner, place in order]


def _draw(term: SourceTerm, pack: str | None, context: Context) -> _Drawn:
    """Draw the sequences of one term; a share of zero opens nothing."""
    source = make_source(term)
    source.validate()
    fold = context.fold
    if source.generative:
        context = replace(context, seed=fold_seed(context.seed, fold), fold=ALL_FOLDS)
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
        "fold": fold,
        "licence": None,
        "fingerprint": None,
        "documents": packed.documents,
        "truncated": packed.truncated,
        **packed.facts,
        **(source.provenance() if context.count else {}),
        "indices": packed.indices,
    }
    weights = packed.weights
    if isinstance(source, IdSource) and context.count:
        weights = source.weights()
    return _Drawn(packed.sequences, record, weights)


def _packed(source: Source, pack: str, context: Context) -> Packed:
    entry = registry.find("packing", pack, "pack")
    given = {k: v for k, v in context.pack_options.items() if k in entry.options}
    packer: Packer = entry.load()(**given)
    chat = ChatWriter(context.tokenizer) if context.chat_template else None

    def windows(texts: Sequence[str]) -> int:
        usable = [text for text in texts if in_fold(text, context.fold)]
        usable = [chat.written(text) for text in usable] if chat else usable
        return int(packer.windows(usable, context, source.joiner))

    asked = replace(context, order=packer.order, windows=windows, pack=pack)
    chosen = FoldFilter(context.fold)
    documents = chosen(source.documents(asked))
    packed = packer.pack(chat(documents) if chat else documents, asked, source.joiner)
    facts = {**packed.facts, "left_out": chosen.left_out}
    return replace(packed, facts=facts | ({"chat_template": chat.record()} if chat else {}))


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
