"""``lm-calib inspect divergence``."""

from __future__ import annotations

from typing import Annotated

import typer

from lm_calib_plugin.cli_arguments import given_fields
from lm_calib_plugin.cli_inspect.options import (
    Compressed,
    Device,
    Dtype,
    Out,
    Pretrained,
    Quiet,
    RemoteCode,
    Revision,
    TextLength,
    TextSamples,
    TextSeed,
    Tokenizer,
)


def inspect_divergence(
    ctx: typer.Context,
    pretrained: Pretrained,
    compressed: Compressed = None,
    text: Annotated[
        list[str],
        typer.Option(
            metavar="EXPR",
            help="What to compare on: c4, file:my.txt, set:DIR (whole)... Give one or more. "
            "Default: the source of the recipe's own calibration, other documents of it.",
        ),
    ] = [],  # noqa: B006 - how typer declares repeated options
    text_samples: TextSamples = 16,
    text_length: TextLength = 256,
    text_seed: TextSeed = 0,
    text_fold: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Documents it is drawn from: judge (those that no set of --fold choose holds), or "
            "all. Default: judge; with --compressed, all.",
        ),
    ] = None,
    out: Out = None,
    tokenizer: Tokenizer = None,
    revision: Revision = "main",
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Compare the dense model with its compressed form on the same text, token by token.

    JS divergence, KL, flips of the likeliest token and perplexity, over the full vocabulary; which
    documents and tokens have changed most.
    """
    from lm_calib_plugin.diagnostics.document import check_out
    from lm_calib_plugin.errors import UserError
    from lm_calib_plugin.recipe import read_arguments
    from lm_calib_plugin.runtime import Runtime

    given = given_fields(ctx)
    recipe = read_arguments(given)[0] if given else None
    folder = check_out(out)
    twice = next((one for one in text if text.count(one) > 1), None)
    if twice is not None:
        raise UserError("text", f"{twice} is given twice", "every text once", "drop one")

    from lm_calib_plugin.diagnostics.divergence import Question, diagnose
    from lm_calib_plugin.loading import Loading

    loading = Loading(pretrained, tokenizer, revision, dtype, device, trust_remote_code)
    question = Question(
        loading, recipe, compressed, text, text_samples, text_length, text_seed, text_fold
    )
    found = diagnose(question, Runtime(progress=not quiet))
    typer.echo(found.text())
    if folder is not None:
        for path in found.write(folder, "divergence"):
            typer.echo(f"wrote {path}", err=True)
