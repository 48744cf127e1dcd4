"""Mixtures: calibration expressions whose shares or weights are found, not typed.

What every mixture is, and the way from a recipe to a calibration set, mixture or not. The mixtures
themselves: :mod:`lm_calib_plugin.bank.searched` and :mod:`lm_calib_plugin.bank.blends`. Each ends
in an ordinary calibration set.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lm_calib_plugin import engine, registry
from lm_calib_plugin.bank.errors import check_banked
from lm_calib_plugin.bank.once import drawn_once
from lm_calib_plugin.calibration import CalibrationSet, build_calibration
from lm_calib_plugin.calibration.options import Option, read_options
from lm_calib_plugin.errors import CalibError, UserError
from lm_calib_plugin.expression import SourceTerm, every_term, expression_text
from lm_calib_plugin.method import Method
from lm_calib_plugin.recipe import ALL_FOLDS, RANDOM_SELECTION, STORED_SET, Recipe
from lm_calib_plugin.runtime import Runtime


@dataclass(frozen=True)
class Task:
    """What a mixture is resolved for.

    Parameters
    ----------
    recipe
        Its calibration is the mixture; the method and the counts are used.
    model, tokenizer, blocks, layers
        The dense model and the layers that will be compressed.
    method
        The method, with its options.
    seqlen, model_id, vocab_size
        As for :func:`~lm_calib_plugin.calibration.build_calibration`.
    runtime
        Progress bars and chunk size.
    """

    recipe: Recipe
    model: nn.Module
    tokenizer: Any
    blocks: engine.Blocks
    layers: Sequence[engine.TargetLayer]
    method: Method
    seqlen: int
    model_id: str
    vocab_size: int
    runtime: Runtime

    def draw(self, terms: Sequence[SourceTerm], count: int, fold: str) -> CalibrationSet:
        """Draw plain terms."""
        return self.drawn(self.recipe.replaced(calibration=tuple(terms), nsamples=count, fold=fold))

    def draw_plainly(self, term: SourceTerm, count: int, fold: str) -> CalibrationSet:
        """Draw one term as it comes, without the selection of the recipe: text to judge by."""
        plain = self.recipe.replaced(
            calibration=(term,),
            nsamples=count,
            fold=fold,
            select=RANDOM_SELECTION,
            pool=None,
            select_target=None,
        )
        return self.drawn(plain)

    def drawn(self, recipe: Recipe) -> CalibrationSet:
        """Return the set of a recipe without mixture."""
        return build_calibration(
            recipe,
            self.tokenizer,
            self.model,
            seqlen=self.seqlen,
            model_id=self.model_id,
            vocab_size=self.vocab_size,
            runtime=self.runtime,
        )

    def require_layers(self, name: str) -> None:
        """Raise a UserError when no layer inside the blocks is compressed."""
        if not self.layers:
            raise UserError(
                "targets",
                f"`{name}` looks at layers of the decoder blocks, none is a target",
                "a plain sum of sources where the output head alone is compressed",
                "for instance calibration=c4+self",
            )


@dataclass(frozen=True)
class Found:
    """What a mixture came to: the set, and the ridge that was found best (or None)."""

    calibration: CalibrationSet
    damp: float | None = None


class Mixture(ABC):
    """Base of every mixture.

    Class attributes
    ----------------
    name, options
        As for a source.
    fewest, most
        How many sources it takes.
    weighs
        Whether weights of the sources inside mean something; else they are refused.
    divides_folds
        Whether it draws from the folds ``choose`` and ``validate`` by itself; else from the fold
        of the recipe.
    """

    name: ClassVar[str]
    options: ClassVar[Mapping[str, Option]] = {}
    fewest: ClassVar[int] = 2
    most: ClassVar[float] = math.inf
    weighs: ClassVar[bool] = False
    divides_folds: ClassVar[bool] = False

    def __init__(self, term: SourceTerm) -> None:
        self.term = term
        written = f"{self.name}({'+'.join('ABC'[: self.fewest])})"
        self.settings = read_options(written, self.options, term.options)
        example = f"{self.name}({'+'.join(('c4', 'self', 'code')[: self.fewest])})"
        if term.argument:
            raise UserError(
                "calibration",
                f"`{self.name}` got the argument {term.argument!r}",
                "sources inside parentheses, and nothing else",
                f"for instance {example}",
            )
        count = len(term.inner)
        if not self.fewest <= count <= self.most:
            raise UserError(
                "calibration",
                f"`{term.text()}` has {count} source{'s'[: count != 1]}",
                f"`{self.name}` takes "
                + (f"{self.fewest}" if self.most == self.fewest else f"{self.fewest} or more"),
                f"for instance {example}",
            )
        texts = [inner.text() for inner in term.inner]
        twice = next((text for text in texts if texts.count(text) > 1), None)
        if twice is not None:
            raise UserError(
                "calibration",
                f"`{term.text()}` names `{twice}` twice",
                "every source once",
                f"for instance {example}",
            )
        if not self.weighs and len({inner.weight for inner in term.inner}) > 1:
            raise UserError(
                "calibration",
                f"`{self.name}` got weights: {expression_text(term.inner)}",
                f"`{self.name}` finds the shares by itself; weighted(A*0.7+B*0.3) takes the "
                "traffic of each domain",
                f"type {self.name}({'+'.join(texts)})",
            )

    def check(self, recipe: Recipe) -> None:
        """Raise a UserError when the other fields of the recipe do not go with the mixture."""
        if not recipe.needs_data:
            raise UserError(
                "calibration",
                f"`{self.name}` with method {recipe.method}, which uses no data",
                "a method whose result depends on the calibration data, such as wanda",
                "drop `calibration`, or name another method",
            )
        if self.divides_folds and recipe.fold != ALL_FOLDS:
            raise UserError(
                "fold",
                f"got {recipe.fold!r} with `{self.name}`",
                f"`{self.name}` draws from `choose` and judges on `validate` by itself; `judge` "
                "stays untouched",
                "drop `fold`",
            )

    @abstractmethod
    def resolve(self, task: Task) -> Found:
        """Return the calibration set."""
        ...


def make_task(
    recipe: Recipe, model: nn.Module, tokenizer: Any, *, seqlen: int, runtime: Runtime
) -> Task:
    """Return the task of a recipe on a model: blocks, layers and digests looked up.

    Raises
    ------
    UserError
        When the recipe does not fit the model.
    """
    blocks = engine.find_blocks(model, recipe.block_path)
    layers, _ = engine.select_layers(model, blocks, recipe.targets, recipe.ignore, recipe.untie)
    method = recipe.make_method()
    for layer in layers:
        method.check_layer(layer.name, layer.shape)
    return Task(
        recipe,
        model,
        tokenizer,
        blocks,
        # What lies behind the blocks has no place in a bank.
        [layer for layer in layers if layer.block != engine.HEAD],
        method,
        seqlen,
        engine.model_digest(model),
        int(model.get_input_embeddings().weight.shape[0]),  # type: ignore[operator]
        runtime,
    )


def draw(task: Task) -> Found:
    """Return the calibration set of a task's recipe, whether it is a mixture or not.

    Inside :func:`~lm_calib_plugin.engine.shared_statistics` a set that was drawn there before is
    given again.
    """
    return drawn_once(task, _drawn, searched=mixture_of(task.recipe) is not None)


def _drawn(task: Task) -> Found:
    mixture = mixture_of(task.recipe)
    if mixture is None:
        return Found(task.drawn(task.recipe))
    return checked_mixture(mixture, task.recipe).resolve(task)


def check_mixture(recipe: Recipe) -> None:
    """Check the mixture of a recipe, if there is one, without data or model.

    Raises
    ------
    UserError
        For an option, a source or a field of the recipe that does not go with it.
    CalibError
        When the registered class (of another package) is no mixture.
    """
    mixture = mixture_of(recipe)
    if mixture is not None:
        check_banked(recipe)
        checked_mixture(mixture, recipe)


def checked_mixture(term: SourceTerm, recipe: Recipe) -> Mixture:
    """Return the mixture of a term, its options and the recipe checked."""
    entry = registry.find("mixture", term.name, "calibration")
    made = entry.load()
    if not (isinstance(made, type) and issubclass(made, Mixture)):
        raise CalibError(
            f"mixture `{term.name}` of {entry.distribution}: {entry.target} is not a subclass of "
            f"{Mixture.__module__}.Mixture."
        )
    mixture = made(term)
    mixture.check(recipe)
    return mixture


def mixture_of(recipe: Recipe) -> SourceTerm | None:
    """Return the mixture that a recipe is calibrated with, or None."""
    terms = recipe.terms
    return terms[0] if len(terms) == 1 and terms[0].name in registry.table("mixture") else None


def stored_inside(terms: Sequence[SourceTerm]) -> list[str]:
    """Return the ``set:DIR`` terms among these and inside them, as text."""
    return [term.text() for term in every_term(terms) if term.name == STORED_SET]


def with_record(sources: Sequence[dict[str, Any]], record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return source records with what the mixture found beside the first."""
    return [s | ({"mixture": record} if i == 0 else {}) for i, s in enumerate(sources)]
