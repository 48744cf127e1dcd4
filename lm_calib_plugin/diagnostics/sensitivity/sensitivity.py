"""The command: load a model, ask what was asked, and tell it in one report."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_calib_plugin import engine
from lm_calib_plugin.accounting import versions
from lm_calib_plugin.calibration import CalibrationSet
from lm_calib_plugin.checks import check_calibration, check_whole
from lm_calib_plugin.diagnostics.document import Document, Section
from lm_calib_plugin.diagnostics.pair import recipe_words
from lm_calib_plugin.diagnostics.sensitivity.depth import probe_depth
from lm_calib_plugin.diagnostics.sensitivity.depth_shown import depth_findings, depth_section
from lm_calib_plugin.diagnostics.sensitivity.groups import probe_groups
from lm_calib_plugin.diagnostics.sensitivity.groups_shown import groups_findings, groups_section
from lm_calib_plugin.diagnostics.sensitivity.judge import FEWEST, Judge
from lm_calib_plugin.diagnostics.sensitivity.noise import probe_noise
from lm_calib_plugin.diagnostics.sensitivity.noise_shown import noise_findings, noise_section
from lm_calib_plugin.diagnostics.sensitivity.options import (
    ALIGNED,
    BLOCKS,
    DEPTH,
    GROUPS,
    NOISE,
    SensitivityOptions,
)
from lm_calib_plugin.diagnostics.sensitivity.parts import block_groups, component_groups
from lm_calib_plugin.diagnostics.sensitivity.variants import (
    Compressed,
    check_layerwise,
    compress_twin,
    why_not_exchanged,
)
from lm_calib_plugin.diagnostics.texts import JUDGE, draw_text, text_recipe
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.loading import Loading, load_model
from lm_calib_plugin.recipe import ALL_FOLDS, Recipe
from lm_calib_plugin.runtime import Runtime

SAMPLES, LENGTH = 8, 128
# The folders of paths inside an expression.
_FOLDERS = re.compile(r"(?<=[:(+])[^:(+*)]*/(?=[^/])")


@dataclass
class _Told:
    """What was found so far."""

    findings: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def check_sensitivity(
    text: str,
    recipe: Recipe | None = None,
    options: SensitivityOptions | None = None,
    text_options: Mapping[str, Any] | None = None,
) -> list[tuple[str, int, Recipe]]:
    """Refuse what can not be asked; nothing is loaded.

    Returns
    -------
    list
        The texts: name, number of the draw, and recipe; the first is that of ``text``.

    Raises
    ------
    UserError
        For a probe without the recipe that it needs, a recipe that nothing is asked of, and texts
        that can not be drawn.
    """
    options = options or SensitivityOptions()
    _check_recipe(recipe, options)
    given = {"nsamples": SAMPLES, "seqlen": LENGTH, "fold": JUDGE} | dict(text_options or {})
    if int(given["nsamples"]) < FEWEST and set(options.probes) != {DEPTH}:
        raise UserError(
            "text_samples", f"got {given['nsamples']}", f"{FEWEST} or more: intervals are over them"
        )
    texts = [(text, 0, text_recipe(text, given))]
    if DEPTH in options.probes:
        for name in options.against:
            if name == text:
                raise UserError("against", f"{name} is the text itself", "another expression")
            texts.append((name, 0, text_recipe(name, given, "against")))
        seed = int(given.get("calib_seed", 0))
        texts += [
            (name, draw, one.replaced(calib_seed=seed + draw))
            for name, _, one in list(texts)
            for draw in range(1, options.draws)
        ]
    elif options.against:
        raise UserError(
            "against", "compares rankings", "--probe depth", "add it, or drop --against"
        )
    return texts


def inspect_sensitivity(
    loading: Loading,
    text: str,
    recipe: Recipe | None = None,
    options: SensitivityOptions | None = None,
    text_options: Mapping[str, Any] | None = None,
    runtime: Runtime | None = None,
) -> Document:
    """Load a model and find out what it is sensitive to.

    Parameters
    ----------
    loading
        The dense model.
    text
        Calibration expression of the text that models are scored on, and blocks ranked with.
    recipe
        What is done to the model; None for ``depth`` and for noise alone.
    options
        What is asked.
    text_options
        Fields of a recipe that decide a set; default: 8 sequences of 128 tokens, fold ``judge``.

    Raises
    ------
    UserError
        As :func:`check_sensitivity`, before the model is loaded; and for what does not fit it.
    """
    check_sensitivity(text, recipe, options, text_options)
    model, tokenizer = load_model(loading)
    return sensitivity_of(
        model, tokenizer, text, recipe, options, text_options, runtime, loading.pretrained
    )


def sensitivity_of(
    model: Any,
    tokenizer: Any,
    text: str,
    recipe: Recipe | None = None,
    options: SensitivityOptions | None = None,
    text_options: Mapping[str, Any] | None = None,
    runtime: Runtime | None = None,
    name: str = "the model",
) -> Document:
    """Find out what a model in memory is sensitive to; it is left as found.

    The parameters are those of :func:`inspect_sensitivity`.
    """
    options, runtime = options or SensitivityOptions(), runtime or Runtime()
    texts = check_sensitivity(text, recipe, options, text_options)
    check_whole(model, "pretrained", "inspect sensitivity")
    start = time.perf_counter()
    drawn = [(one, draw, _drawn(one, r, model, tokenizer, runtime)) for one, draw, r in texts]
    told = _Told(seconds={"texts": time.perf_counter() - start})
    compressed = None
    if recipe is not None:
        start = time.perf_counter()
        compressed = compress_twin(model, tokenizer, recipe, runtime)
        told.seconds["compress"] = time.perf_counter() - start
    judge = None if set(options.probes) == {DEPTH} else Judge(drawn[0][2].sequences)
    for probe in options.probes:
        start = time.perf_counter()
        if probe == DEPTH:
            _depth(told, model, drawn, options, runtime)
        elif probe == NOISE:
            assert judge is not None
            _noise(told, model, judge, compressed, options, runtime)
        else:
            assert judge is not None
            assert compressed is not None
            _groups(told, probe, judge, compressed, options, runtime)
        told.seconds[probe] = time.perf_counter() - start
    return _document(name, told, model, drawn, recipe, compressed, judge)


def _drawn(
    text: str, recipe: Recipe, model: Any, tokenizer: Any, runtime: Runtime
) -> CalibrationSet:
    try:
        return draw_text(recipe, model, tokenizer, runtime)
    except UserError as error:
        if error.argument not in ("nsamples", "seqlen", "fold"):
            raise
        # Its fields have other names here than in a recipe.
        raise UserError(
            "text",
            f"{text}: {str(error).rstrip('.')}",
            "here these are --text-samples, --text-length and --text-fold",
        ) from None


def short_names(texts: Sequence[str]) -> dict[str, str]:
    """Return what expressions are called in sentences: of paths the last part, where that tells."""
    short = {text: _FOLDERS.sub("", text) for text in texts}
    names = list(short.values())
    return {text: name if names.count(name) == 1 else text for text, name in short.items()}


def _check_recipe(recipe: Recipe | None, options: SensitivityOptions) -> None:
    probes = "+".join(options.probes)
    if recipe is None:
        if options.compresses:
            what = (
                f"--probe {probes}" if {GROUPS, BLOCKS} & set(options.probes) else "aligned noise"
            )
            raise UserError(
                "method",
                "missing",
                f"{what} asks what a recipe does",
                "for instance --method rtn --bits 3; --probe depth and plain noise need none",
            )
        return
    if set(options.probes) == {DEPTH}:
        raise UserError(
            "method",
            f"got {recipe.method} with --probe {DEPTH}",
            "blocks are ranked in the dense model",
            "drop the recipe, or add --probe groups+depth",
        )
    check_layerwise(recipe)
    check_calibration(recipe)
    reason = why_not_exchanged(recipe)
    if reason is not None and ALIGNED in (options.noises or ()):
        raise UserError(
            "noise",
            f"`{ALIGNED}` with {recipe_words(recipe)}",
            f"signs of a weight error are known where weights can be compared; here {reason}",
            "--noise gaussian",
        )


def _groups(
    told: _Told,
    probe: str,
    judge: Judge,
    compressed: Compressed,
    options: SensitivityOptions,
    runtime: Runtime,
) -> None:
    if probe == GROUPS:
        groups = component_groups(compressed.layers, compressed.blocks, options.ends)
    else:
        groups = block_groups(compressed.layers, compressed.blocks)
    result = probe_groups(
        compressed, judge, groups, recompress=options.recompress, progress=runtime.progress
    )
    found = groups_findings(result)
    told.findings += [one for one in found if one not in told.findings]
    title = "Parts of the model" if probe == GROUPS else "Blocks"
    told.sections.append(groups_section(result, compressed.recipe, title))
    told.data[probe] = result.plain()


def _noise(
    told: _Told,
    model: Any,
    judge: Judge,
    compressed: Compressed | None,
    options: SensitivityOptions,
    runtime: Runtime,
) -> None:
    result = probe_noise(
        model,
        judge,
        compressed,
        kinds=options.noises,
        place=options.place,
        layers=options.layers,
        seeds=options.seeds,
        sizes=options.sizes,
        rise=options.rise,
        progress=runtime.progress,
    )
    told.findings += noise_findings(result)
    told.sections.append(noise_section(result))
    told.data[NOISE] = result.plain()


def _depth(
    told: _Told,
    model: Any,
    drawn: list[tuple[str, int, CalibrationSet]],
    options: SensitivityOptions,
    runtime: Runtime,
) -> None:
    titles = short_names([text for text, _, _ in drawn])
    sets = [(titles[text], draw, calibration) for text, draw, calibration in drawn]
    result = probe_depth(
        model, sets, unit=options.unit, metrics=options.metrics, progress=runtime.progress
    )
    told.findings += depth_findings(result)
    told.sections.append(depth_section(result))
    told.data[DEPTH] = result.plain()


def _document(
    name: str,
    told: _Told,
    model: Any,
    drawn: list[tuple[str, int, CalibrationSet]],
    recipe: Recipe | None,
    compressed: Compressed | None,
    judge: Judge | None,
) -> Document:
    texts = [
        {"text": text, "draw": draw, **calibration.summary()} for text, draw, calibration in drawn
    ]
    digest = engine.model_digest(model)
    facts: dict[str, Any] = {"model": name, "model digest": digest[:16]}
    for one in texts:
        words = f"{one['text']}, draw {one['draw'] + 1}: {one['nsamples']} sequences, "
        facts[f"text {len(facts) - 1}"] = words + f"{one['tokens']} tokens, {one['calib_id'][:12]}"
    if judge is not None and judge.left_out:
        facts["left out"] = f"{judge.left_out} sequences of one token: nothing to score"
    data: dict[str, Any] = {"model": name, "model_digest": digest, "texts": texts}
    if compressed is not None and recipe is not None:
        facts |= {"recipe": recipe_words(recipe), "recipe key": compressed.report.key[:16]}
        if judge is not None and recipe.terms and recipe.fold == ALL_FOLDS:
            facts["overlap"] = (
                "the recipe may be calibrated with documents of the text; --fold choose keeps them "
                "apart"
            )
        data["recipe"] = compressed.report.recipe
        data["key"] = compressed.report.key
        data["calibration"] = compressed.report.calibration
        data["achieved"] = compressed.report.achieved
        data["warnings"] = list(compressed.report.warnings)
        if compressed.report.warnings:
            facts["warnings"] = " ".join(compressed.report.warnings)
    facts["seconds"] = ", ".join(f"{k} {v:.1f}" for k, v in told.seconds.items())
    facts["versions"] = ", ".join(f"{k} {v}" for k, v in versions().items())
    data |= {
        "seconds": told.seconds,
        "versions": versions(),
        "findings": told.findings,
        **told.data,
    }
    return Document(f"Sensitivity of {name}", told.findings, facts, told.sections, data)
