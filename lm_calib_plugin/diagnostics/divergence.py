"""Dense against compressed on the same text: how far apart, where, and on which documents.

After arXiv 2409.11233: Jensen-Shannon divergence by teacher forcing shows what perplexity hides.
Hard documents after arXiv 2506.12044: what one method breaks others break as well, and a small norm
of the last residual stream foretells it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lm_calib_plugin import engine
from lm_calib_plugin.bank.mixtures import mixture_of, stored_inside
from lm_calib_plugin.calibration import CalibrationSet
from lm_calib_plugin.calibration.contamination import ContaminationIndex, words
from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.calibration.set_folder import decoded as plain_text
from lm_calib_plugin.comparison import spearman
from lm_calib_plugin.comparison.numbers import Array, Interval
from lm_calib_plugin.diagnostics.divergence_report import Compared, Worst, document
from lm_calib_plugin.diagnostics.document import Document
from lm_calib_plugin.diagnostics.pair import Pair, check_pair, open_pair
from lm_calib_plugin.diagnostics.scoring import divergence_of, logits_of
from lm_calib_plugin.diagnostics.tally import Tally
from lm_calib_plugin.diagnostics.texts import JUDGE, draw_text, known, text_recipe
from lm_calib_plugin.diagnostics.tokens import TokenDivergence
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.expression import expression_text
from lm_calib_plugin.guard import evaluation_mode
from lm_calib_plugin.loading import Loading
from lm_calib_plugin.recipe import ALL_FOLDS, Recipe
from lm_calib_plugin.runtime import Runtime

WORST = 6  # tokens that are named; each takes a short pass
BEFORE = 12  # tokens shown before each
_NAMES = {"nsamples": "text-samples", "seqlen": "text-length", "fold": "text-fold"}
# How the calibration was cut is how its text is cut.
_CUT = ("pack", "icl_examples", "chat_template")


@dataclass(frozen=True)
class Question:
    """What is asked: which models, and on which text.

    Parameters
    ----------
    loading
        The dense model.
    recipe, compressed
        What was done to it, or the name of what became of it.
    texts
        Calibration expressions; none: that of the recipe itself. ``set:DIR`` is taken whole.
    samples, length, seed
        Sequences of each text, tokens of each, and the seed of the draw.
    fold
        Part of the documents that text is drawn from. Default: ``judge``, which no set of the fold
        ``choose`` touches; ``all`` for a model that is there, of whose calibration nothing is
        known.
    """

    loading: Loading
    recipe: Recipe | None = None
    compressed: str | None = None
    texts: Sequence[str] = ()
    samples: int = 16
    length: int = 256
    seed: int = 0
    fold: str | None = None

    def recipes(self) -> dict[str, Recipe]:
        """Return the recipe of each text, by its expression, checked without network or model.

        Raises
        ------
        UserError
            When there is nothing to compare with, or no text, or it can not be used.
        """
        check_pair(self.recipe, self.compressed)
        options: dict[str, Any] = {
            "nsamples": self.samples,
            "seqlen": self.length,
            "calib_seed": self.seed,
            "fold": self.fold or (ALL_FOLDS if self.recipe is None else JUDGE),
        }
        if not self.texts:
            options |= {name: getattr(self.recipe, name) for name in _CUT if self.recipe}
        found = {}
        for text in self.texts or [_own_text(self.recipe)]:
            found[text] = _checked(text, options)
        return found


def diagnose(question: Question, runtime: Runtime | None = None) -> Document:
    """Compare two models on texts.

    Raises
    ------
    UserError
        When something can not be used; before a model is loaded wherever it shows earlier.
    NumericalError
        When the logits of a model are not finite.
    """
    runtime = runtime or Runtime()
    recipes = question.recipes()
    pair = open_pair(question.loading, question.recipe, question.compressed, runtime)
    known = _index(pair)
    found = [
        compared(text, _drawn(recipe, pair, runtime), pair, known, runtime.progress)
        for text, recipe in recipes.items()
    ]
    facts = {"revision": question.loading.revision, "seed": question.seed}
    return document(pair, found, facts | {"model digest": engine.model_digest(pair.dense)})


def compared(
    text: str,
    drawn: CalibrationSet,
    pair: Pair,
    known: ContaminationIndex | None = None,
    progress: bool = True,
) -> Compared:
    """Compare two models on the sequences of a text; those of one token hold nothing to compare.

    Parameters
    ----------
    text
        Its name.
    known
        The calibration text, to tell which sequences overlap with it.
    """
    sequences = [ids for ids in drawn.sequences if len(ids) > 1]
    if not sequences:
        raise UserError("text", f"all sequences of {text} have one token", "two or more are needed")
    with residual_norms(pair.dense) as seen:
        parts = divergence_of(pair.dense, pair.compressed, sequences, progress)
    norms = [seen[tuple(ids.tolist())] for ids in sequences]
    rises = [float((part.nll_compressed - part.nll_dense).mean()) for part in parts]
    plain = [plain_text(pair.tokenizer, ids.tolist()) for ids in sequences]
    touched = [known is not None and known.find(words(one)) is not None for one in plain]
    return Compared(
        text,
        drawn,
        parts,
        Tally.of(parts),
        rises,
        norms,
        _related(rises, norms),
        None if known is None else touched,
        plain,
        _worst(pair, sequences, parts),
    )


@contextlib.contextmanager
def residual_norms(model: Any) -> Iterator[dict[tuple[int, ...], float]]:
    """Note the mean norm of the last residual stream state of each sequence that a model is run on.

    That is what the last block gives, before the final normalization, at the positions that predict
    a token. The first position is left out where there are others: many models park huge
    activations there. By the ids of the sequence, without pads.
    """
    found: dict[tuple[int, ...], float] = {}
    asked: list[Tensor] = []

    def ask(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        asked[:] = [inputs[0]]

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        states = states.reshape(*asked[0].shape, states.shape[-1])
        first = min(1, states.shape[1] - 2)
        norms = states[:, first:-1].float().norm(dim=-1).mean(-1).tolist()
        found.update(zip(map(tuple, asked[0].tolist()), norms, strict=True))

    last = engine.find_blocks(model).modules[-1]
    hooks = [
        model.get_input_embeddings().register_forward_pre_hook(ask),
        last.register_forward_hook(note),
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _own_text(recipe: Recipe | None) -> str:
    """Return the text that a recipe is calibrated with, as an expression."""
    example = "for instance --text c4, or --text file:my.txt"
    if recipe is None:
        given = "missing"
        raise UserError("text", given, "the text to compare the two models on", example)
    if not recipe.terms:
        given = f"missing, and `{recipe.method}` uses no calibration text"
        raise UserError("text", given, "the text to compare the two models on", example)
    if stored_inside(recipe.terms):
        given = f"missing, and {expression_text(recipe.terms)} is a finished set"
        raise UserError("text", given, "a text that the model was not calibrated with", example)
    mixture = mixture_of(recipe)
    return expression_text(recipe.terms if mixture is None else mixture.inner)


def _checked(text: str, options: Mapping[str, Any]) -> Recipe:
    try:
        # A finished set was cut when it was made, and is taken whole.
        plain = text_recipe(text)
        return plain if plain.whole_set else text_recipe(text, options)
    except UserError as error:
        raise _as_typed(error) from None


def _drawn(recipe: Recipe, pair: Pair, runtime: Runtime) -> CalibrationSet:
    try:
        return draw_text(recipe, pair.dense, pair.tokenizer, runtime)
    except UserError as error:
        raise _as_typed(error) from None


def _as_typed(error: UserError) -> UserError:
    """Return an error about fields of a set that names them as they are typed here."""
    if error.argument not in (*_NAMES, "calibration"):
        return error
    name = _NAMES.get(error.argument, "text")
    told = str(error).removeprefix(f"{error.argument}: ")
    for field, option in _NAMES.items():
        told = re.sub(rf"\b{field}=", f"--{option} ", told)
        told = re.sub(rf"\b{field}\b", f"--{option}", told)
    return UserError(name, told)


def _index(pair: Pair) -> ContaminationIndex | None:
    made = pair.calibration
    if made is None:
        return None
    return known(pair.tokenizer, made)


def _related(rises: Sequence[float], norms: Sequence[float]) -> Interval | None:
    """Return the rank correlation of the rise of the NLL with the norm; None where none ranks."""
    if len(rises) < 4 or not np.ptp(rises) or not np.ptp(norms):
        return None
    return spearman(rises, norms, seed=derive_seed("divergence", "norms"))


def _worst(
    pair: Pair, sequences: Sequence[Tensor], parts: Sequence[TokenDivergence]
) -> list[Worst]:
    """Return the positions that differ most, and what each model says there."""
    values: Array = np.concatenate([part.js.numpy() for part in parts])
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    places = np.concatenate([np.arange(len(part)) for part in parts])
    order = np.argsort(-values, kind="stable")[:WORST]
    names = _named(pair.tokenizer)
    found = []
    models = {"dense": pair.dense, "compressed": pair.compressed}
    with evaluation_mode(pair.dense), evaluation_mode(pair.compressed), torch.inference_mode():
        for number in order[values[order] > 0]:
            owner, place = int(owners[number]), int(places[number])
            ids = sequences[owner]
            shown = []
            for name, model in models.items():
                logits = logits_of(model, ids[None, : place + 1], name)[0, -1]
                best = int(logits.argmax())
                shown.append((names(best), float(logits.float().softmax(-1)[best])))
            before = names(*ids[max(0, place + 1 - BEFORE) : place + 1].tolist())
            token = names(int(ids[place + 1]))
            found.append(Worst(owner, place + 1, float(values[number]), before, token, *shown))
    return found


def _named(tokenizer: Any) -> Any:
    return lambda *ids: str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
