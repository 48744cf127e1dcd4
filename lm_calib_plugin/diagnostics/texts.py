"""Text to look at a model with: any calibration expression, drawn as calibration sets are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_calib_plugin import engine
from lm_calib_plugin.bank.mixtures import draw, make_task
from lm_calib_plugin.calibration import CalibrationSet
from lm_calib_plugin.calibration.contamination import ContaminationIndex, words
from lm_calib_plugin.calibration.set_folder import decoded as plain_text
from lm_calib_plugin.checks import check_calibration, sequence_length
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.expression import NO_DATA
from lm_calib_plugin.guard import left_as_found
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.runtime import Runtime

# Any method that uses data: a recipe has to name one, and nothing is compressed here.
_PLAIN = {"method": "wanda", "sparsity": 0}
# Documents that a text is drawn from unless asked otherwise: no calibration set need touch them.
JUDGE = "judge"


def text_recipe(
    expression: str, options: Mapping[str, Any] | None = None, name: str = "text"
) -> Recipe:
    """Return the recipe of a text, checked without network, data or model.

    Parameters
    ----------
    expression
        As for ``calibration=``.
    options
        Fields of a recipe that decide a set: ``nsamples``, ``seqlen``, ``calib_seed``, ``pack``...
    name
        The argument that errors name.

    Raises
    ------
    UserError
        When it can not be used.
    """
    if expression.strip().lower() == NO_DATA:
        raise UserError(name, "got none", "a source of text", "for instance c4 or file:my.txt")
    try:
        recipe = Recipe(**{**_PLAIN, "calibration": expression, **(options or {})})
        check_calibration(recipe)
    except UserError as error:
        raise error.renamed(name) if error.argument == "calibration" else error from None
    return recipe


def draw_text(
    recipe: Recipe, model: Any, tokenizer: Any, runtime: Runtime | None = None
) -> CalibrationSet:
    """Return the sequences of a text; the model is left as found."""
    engine.check_supported(model)
    seqlen = sequence_length(recipe, model.config)
    with left_as_found(model):
        task = make_task(recipe, model, tokenizer, seqlen=seqlen, runtime=runtime or Runtime())
        return draw(task).calibration


def known(tokenizer: Any, calibration: CalibrationSet) -> ContaminationIndex:
    """Return the word sequences of a set, to look for them in a text."""
    return ContaminationIndex([plain_text(tokenizer, s.tolist()) for s in calibration.sequences])


def overlap(tokenizer: Any, calibration: CalibrationSet, text: CalibrationSet) -> int:
    """Return how many sequences of a text hold 13 words in a row of a calibration set."""
    index = known(tokenizer, calibration)
    parts = [words(plain_text(tokenizer, s.tolist())) for s in text.sequences]
    return sum(index.find(part) is not None for part in parts)


def decoded(tokenizer: Any, ids: Any, limit: int = 400) -> str:
    """Return the beginning of a sequence as text, for people."""
    text = str(tokenizer.decode(ids))
    return text if len(text) <= limit else f"{text[:limit]} ..."
