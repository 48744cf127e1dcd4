"""The two models of a finished run in memory, and the texts to look at them with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lm_calib_plugin import engine
from lm_calib_plugin.calibration import CalibrationSet
from lm_calib_plugin.calibration.build import model_needed
from lm_calib_plugin.checks import check_calibration, check_whole, vocab_size
from lm_calib_plugin.compression import compress
from lm_calib_plugin.diagnostics.layers.coordinates import rotated, scaled
from lm_calib_plugin.diagnostics.layers.reading import ARGUMENT, LAYERS, Run
from lm_calib_plugin.diagnostics.pair import recipe_words, share_equal, twin
from lm_calib_plugin.diagnostics.texts import JUDGE, draw_text, overlap, text_recipe
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.expression import expression_text
from lm_calib_plugin.loading import Loading, load_model
from lm_calib_plugin.recipe import DEFAULT_CALIBRATION, Recipe
from lm_calib_plugin.runtime import Runtime

# Calibration tokens that inputs and errors are measured on again; the first of evenly spread
# sequences.
CALIBRATION_TOKENS = 4096
_WITHOUT = "--no-propagation reads the report alone"


@dataclass
class Opened:
    """Two models, what they are, and their texts.

    ``calibration`` are sequences of the calibration set that were used (none where the set is not
    to be had), ``text`` the sequences to look at; ``notes`` say what is not as it was in the run.
    ``unlike`` are layers whose weights can not be compared with dense ones.
    """

    dense: Any
    compressed: Any
    tokenizer: Any
    dense_name: str
    name: str
    text: CalibrationSet
    calibration: list[Tensor] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unlike: set[str] = field(default_factory=set)


def check_models(
    run: Run, pretrained: str | None, compressed: str | None, wanted: bool | None
) -> str | None:
    """Return the name of the dense model to load, None where the report alone is read.

    Parameters
    ----------
    pretrained, compressed
        As typed, None for what the run itself says.
    wanted
        Whether models are to be loaded; None: unless nothing says which.

    Raises
    ------
    UserError
        When models are wanted and can not be had, before anything is loaded.
    """
    if wanted is False:
        return None
    name = pretrained or run.pretrained
    if run.kind == LAYERS and wanted is None and not (pretrained or compressed):
        return None
    if name is None:
        raise UserError(
            "pretrained",
            f"missing, and {run.place} does not say where its dense model is",
            "hub name, folder, or builtin:smollm2-135m",
            _WITHOUT,
        )
    if run.adapters and pretrained is None:
        raise UserError(
            "pretrained",
            f"adapters were merged into {name} before it was compressed",
            "the merged model",
            f"merge them, save the model and name it; {_WITHOUT}",
        )
    if compressed is None and run.folder is None:
        if run.recipe is None:
            raise UserError(
                ARGUMENT,
                f"{run.place} can not be compressed again: {run.no_recipe}",
                "the compressed model",
                f"for instance --compressed DIR; {_WITHOUT}",
            )
        check_calibration(run.recipe)
    return name


def text_recipes(
    run: Run, expression: str | None, nsamples: int, seqlen: int, seed: int
) -> list[Recipe]:
    """Return recipes of the text to look at: the first that can be drawn is taken.

    Without an ``expression``: documents of the calibration sources of the run that no set need
    touch, else other draws of them; text that the model writes itself where the run used no data.

    Raises
    ------
    UserError
        When none can be used, before anything is loaded.
    """
    size: dict[str, Any] = {"nsamples": nsamples, "seqlen": seqlen}
    if expression is not None:
        return [text_recipe(expression, {**size, "calib_seed": seed})]
    own, options = DEFAULT_CALIBRATION, dict(size)
    if run.recipe is not None and run.recipe.terms:
        own = expression_text(run.recipe.terms)
        given = {"pack": run.recipe.pack, "chat_template": run.recipe.chat_template}
        options |= {name: value for name, value in given.items() if value}
        seed += run.recipe.calib_seed + 1
    found, problem = [], None
    for part in ({"fold": JUDGE}, {}):
        try:
            found.append(text_recipe(own, {**options, "calib_seed": seed, **part}))
        except UserError as error:
            problem = error
    if not found:
        assert problem is not None
        raise UserError(
            "text",
            f"the calibration of the run ({own}) gives none ({problem})",
            "any calibration expression",
            "for instance --text c4",
        )
    return found


def open_models(
    run: Run,
    loading: Loading,
    texts: Sequence[Recipe],
    compressed: Any = None,
    name: str = "",
    runtime: Runtime | None = None,
) -> Opened:
    """Load the dense model, compress it again unless the compressed one is given, draw the texts.

    Parameters
    ----------
    loading
        The dense model.
    texts
        See :func:`text_recipes`.
    compressed, name
        The compressed model in memory, and what it is called.

    Raises
    ------
    UserError
        When a model or text can not be had, or the two do not belong together.
    """
    runtime = runtime or Runtime()
    dense, tokenizer = load_model(loading)
    check_whole(dense, "pretrained", "comparing with the dense model")
    notes = [] if run.kind == LAYERS else _same_dense(run, dense)
    used: CalibrationSet | None = None
    if compressed is None:
        assert run.recipe is not None
        compressed, used, more = _again(run, run.recipe, dense, tokenizer, runtime)
        notes, name = notes + more, recipe_words(run.recipe)
    elif vocab_size(compressed) != vocab_size(dense):
        raise UserError(
            "pretrained",
            f"{loading.pretrained} has {vocab_size(dense)} token ids, the compressed model "
            f"{vocab_size(compressed)}",
            "the model that was compressed",
        )
    else:
        notes += _same_compressed(run, compressed)
    text = _drawn(texts, dense, tokenizer, runtime, notes)
    used = used or _calibration(run, dense, tokenizer, runtime, notes)
    shared = 0 if used is None else overlap(tokenizer, used, text)
    if shared:
        notes.append(
            f"{shared} of {len(text.sequences)} sequences of the text hold 13 words in a row of "
            "the calibration set: over-fit shows less there; calibrate with fold=choose"
        )
    path = None if run.recipe is None else run.recipe.block_path
    notes += rotated(dense, run.recipe)
    unlike, more = scaled(dense, compressed, run.transforms, path)
    notes += more
    share_equal(dense, compressed)
    sequences = [] if used is None else _some(used, run.recipe)
    return Opened(
        dense, compressed, tokenizer, loading.pretrained, name, text, sequences, notes, unlike
    )


def _same_dense(run: Run, dense: Any) -> list[str]:
    found = engine.model_digest(dense)
    if not run.model_digest or found == run.model_digest:
        return []
    return [
        f"the dense model (digest {found[:12]}) is not quite that of the run "
        f"({run.model_digest[:12]}): other weights, dtype, device or configuration"
    ]


def _same_compressed(run: Run, compressed: Any) -> list[str]:
    """Say whether a model loaded from an exported folder is another one than that of the run."""
    key = (getattr(compressed, "calib_report", None) or {}).get("key")
    if key is None or key == run.key:
        return []
    return [f"the compressed model has the key {key[:12]}, the run {run.key[:12]}"]


def _again(
    run: Run, recipe: Recipe, dense: Any, tokenizer: Any, runtime: Runtime
) -> tuple[Any, CalibrationSet | None, list[str]]:
    """Compress a twin by the recipe of the run; say where the result is another one."""
    notes = []
    packed = recipe.execution == "packed"
    if packed:
        # Kernels hold levels where there are to be weights to look at; the weights are the same.
        recipe = recipe.replaced(execution="simulated")
        notes.append("execution=packed: looked at with simulated rounding")
    other = twin(dense)
    report = compress(other, tokenizer, recipe, runtime)
    if report.key != run.key and not packed:
        notes.append(
            f"compressed again it has the key {report.key[:12]}, the run {run.key[:12]}: other "
            "model, data or version"
        )
    elif report.weights_digest != run.weights_digest:
        notes.append(
            f"compressed again its weights differ in last bits (digest "
            f"{report.weights_digest[:12]}, in the run {run.weights_digest[:12]}), as on other "
            "hardware"
        )
    return other, report.calibration_set, notes


def _drawn(
    texts: Sequence[Recipe], dense: Any, tokenizer: Any, runtime: Runtime, notes: list[str]
) -> CalibrationSet:
    """Return the first text that can be drawn."""
    for number, recipe in enumerate(texts):
        try:
            found = draw_text(recipe, dense, tokenizer, runtime)
        except UserError:
            if number + 1 == len(texts):
                raise
            continue
        if len(texts) > 1 and recipe.fold != JUDGE:
            notes.append(
                "the text is another draw of the calibration sources: it may share documents with "
                "the calibration set"
            )
        return found
    raise UserError("text", "got none", "any calibration expression", "for instance --text c4")


def _calibration(
    run: Run, dense: Any, tokenizer: Any, runtime: Runtime, notes: list[str]
) -> CalibrationSet | None:
    """Draw the calibration set of the run again; None where it costs much or is another one."""
    recipe = run.recipe
    if recipe is None or not recipe.terms:
        return None
    try:
        if model_needed(recipe):
            notes.append("the calibration set is not drawn again: the model would write it anew")
            return None
        found = draw_text(recipe, dense, tokenizer, runtime)
    except UserError as error:
        notes.append(f"the calibration set can not be drawn again ({error})")
        return None
    if run.calib_id is not None and found.calib_id != run.calib_id:
        notes.append(
            f"drawn again the calibration set is another one ({found.calib_id[:12]}, in the run "
            f"{run.calib_id[:12]}): it is not looked at"
        )
        return None
    return found


def _some(used: CalibrationSet, recipe: Recipe | None) -> list[Tensor]:
    """Return evenly spread sequences of a set that were not held out, up to 4,096 tokens."""
    share = 0.0 if recipe is None else recipe.heldout
    held = set(engine.heldout_indices(used.nsamples, share))
    own = [s for i, s in enumerate(used.sequences) if i not in held]
    length = max(len(s) for s in own)
    count = max(1, min(len(own), CALIBRATION_TOKENS // length))
    return [own[i * len(own) // count][:CALIBRATION_TOKENS] for i in range(count)]
