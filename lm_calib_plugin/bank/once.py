"""A calibration set that was drawn before is not drawn again, where things are shared.

Inside :func:`~lm_calib_plugin.engine.shared_statistics` only. Drawing reads whole files and
tokenizes much more text than it keeps, which a leaderboard would do again for every cell.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_calib_plugin import engine, storage
from lm_calib_plugin.calibration.tokens import special_ids, tokenizer_digest
from lm_calib_plugin.expression import every_term
from lm_calib_plugin.recipe import Recipe

if TYPE_CHECKING:
    from lm_calib_plugin.bank.mixtures import Found, Task


def drawn_once(task: Task, make: Callable[[Task], Found], searched: bool) -> Found:
    """Return the set of a task: the one that was drawn for an equal task, or a new one.

    Parameters
    ----------
    task
        What to draw, for which model and tokenizer.
    make
        Draws it.
    searched
        Whether the set depends on the method and its layers, too.

    Returns
    -------
    Found
        A copy of what is kept, which the caller may change.
    """
    shared = engine.shared_here()
    if shared is None:
        return make(task)
    name = ("calibration", type(task.model), _name(task, searched))
    found: Found | None = shared.recall(name)
    if found is None:
        found = make(task)
        size = sum(ids.nbytes for ids in found.calibration.sequences)
        # Beside its ids a set holds about as many numbers of documents and places.
        shared.keep(name, copy.deepcopy(found), 2 * size)
        return found
    return copy.deepcopy(found)


def _name(task: Task, searched: bool) -> str:
    """Return a name that two tasks share only if they draw the same set."""
    recipe, model = task.recipe, task.model
    fields = [*Recipe.calibration_fields(), "block_path"]
    content: dict[str, Any] = {
        "recipe": {field: repr(getattr(recipe, field)) for field in fields},
        "terms": repr(recipe.terms),
        "nsamples_given": recipe.nsamples_given,
        "files": list(_files(task)),
        "folder": str(Path.cwd()),
        "tokenizer": _tokenizer(task.tokenizer),
        "seqlen": task.seqlen,
        "model": task.model_id,
        **engine.circumstances(model),
        "ends": repr(getattr(model, "generation_config", None)),
        "vocab_size": task.vocab_size,
        "chunk": task.runtime.calib_batch_size,
    }
    if searched:
        content["method"] = repr(task.method)
        content["whole"] = repr(recipe)
        content["layers"] = [layer.name for layer in task.layers]
    return storage.digest(content)


def _tokenizer(tokenizer: Any) -> list[str]:
    """Describe a tokenizer, with what of it decides where samples begin and end."""
    marks = sorted(special_ids(tokenizer)), repr(getattr(tokenizer, "special_tokens_map", None))
    template = repr(getattr(tokenizer, "chat_template", None))
    return [type(tokenizer).__qualname__, tokenizer_digest(tokenizer), repr(marks), template]


def _files(task: Task) -> Iterator[list[Any]]:
    """Yield path, size, and time of the last change of every file that a term names."""
    for term in every_term((*task.recipe.terms, *(task.recipe.select_target or ()))):
        for value in (term.argument, *(value for _, value in term.options)):
            # What is no path at all (a language, a number) is simply not there.
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                place = Path(value).expanduser()
                if not value or not place.exists():
                    continue
                for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
                    facts = path.stat()
                    yield [str(path), facts.st_ino, facts.st_size, facts.st_mtime_ns]
