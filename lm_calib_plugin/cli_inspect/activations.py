"""``lm-calib inspect activations``."""

from __future__ import annotations

import typer

from lm_calib_plugin.cli_arguments import given_fields
from lm_calib_plugin.cli_inspect.options import (
    Device,
    Dtype,
    Out,
    Pretrained,
    Quiet,
    RemoteCode,
    Revision,
    Tokenizer,
)


def inspect_activations(
    ctx: typer.Context,
    pretrained: Pretrained,
    calibration: str = typer.Option(
        ..., metavar="[NAME=]EXPR", help="The set to look at: c4, self, code=file:my.txt..."
    ),
    against: list[str] = typer.Option(  # noqa: B008
        [], metavar="[NAME=]EXPR,...", help="Sets to compare it with; may be given several times."
    ),
    gram: bool = typer.Option(True, help="Compare second moments and their subspaces, too."),
    gram_memory: float = typer.Option(
        2.0, metavar="GIB", help="For Gram matrices at a time; more passes where it is short."
    ),
    transforms: bool = typer.Option(True, help="Rounding after SmoothQuant and rotation, too."),
    out: Out = None,
    tokenizer: Tokenizer = None,
    revision: Revision = "main",
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Say what the layers of a model see: outliers, massive activations, what rounding would do,
    and whether it depends on the set.

    By default 16 sequences of 256 tokens of each set.
    """
    options = given_fields(ctx)

    from lm_calib_plugin.diagnostics.activations.asking import asked, inspected
    from lm_calib_plugin.diagnostics.document import check_out
    from lm_calib_plugin.loading import Loading
    from lm_calib_plugin.runtime import Runtime

    folder = check_out(out)
    question = asked(
        calibration, against, options, gram=gram, gram_memory=gram_memory, transforms=transforms
    )
    loading = Loading(pretrained, tokenizer, revision, dtype, device, trust_remote_code)
    found = inspected(question, loading, Runtime(progress=not quiet))
    typer.echo(found.text())
    if folder is not None:
        found.write(folder, "activations")
