"""``lm-calib bank`` and ``lm-calib draws``: fill a statistics bank, and ask it about draws."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lm_calib_plugin import engine, storage
from lm_calib_plugin.bank import Bank, Part, build_bank
from lm_calib_plugin.bank.draws import Draws, draw_uncertainty
from lm_calib_plugin.bank.errors import check_banked
from lm_calib_plugin.bank.mixtures import draw, make_task, mixture_of
from lm_calib_plugin.bank.plots import plot_draws, require_plots
from lm_calib_plugin.calibration import validate_calibration
from lm_calib_plugin.checks import sequence_length
from lm_calib_plugin.errors import UserError, listed
from lm_calib_plugin.guard import left_as_found
from lm_calib_plugin.loading import Loading, load_model
from lm_calib_plugin.recipe import FOLDS, Recipe
from lm_calib_plugin.runtime import Runtime

DEFAULT_FOLDS = ("choose", "judge")


def fill(
    sources: dict[str, str],
    options: dict[str, Any],
    loading: Loading,
    out: Path,
    *,
    folds: Sequence[str] = DEFAULT_FOLDS,
    groups: int = 1,
    second_order: bool = True,
    runtime: Runtime | None = None,
) -> str:
    """Build a bank of every source in every fold.

    Parameters
    ----------
    sources
        Name -> calibration expression.
    options
        Fields of a recipe: those of the calibration set, ``targets``, ``ignore``,
        ``block_path`` and ``exclude_first_token``.
    out
        Folder of the bank; goes on with one that was begun, opens one that is finished.
    folds
        Folds that each source is drawn from.
    groups, second_order
        As in :class:`~lm_calib_plugin.bank.Part`.

    Returns
    -------
    str
        A summary to show.

    Raises
    ------
    UserError
        When something given cannot be used, or ``out`` holds something else.
    """
    began = time.perf_counter()
    runtime = runtime or Runtime()
    recipes = _recipes(sources, options, folds, groups)
    model, tokenizer = load_model(loading)
    first = next(iter(recipes.values()))
    parts = []
    with left_as_found(model):
        seqlen = sequence_length(first, model.config)
        task = make_task(first, model, tokenizer, seqlen=seqlen, runtime=runtime)
        for (name, fold), recipe in recipes.items():
            length = sequence_length(recipe, model.config)
            drawn = draw(dataclasses.replace(task, recipe=recipe, seqlen=length)).calibration
            parts.append(Part(name, fold, drawn, second_order=second_order, groups=groups))
        bank = build_bank(
            model,
            task.layers,
            task.blocks,
            parts,
            out,
            model_id=task.model_id,
            exclude_first_token=first.exclude_first_token,
            runtime=runtime,
        )
    return _bank_summary(bank, parts, loading, time.perf_counter() - began)


def _recipes(
    sources: dict[str, str], options: dict[str, Any], folds: Sequence[str], groups: int
) -> dict[tuple[str, str], Recipe]:
    """Return the recipe of every part, everything checked that can be without the model."""
    unknown = [fold for fold in folds if fold not in FOLDS]
    if unknown or not folds or len(set(folds)) < len(folds):
        raise UserError("folds", f"got {listed(folds) or 'none'}", f"of {listed(FOLDS)}, each once")
    if groups < 1:
        raise UserError("groups", f"got {groups}", "1 or more; 16 for draws of gptq or sparsegpt")
    if not sources:
        raise UserError(
            "source", "none given", "--source NAME=EXPR, once or more", "such as --source own=self"
        )
    found = {}
    for name, expression in sources.items():
        for fold in folds:
            # Any method that uses data will do: the set does not depend on it.
            recipe = Recipe(
                method="wanda", sparsity=0, calibration=expression, **(options | {"fold": fold})
            )
            if mixture_of(recipe) is not None:
                raise UserError(
                    "source",
                    f"{name}={expression}",
                    "a plain source or a sum: a bank is what mixtures are searched in",
                    "give each of its sources by itself",
                )
            validate_calibration(recipe)
            found[name, fold] = recipe
    return found


def _bank_summary(bank: Bank, parts: Sequence[Part], loading: Loading, seconds: float) -> str:
    size = sum(f.stat().st_size for f in bank.folder.iterdir() if f.is_file())
    rows = [("bank", f"{bank.folder} ({size / 2**20:.1f} MiB)")]
    for part, row in zip(parts, bank.header.parts, strict=True):
        drawn = part.calibration
        kept = f"Gram matrices of {row.groups} groups" if row.second_order else "input norms"
        what = f"{drawn.nsamples} sequences, {drawn.tokens} tokens, {kept}"
        rows.append(("part", f"{part.source} ({part.fold}): {what}"))
    rows.append(("layers", str(sum(len(row.layers) for row in bank.inputs))))
    rows.append(("seconds", f"{seconds:.1f}"))
    lines = _table(rows)
    lines += [
        "next:",
        f"  lm-calib draws {bank.folder} --pretrained {loading.pretrained} --method wanda "
        f"--sparsity 0.5 --source {parts[0].source} --nsamples 16",
    ]
    return "\n".join(lines)


def study_draws(
    folder: Path,
    loading: Loading,
    recipe: Recipe,
    source: str,
    nsamples: int,
    *,
    domains: Sequence[str] = (),
    fold: str = "choose",
    judge_fold: str = "judge",
    draws: int = 200,
    rows: int | None = 16,
    seed: int = 0,
    out: Path | None = None,
    runtime: Runtime | None = None,
) -> str:
    """Resample a source of a bank and say how much draws differ.

    Parameters
    ----------
    recipe
        Its method and the options of that are used.
    domains
        Sources to judge on; default: all that have Gram matrices in ``judge_fold``.
    rows
        Output rows of each layer that are looked at; None: all.
    out
        Folder for ``draws.json`` and, where matplotlib is installed, ``draws.png``.

    Returns
    -------
    str
        A summary to show.

    Raises
    ------
    UserError
        When the bank belongs to another model or does not hold what is asked for.
    CalibError
        When the bank is damaged.
    """
    runtime = runtime or Runtime()
    bank = Bank.open(folder)
    bank.part(source, fold)
    judged = list(dict.fromkeys(domains)) or [
        part.source for part in bank.header.parts if part.fold == judge_fold and part.second_order
    ]
    for domain in judged:
        bank.part(domain, judge_fold)
    if out is not None and (out / "draws.json").exists():
        raise UserError("out", f"{out} holds draws.json", "a new folder", "name another one")
    check_banked(recipe)
    method = recipe.make_method()
    model, _ = load_model(loading)
    with left_as_found(model):
        bank.require_model(engine.model_digest(model))
        layers = bank_layers(bank, model, recipe)
        for layer in layers:
            method.check_layer(layer.name, layer.shape)
        found = draw_uncertainty(
            bank,
            layers,
            method,
            source,
            fold=fold,
            nsamples=nsamples,
            domains=judged,
            judge_fold=judge_fold,
            draws=draws,
            rows=rows,
            seed=seed,
            progress=runtime.progress,
        )
    summary = _draws_rows(found, recipe)
    if out is not None:
        summary += _written(found, recipe, out)
    return "\n".join(_table(summary))


def bank_layers(bank: Bank, model: nn.Module, recipe: Recipe) -> list[engine.TargetLayer]:
    """Return the layers of the model that are in the bank."""
    blocks = engine.find_blocks(model, recipe.block_path)
    held = {name for row in bank.inputs for name in row.layers}
    # Experts of a kind unknown to us are not in a bank either.
    layers, _ = engine.find_layers(blocks, ("*",))
    return [layer for layer in layers if layer.name in held]


def _draws_rows(found: Draws, recipe: Recipe) -> list[tuple[str, str]]:
    options = ", ".join(f"{k}={v}" for k, v in recipe.method_options().items())
    rows = [
        ("method", f"{recipe.method} {options}"),
        (
            "draws",
            f"{found.draws} of {found.nsamples} sequences, out of {found.pool} of "
            f"{found.source} ({found.fold})",
        ),
        ("flip", f"{found.flip:.5f} of the weights differ between two draws"),
    ]
    if found.jaccard is not None:
        rows.append(("jaccard", f"{found.jaccard:.4f} overlap of what two draws remove"))
    for domain in found.domains:
        spread = 100 * found.relative_spread(domain)
        middle = found.percentile_draw(domain, 50)
        rows.append(
            ("spread", f"{spread:.2f} % of the error on {domain} (middle draw: number {middle})")
        )
    looked = "all output rows" if found.rows is None else f"{found.rows} output rows of each layer"
    rows.append(("looked at", f"{looked}, {len(found.layers)} layers"))
    rows.append(("seconds", f"{found.seconds:.1f}"))
    return rows


def _written(found: Draws, recipe: Recipe, out: Path) -> list[tuple[str, str]]:
    content = {"method": recipe.method, "options": recipe.method_options(), **found.to_json()}
    storage.write_text(out / "draws.json", json.dumps(content, indent=1))
    rows = [("written", str(out / "draws.json"))]
    try:
        require_plots()
    except UserError as error:
        return [*rows, ("no plot", str(error))]
    return [*rows, ("written", str(plot_draws([found], out / "draws.png")))]


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{name:<10} {text}" for name, text in rows]
