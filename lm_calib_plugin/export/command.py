"""``lm-calib export``: load, compress, and write a folder that plain transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lm_calib_plugin import engine
from lm_calib_plugin.builtin_models import resolve_pretrained
from lm_calib_plugin.checks import check_calibration
from lm_calib_plugin.compression import compress, is_main_process
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.export.card import base_license
from lm_calib_plugin.export.card_results import scores
from lm_calib_plugin.export.folder import asked_of, check_out, export_model
from lm_calib_plugin.export.formats import check_export, check_model
from lm_calib_plugin.export.options import ExportOptions, Provenance
from lm_calib_plugin.guard import launched_together
from lm_calib_plugin.loading import Loading, load_model
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.runtime import Runtime


def export(
    recipe: Recipe,
    loading: Loading,
    out: Path,
    *,
    options: ExportOptions | None = None,
    runtime: Runtime | None = None,
    results: Path | None = None,
    dense_results: Path | None = None,
    license: str | None = None,
    command: str | None = None,
) -> str:
    """Compress a model by a recipe, and write it to a new folder.

    Processes that ``torchrun`` started divide the work; the first one writes.

    Parameters
    ----------
    results, dense_results
        Results files of lm_eval for the table in the model card, of the compressed model and of
        the base model.
    license
        Of the base model; default: what its card says.
    command
        The line that was typed, for the card.

    Returns
    -------
    str
        A summary to show; empty for all processes but the first.

    Raises
    ------
    UserError
        When anything given can not be used; before the model is loaded wherever that can be told.
    """
    options, runtime = options or ExportOptions(), runtime or Runtime()
    check_export(recipe, options.format)
    check_out(out, recipe, options.overwrite, asked=asked_of(loading.pretrained, options))
    check_calibration(recipe)
    given = {"results": results, "dense_results": dense_results}
    found = {
        name: None if path is None else read_results(path, name) for name, path in given.items()
    }
    with launched_together():
        model, tokenizer = load_model(loading)
        engine.check_supported(model)
        check_model(model, recipe, options.format)
        report = compress(model, tokenizer, recipe, runtime)
        speaks = is_main_process()
    if not speaks:
        return ""
    provenance = Provenance(
        loading.pretrained,
        None if loading.revision == "main" else loading.revision,
        license or base_license(resolve_pretrained(loading.pretrained)),
        command,
        trust_remote_code=loading.trust_remote_code,
        **found,
    )
    done = export_model(model, tokenizer, recipe, report, out, options, provenance)
    return "\n".join(
        [
            report.line(),
            *(f"warning: {note}" for note in report.warnings),
            done.line(),
            "next:",
            f"  lm_eval --model hf --model_args pretrained={out} --tasks TASK",
            f"  lm-calib inspect {out}",
        ]
    )


def read_results(path: Path, name: str = "results") -> dict[str, Any]:
    """Return a results file of lm_eval.

    Raises
    ------
    UserError
        When it is none; ``name`` is the argument.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        scores(content)
    except OSError as error:
        raise UserError(name, f"{path} can not be read ({error.strerror})") from None
    except UserError as error:
        raise error.renamed(name) from None
    except ValueError:
        raise UserError(
            name, f"{path} is no JSON", "the file that `lm_eval --output_path DIR` writes"
        ) from None
    return dict(content)
