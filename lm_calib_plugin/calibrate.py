"""``lm-calib calibrate``: build a calibration set once, keep it in a folder, use it anywhere."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from lm_calib_plugin import engine, storage
from lm_calib_plugin.bank.mixtures import draw, make_task, mixture_of
from lm_calib_plugin.builtin_models import PREFIX, resolve_pretrained
from lm_calib_plugin.calibration import (
    CalibrationSet,
    build_calibration,
    model_needed,
)
from lm_calib_plugin.calibration.set_folder import licences, may_replace, read_record
from lm_calib_plugin.checks import check_calibration, sequence_length
from lm_calib_plugin.errors import CalibError, UserError
from lm_calib_plugin.guard import left_as_found
from lm_calib_plugin.loading import Loading, cannot_load, load_tokenizer, load_weights
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.runtime import Runtime

# What else of a recipe decides the shares of a mixture, beside the method and its options.
_SERVED = ("exclude_first_token", "targets", "ignore", "block_path")


def calibrate(
    recipe: Recipe,
    loading: Loading,
    out: Path,
    *,
    overwrite: bool = False,
    runtime: Runtime | None = None,
) -> str:
    """Build the calibration set of a recipe in a new folder.

    Only tokenizer and configuration are loaded, unless a source needs the model itself. The set
    is the one that the same expression gives inside an evaluation of this model.

    Parameters
    ----------
    recipe
        Its calibration fields are read; the method does not matter.
    out
        The folder to make. When it holds this very set already, nothing is done.

    Returns
    -------
    str
        A summary to show.

    Raises
    ------
    UserError
        When the recipe cannot be used, or ``out`` holds something else.
    """
    began = time.perf_counter()
    unspoken = sorted(set(str(out)) & set("+*?,()"))
    if unspoken:
        raise UserError(
            "out",
            f"{str(out)!r} holds `{unspoken[0]}`",
            "calibration=set:DIR could not name it",
            "choose a folder name without + * ? , ( )",
        )
    check_calibration(recipe)
    with_model = model_needed(recipe)
    factors = _factors(recipe, loading, with_model)
    if out.exists() or out.is_symlink():
        _check_existing(out, factors, overwrite)
    drawn, tokenizer, vocab_size = _build(recipe, loading, with_model, runtime or Runtime())
    kept = False
    if out.exists() and not overwrite:
        kept = _is(out, drawn)
        if not kept:
            raise _other_set(out, drawn.calib_id)
    if not kept:
        drawn.save(
            out, tokenizer=tokenizer, vocab_size=vocab_size, factors=factors, overwrite=overwrite
        )
    what = "this set was there already, nothing was written" if kept else "written"
    return _summary(drawn, recipe, loading, out, what, time.perf_counter() - began)


def _build(
    recipe: Recipe, loading: Loading, with_model: bool, runtime: Runtime
) -> tuple[CalibrationSet, Any, int]:
    """Return the set, the tokenizer and the rows of the embedding table."""
    folder = resolve_pretrained(loading.pretrained)
    try:
        config = AutoConfig.from_pretrained(folder, **loading.of_model())
        # Before the weights, which may take minutes.
        seqlen = sequence_length(recipe, config)
        tokenizer = load_tokenizer(loading)
    except (OSError, ValueError) as error:
        raise cannot_load(loading, error) from None
    if not with_model:
        # Checkpoints whose embeddings were resized say so in their configuration.
        vocab_size = int(engine.text_config(config).vocab_size)
        drawn = build_calibration(
            recipe, tokenizer, seqlen=seqlen, model_id="", vocab_size=vocab_size, runtime=runtime
        )
        return drawn, tokenizer, vocab_size
    model = load_weights(loading)
    vocab_size = int(model.get_input_embeddings().weight.shape[0])
    with left_as_found(model):
        task = make_task(recipe, model, tokenizer, seqlen=seqlen, runtime=runtime)
        drawn = draw(task).calibration
    return drawn, tokenizer, vocab_size


def _factors(recipe: Recipe, loading: Loading, with_model: bool) -> dict[str, Any]:
    """Return every argument that decides the set, as plain values."""
    plain = recipe.to_metadata()
    chosen = {name: plain[name] for name in Recipe.calibration_fields() if name in plain}
    if mixture_of(recipe) is not None:
        served = {name: plain[name] for name in _SERVED if plain.get(name)}
        chosen |= {"for": {"method": recipe.method, **recipe.method_options(), **served}}
    model = {
        "pretrained": loading.pretrained,
        "revision": loading.revision,
        "tokenizer": loading.tokenizer,
        "subfolder": loading.subfolder or None,
    }
    if with_model:
        model |= {"dtype": loading.dtype, "device": loading.place().split(":")[0]}
    return chosen | {k: v for k, v in model.items() if v is not None}


def _check_existing(out: Path, factors: dict[str, Any], overwrite: bool) -> None:
    """Refuse what can be refused before anything is built."""
    if overwrite:
        may_replace(out, overwrite=True)
        return
    try:
        record = read_record(out)
    except CalibError:
        may_replace(out, overwrite=False)
        return
    if record.get("factors") != factors:
        raise _other_set(out, str(record.get("calib_id")))


def _is(out: Path, drawn: CalibrationSet) -> bool:
    return CalibrationSet.load(out).calib_id == drawn.calib_id


def _other_set(out: Path, calib_id: str) -> UserError:
    return UserError(
        "out",
        f"{out} holds another calibration set ({calib_id[:12]})",
        "a new folder",
        "name another one, or give --overwrite",
    )


def _served(recipe: Recipe, drawn: CalibrationSet) -> tuple[str, str]:
    """Return the model class and the method to type: those that a mixture was found for.

    The ridge found with it is an option of the method, which a set cannot hold.
    """
    if mixture_of(recipe) is None:
        return "calib_pruned", "method=wanda,sparsity=0.5"
    options = {"method": recipe.method, **recipe.method_options()}
    found = next(source["mixture"] for source in drawn.sources if "mixture" in source)
    if found.get("damp") is not None:
        options["damp"] = found["damp"]
    kind = "calib_pruned" if recipe.entry.kind == "pruning" else "calib_quantized"
    return kind, ",".join(f"{name}={value}" for name, value in options.items())


def _written(source: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what generation cost and where its text is to read, if the model wrote it."""
    cost, file = source.get("generation"), source.get("text_file")
    if not cost:
        return []
    rows = [
        (
            "written",
            f"{cost['tokens']} tokens at {cost['tokens_per_second']} a second, "
            f"{cost['kept']} of {cost['texts']} texts kept",
        )
    ]
    return rows + ([("text", str(storage.cache_dir() / file))] if file else [])


def _summary(
    drawn: CalibrationSet,
    recipe: Recipe,
    loading: Loading,
    out: Path,
    what: str,
    seconds: float,
) -> str:
    rows = [
        ("set", f"{out} ({what})"),
        ("calib_id", drawn.calib_id),
        ("sequences", f"{drawn.nsamples} of at most {drawn.seqlen} tokens, {drawn.tokens} in all"),
    ]
    for source in drawn.sources:
        rows.append(("source", f"{source['source']}: {source['nsequences']} sequences"))
        rows += _written(source)
        rows += [("warning", str(note)) for note in source.get("warnings", ())]
    rows += [("license", note) for note in licences(drawn.sources)]
    rows.append(("seconds", f"{seconds:.1f}"))
    model = loading.pretrained
    if not model.startswith(PREFIX) and loading.revision != "main":
        model += f",revision={loading.revision}"
    kind, method = _served(recipe, drawn)
    lines = [f"{name:<10} {text}" for name, text in rows]
    lines += [
        "next:",
        f"  lm_eval --model {kind} --model_args pretrained={model},{method},"
        f"calibration=set:{out} --tasks TASK",
    ]
    return "\n".join(lines)
