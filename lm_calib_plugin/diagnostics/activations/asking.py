"""What ``lm-calib inspect activations`` asks: sets by expressions, checked before any load."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lm_calib_plugin import engine
from lm_calib_plugin.bank.mixtures import stored_inside
from lm_calib_plugin.diagnostics.activations.inspection import GRAM_BYTES, inspect
from lm_calib_plugin.diagnostics.activations.report import document
from lm_calib_plugin.diagnostics.document import Document
from lm_calib_plugin.diagnostics.texts import draw_text, text_recipe
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.expression import expression_text
from lm_calib_plugin.loading import Loading, load_model
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.runtime import Runtime

NSAMPLES, SEQLEN = 16, 256
_GIB = 1 << 30
# A name before an expression; what stands in parentheses or behind a question mark is part of it.
_NAMED = re.compile(r"([A-Za-z][\w-]*)=(.+)")


@dataclass(frozen=True)
class Asked:
    """What is looked at.

    Parameters
    ----------
    recipes
        Name of each set (given, or its expression) -> its recipe; the first is the one compared
        with.
    seqlen_given
        Whether the length of sequences was asked for, or is our default.
    gram_bytes, transforms
        As for :func:`~lm_calib_plugin.diagnostics.activations.inspect`.
    """

    recipes: Mapping[str, Recipe]
    seqlen_given: bool = False
    gram_bytes: int = GRAM_BYTES
    transforms: bool = True


def asked(
    calibration: str,
    against: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    *,
    gram: bool = True,
    gram_memory: float = GRAM_BYTES / _GIB,
    transforms: bool = True,
) -> Asked:
    """Return what is asked, checked without network, data or model.

    Parameters
    ----------
    calibration, against
        Expressions, or NAME=EXPR; those of ``against`` may be several in one, with commas between
        them.
    options
        Fields of a recipe that decide a set.
    gram, gram_memory
        Whether Gram matrices are kept, and within how many GiB.

    Raises
    ------
    UserError
        For an expression or option that can not be used, and for one set named twice.
    """
    if not gram_memory > 0:
        raise UserError(
            "gram_memory",
            f"got {gram_memory:g}",
            "GiB of memory, more than 0",
            "--gram-memory 2, or --no-gram",
        )
    options = dict(options or {})
    recipes = {}
    others = [part.strip() for text in against for part in text.split(",")]
    for name, text in [("calibration", calibration), *(("against", text) for text in others)]:
        if not text:
            raise UserError(
                name, "got an empty expression", "one set between two commas", "for instance c4"
            )
        named = _NAMED.fullmatch(text)
        recipe = _recipe(named[2] if named else text, options, name)
        title = named[1] if named else expression_text(recipe.terms)
        if title in recipes:
            raise UserError(name, f"{title} is named twice", "every set once")
        recipes[title] = recipe
    limit = int(gram_memory * _GIB) if gram else 0
    return Asked(recipes, "seqlen" in options, limit, transforms)


def inspected(question: Asked, loading: Loading, runtime: Runtime | None = None) -> Document:
    """Load the model, draw the sets, and return the report.

    Raises
    ------
    UserError
        For a model or set that can not be used.
    """
    runtime = runtime or Runtime()
    model, tokenizer = load_model(loading)
    sets = {}
    for name, recipe in question.recipes.items():
        fitting = recipe if question.seqlen_given else _shorter(recipe, model)
        sets[name] = draw_text(fitting, model, tokenizer, runtime)
    size = runtime.calib_batch_size
    result = inspect(
        model,
        tokenizer,
        sets,
        gram_bytes=question.gram_bytes,
        transforms=question.transforms,
        batch_size=None if size == "auto" else int(size),
        progress=runtime.progress,
    )
    found = {"revision": loading.revision, "dtype": str(model.dtype).removeprefix("torch.")}
    made = document(result, tokenizer, loading.pretrained, found)
    drawn = {name: recipe.to_metadata() for name, recipe in question.recipes.items()}
    wanted = {
        name: {f: plain[f] for f in Recipe.calibration_fields() if f in plain}
        for name, plain in drawn.items()
    }
    return replace(made, data={**made.data, "model_digest": _digest(model), "asked": wanted})


def _recipe(text: str, options: dict[str, Any], name: str) -> Recipe:
    """Return the recipe of a set; a finished set keeps its number and length of sequences."""
    recipe = text_recipe(text, options, name)
    if stored_inside(recipe.terms):
        return recipe
    return text_recipe(text, {"nsamples": NSAMPLES, "seqlen": SEQLEN, **options}, name)


def _shorter(recipe: Recipe, model: Any) -> Recipe:
    """Return a recipe whose default length is no longer than the model accepts."""
    limit = getattr(engine.text_config(model.config), "max_position_embeddings", None)
    if recipe.seqlen is None or not limit or recipe.seqlen <= limit:
        return recipe
    return recipe.replaced(seqlen=limit)


def _digest(model: Any) -> str:
    return str(engine.model_digest(model))
