"""``lm-calib inspect layers``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lm_calib_plugin.cli_arguments import MODEL
from lm_calib_plugin.cli_inspect.options import (
    Compressed,
    Device,
    Out,
    Quiet,
    RemoteCode,
    TextLength,
    TextSamples,
    TextSeed,
    Tokenizer,
)

if TYPE_CHECKING:
    from lm_calib_plugin.diagnostics.layers.reading import Run
    from lm_calib_plugin.loading import Loading

_RUN = "Results of lm_eval (file or folder), an exported folder, or a layers-*.json."
_TEXT = "What to look at the models with. Default: other documents of the calibration sources."


def inspect_layers(
    run: Annotated[str, typer.Argument(metavar="RUN", help=_RUN)],
    pretrained: Annotated[
        str | None, typer.Option(*MODEL, help="The dense model. Default: as the run names it.")
    ] = None,
    compressed: Compressed = None,
    propagation: Annotated[
        bool | None,
        typer.Option(help="Load both models; else only the report is read. Default: if possible."),
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="EXPR", help=_TEXT)] = None,
    text_samples: TextSamples = 8,
    text_length: TextLength = 256,
    text_seed: TextSeed = 0,
    out: Out = None,
    tokenizer: Tokenizer = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit. Default: that of the run.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Default: that of the run.")] = None,
    device: Device = None,
    cache: Annotated[
        str, typer.Option(help="true or a folder: where compressed models are kept.")
    ] = "false",
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Say where the error of a run arises, how it travels, and why the worst layers are bad.

    The run is compressed again by its recipe, unless an exported folder holds it. 2,048 tokens of
    text by default: about a minute for 135 million parameters on two cores, without compressing.
    """
    from lm_calib_plugin.diagnostics.document import check_out
    from lm_calib_plugin.runtime import Runtime

    folder = check_out(out)
    runtime = Runtime(progress=not quiet, cache=cache)
    from lm_calib_plugin.diagnostics.layers.opening import check_models, open_models, text_recipes
    from lm_calib_plugin.diagnostics.layers.reading import read_run
    from lm_calib_plugin.loading import Loading

    found = read_run(run)
    name = check_models(found, pretrained, compressed, propagation)
    opened = None
    if name is not None:
        own = pretrained is None  # what the run says of its model holds for that alone
        loading = Loading(
            name,
            tokenizer or (found.tokenizer if own else None),
            revision or (found.revision if own else None) or "main",
            dtype or found.dtype or "auto",
            device,
            trust_remote_code,
            found.subfolder if own else "",
        )
        texts = text_recipes(found, text, text_samples, text_length, text_seed)
        other = _other(found, compressed, loading)
        opened = open_models(found, loading, texts, *other, runtime=runtime)

    from lm_calib_plugin.diagnostics.layers.diagnosis import diagnose
    from lm_calib_plugin.diagnostics.layers.sections import document

    report = document(diagnose(found, opened, progress=not quiet))
    typer.echo(report.text())
    if folder is not None:
        typer.echo(f"\n{report.write(folder, 'layers')[0]}")


def _other(run: Run, compressed: str | None, loading: Loading) -> tuple[Any, str]:
    """Return the compressed model and its name, None and nothing where the recipe makes it.

    Exported folders are checked, file by file.
    """
    from lm_calib_plugin.diagnostics.pair import load_compressed

    name = compressed or (str(run.folder) if run.folder else "")
    return (load_compressed(name, loading), name) if name else (None, "")
