"""What a preflight is asked, and the recipes of the parts it needs; nothing is loaded here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lm_calib_plugin.bank.errors import check_banked
from lm_calib_plugin.bank.mixtures import checked_mixture, mixture_of, stored_inside
from lm_calib_plugin.bank.transfer import refuse_nothing
from lm_calib_plugin.checks import check_calibration
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.expression import expression_text
from lm_calib_plugin.method import Method
from lm_calib_plugin.recipe import ALL_FOLDS, Recipe

SET, CHOOSE, JUDGE = "set", "choose", "judge"


@dataclass(frozen=True)
class Question:
    """What is asked.

    Parameters
    ----------
    recipe
        Method, strength, ``nsamples``, ``seqlen``, ``calib_seed``; without ``calibration`` and
        ``fold``, which are decided here.
    sets
        Name -> calibration expression. Documents come from the fold ``choose`` (a searched mixture
        divides the folds itself, without touching ``judge``), unless the expression is a finished
        set. All sets are judged with the same ridge: a mixture does not search one here.
    domains
        Name -> calibration expression of text of the domain; its fold ``choose`` calibrates the
        domain's own reference, its fold ``judge`` is what all sets are judged on.
    judged
        Sequences of each domain to judge on; default: ``nsamples``.
    """

    recipe: Recipe
    sets: Mapping[str, str]
    domains: Mapping[str, str]
    judged: int | None = None

    def of_set(self, name: str) -> Recipe:
        """Return the recipe of a set."""
        recipe = self.recipe.replaced(calibration=self.sets[name])
        if recipe.whole_set:  # as it was built, whatever the recipe says about new ones
            given = recipe.model_fields_set - {"nsamples", "seqlen", "pack", "calib_seed"}
            return Recipe(**{field: getattr(recipe, field) for field in given})
        mixture = mixture_of(recipe)
        if mixture is None:
            return recipe.replaced(fold=CHOOSE)
        if "damp" in recipe.options:
            recipe = recipe.replaced(damp=_method(recipe).options()["damp"])
        divides = checked_mixture(mixture, recipe).divides_folds
        return recipe if divides else recipe.replaced(fold=CHOOSE)

    def of_domain(self, name: str, fold: str) -> Recipe:
        """Return the recipe of a fold of a domain."""
        count = self.recipe.nsamples if fold == CHOOSE else self.judged or self.recipe.nsamples
        return self.recipe.replaced(
            calibration=self.domains[name],
            fold=fold,
            nsamples=count,
            select="random",
            pool=None,
            select_target=None,
        )


def checked_recipes(question: Question) -> dict[tuple[str, str], Recipe]:
    """Return the recipe of every part, by name and role, all checked without the model."""
    _check_recipe(question.recipe)
    for what, given in (("set", question.sets), ("domain", question.domains)):
        if not given:
            example = "web=c4" if what == "set" else "code=file:code.txt"
            raise UserError(
                what, "none given", f"--{what} NAME=EXPR, once or more", f"for instance --{what} "
                f"{example}",
            )  # fmt: skip
    recipes: dict[tuple[str, str], Recipe] = {}
    for name in question.sets:
        with _about("set"):
            recipes[name, SET] = question.of_set(name)
            check_calibration(recipes[name, SET])
    for name in question.domains:
        with _about("domain"):
            for fold in (CHOOSE, JUDGE):
                recipes[name, fold] = question.of_domain(name, fold)
                _check_domain(name, recipes[name, fold])
                check_calibration(recipes[name, fold])
    return recipes


def _check_recipe(recipe: Recipe) -> None:
    """Refuse what leaves nothing to compare, and what is decided here."""
    if not recipe.needs_data:
        raise UserError(
            "method",
            f"`{recipe.method}` uses no calibration data",
            "a method that does, such as wanda, sparsegpt or gptq",
        )
    check_banked(recipe)
    refuse_nothing(_method(recipe))
    if recipe.calibration is not None:
        raise UserError(
            "calibration",
            f"the recipe names {expression_text(recipe.calibration)}",
            "the sets to compare are named by --set NAME=EXPR",
            "drop `calibration` and give --set",
        )
    if recipe.fold != ALL_FOLDS:
        raise UserError(
            "fold",
            f"got {recipe.fold!r}",
            f"sets are drawn from `{CHOOSE}` and judged on `{JUDGE}`",
            "drop `fold`",
        )


def _check_domain(name: str, recipe: Recipe) -> None:
    text = f"{name}={expression_text(recipe.terms)}"
    if stored_inside(recipe.terms):
        raise UserError(
            "domain",
            f"{text} is a finished set",
            "a source of documents, part of which no set has seen",
            f"for instance --domain {name}=file:{name}.txt",
        )
    if mixture_of(recipe) is not None:
        raise UserError(
            "domain",
            f"{text} is a mixture",
            "one source, or a sum of sources",
            f"for instance --domain {name}=file:{name}.txt",
        )


@contextlib.contextmanager
def _about(what: str) -> Iterator[None]:
    """Name ``set`` or ``domain`` in what a source says about ``calibration``."""
    try:
        yield
    except UserError as error:
        raise error.renamed(what) if error.argument == "calibration" else error from None


def _method(recipe: Recipe) -> Method:
    made: Method = recipe.make_method()
    return made
