"""``lm-calib inspect sensitivity``."""

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
    Text,
    TextLength,
    TextSamples,
    TextSeed,
    Tokenizer,
)


def inspect_sensitivity(
    ctx: typer.Context,
    pretrained: Pretrained,
    text: Text,
    probe: str = typer.Option("groups", help="groups, blocks, noise, depth; several joined by +."),
    text_samples: TextSamples = 8,
    text_length: TextLength = 128,
    text_seed: TextSeed = 0,
    text_fold: str = typer.Option("judge", help="Documents of it: judge (a fifth), or all."),
    recompress: bool = typer.Option(
        False, "--recompress", help="groups, blocks: compress anew for each, do not exchange."
    ),
    ends: int = typer.Option(None, help="groups: blocks in the first and last. Default: 2."),
    noise: str = typer.Option(
        None, help="noise: gaussian, uniform, aligned (signs of the rounding error), joined by +."
    ),
    noise_in: str = typer.Option("weights", help="noise: on weights or inputs of layers."),
    noise_layers: str = typer.Option(
        None, metavar="PATTERNS", help="noise: attention, mlp or names joined by +. Default: all."
    ),
    noise_seeds: int = typer.Option(2, min=1, help="noise: draws of each."),
    rise: float = typer.Option(0.1, help="noise: nats to tell the size for."),
    unit: str = typer.Option("block", help="depth: rank block, attention or mlp."),
    metric: str = typer.Option(None, help="depth: cosine, l1, l2, logit, loss, joined by +."),
    against: str = typer.Option(None, metavar="EXPR,EXPR", help="depth: further texts."),
    draws: int = typer.Option(1, min=1, help="depth: draws of each text."),
    out: Out = None,
    tokenizer: Tokenizer = None,
    revision: Revision = "main",
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Find which parts carry the damage of a recipe, how much noise a model takes, and which blocks
    it would miss least. Depth, and noise that is not aligned, need no recipe.
    """
    from lm_calib_plugin.diagnostics.document import check_out
    from lm_calib_plugin.diagnostics.sensitivity.options import SensitivityOptions
    from lm_calib_plugin.recipe import read_arguments
    from lm_calib_plugin.runtime import Runtime

    options = SensitivityOptions(
        probe, recompress, ends, noise, noise_in, noise_layers, noise_seeds,
        rise=rise, unit=unit, metrics=metric, against=against or (), draws=draws,
    )  # fmt: skip
    folder = check_out(out)
    given = given_fields(ctx)
    recipe = read_arguments(given)[0] if given else None

    from lm_calib_plugin.diagnostics.sensitivity import inspect_sensitivity as inspect
    from lm_calib_plugin.loading import Loading

    document = inspect(
        Loading(pretrained, tokenizer, revision, dtype, device, trust_remote_code),
        text,
        recipe,
        options,
        {
            "nsamples": text_samples,
            "seqlen": text_length,
            "calib_seed": text_seed,
            "fold": text_fold,
        },
        Runtime(progress=not quiet),
    )
    typer.echo(document.text())
    if folder is not None:
        for path in document.write(folder, "sensitivity"):
            typer.echo(str(path))
