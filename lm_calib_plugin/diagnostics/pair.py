"""A dense model beside what became of it: two models in memory that share what is equal."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lm_calib_plugin.calibration import CalibrationSet
from lm_calib_plugin.checks import check_calibration, check_whole, vocab_size
from lm_calib_plugin.compression import compress
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.export.look import look
from lm_calib_plugin.export.options import FILES
from lm_calib_plugin.expression import expression_text
from lm_calib_plugin.loading import Loading, load_model, load_weights
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.report import Report
from lm_calib_plugin.runtime import Runtime


@dataclass
class Pair:
    """Two models with one tokenizer.

    ``report`` is that of the compression, where it was done here; ``name`` says in a few words
    what ``compressed`` is, ``dense_name`` what ``dense`` is.
    """

    dense: Any
    compressed: Any
    tokenizer: Any
    dense_name: str
    name: str
    report: Report | None = None

    @property
    def calibration(self) -> CalibrationSet | None:
        """The calibration set of the compression, where it was done here with data."""
        return None if self.report is None else self.report.calibration_set


def check_pair(recipe: Recipe | None, compressed: str | None) -> None:
    """Refuse to compare with nothing, or with two things; before anything is loaded.

    Raises
    ------
    UserError
        Also when the calibration of the recipe can not be used.
    """
    if (recipe is None) == (compressed is None):
        given = "neither" if recipe is None else "both"
        raise UserError(
            "compressed",
            f"got {given} a recipe and --compressed",
            "what the dense model is compared with: a recipe, or a model that is there",
            "for instance --method wanda --sparsity 0.5 --calibration c4, or --compressed DIR",
        )
    if recipe is not None:
        check_calibration(recipe)


def open_pair(
    loading: Loading,
    recipe: Recipe | None = None,
    compressed: str | None = None,
    runtime: Runtime | None = None,
) -> Pair:
    """Load a model, and compress a twin of it or load its compressed form.

    Parameters
    ----------
    loading
        The dense model.
    recipe
        What to do to the twin.
    compressed
        Instead: hub name or folder of a compressed model.

    Raises
    ------
    UserError
        When one can not be loaded, or the two do not share a vocabulary.
    """
    check_pair(recipe, compressed)
    dense, tokenizer = load_model(loading)
    if recipe is None:
        assert compressed is not None
        other = load_compressed(compressed, loading)
        if vocab_size(other) != vocab_size(dense):
            raise UserError(
                "compressed",
                f"{compressed} has {vocab_size(other)} token ids",
                f"{loading.pretrained} has {vocab_size(dense)}: their logits can not be compared",
                "name the model that this one was made from",
            )
        share_equal(dense, other)
        return Pair(dense, other, tokenizer, loading.pretrained, compressed)
    other = twin(dense)
    report = compress(other, tokenizer, recipe, runtime or Runtime())
    share_equal(dense, other)
    return Pair(dense, other, tokenizer, loading.pretrained, recipe_words(recipe), report)


def load_compressed(name: str, loading: Loading) -> Any:
    """Return a model that is compressed already, loaded as the dense one is.

    Every file of a folder that we exported is checked first.

    Raises
    ------
    UserError
        When it can not be loaded, or is not whole.
    """
    folder = Path(name).expanduser()
    if (folder / FILES).is_file():
        found = look(folder, progress=False)
        if found.whole is False:
            raise UserError(
                "compressed",
                f"{name} is damaged",
                "a folder that is whole",
                f"lm-calib inspect {name}",
            )
    return load_weights(
        dataclasses.replace(loading, pretrained=name, revision="main", subfolder="")
    )


def twin(model: nn.Module, argument: str = "pretrained") -> Any:
    """Return a copy of a model, to compress; it takes its memory once more.

    Raises
    ------
    UserError
        For a model whose weights are offloaded; ``argument`` is named.
    """
    check_whole(model, argument, "comparing with the dense model")
    return copy.deepcopy(model)


def share_equal(dense: nn.Module, other: nn.Module) -> int:
    """Let parameters and buffers that compression did not change share memory; return the bytes.

    Neither model may be changed afterwards.
    """
    theirs = dict(other.named_parameters()) | dict(other.named_buffers())
    saved = 0
    with torch.no_grad():
        for name, mine in [*dense.named_parameters(), *dense.named_buffers()]:
            found = theirs.get(name)
            if (
                found is None
                or found.shape != mine.shape
                or found.dtype != mine.dtype
                or found.device != mine.device
                or not torch.equal(_bits(found), _bits(mine))
            ):
                continue
            found.data = mine.data
            saved += mine.numel() * mine.element_size()
    return saved


def _bits(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor as bytes: zeros of both signs differ."""
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


def recipe_words(recipe: Recipe) -> str:
    """Return a recipe as it is typed, shortly: method, options and calibration."""
    options = [f"{name}={value}" for name, value in recipe.method_options().items()]
    data = [f"calibration={expression_text(recipe.terms)}"] if recipe.terms else []
    return ",".join([f"method={recipe.method}", *options, *data])
