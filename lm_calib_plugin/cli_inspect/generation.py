"""``lm-calib inspect generation``."""

from __future__ import annotations

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
    Tokenizer,
)


def inspect_generation(
    ctx: typer.Context,
    pretrained: Pretrained,
    compressed: Compressed = None,
    prompts: str = typer.Option(
        None,
        metavar="EXPR|FILE",
        help="What to go on from: the beginnings of documents of an expression, lines of a .txt, "
        "or `prompt` of a .jsonl. Default: openings (with --chat: questions) of this package.",
    ),
    prompt_count: int = typer.Option(
        16, min=1, help="How many, at most; 50 tell rates to within about 14 points."
    ),
    prompt_length: int = typer.Option(16, min=1, help="Tokens of each that is drawn from text."),
    prompt_seed: int = typer.Option(0, help="Of their draw."),
    new_tokens: int = typer.Option(64, min=1, help="Tokens to write, at most."),
    chat: bool = typer.Option(False, "--chat", help="Ask with the chat template."),
    out: Out = None,
    tokenizer: Tokenizer = None,
    revision: Revision = "main",
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Let the dense and the compressed model write greedily, and compare: loops, lengths, refusals,
    first differences; all texts are kept for reading.
    """
    from lm_calib_plugin.diagnostics.document import check_out
    from lm_calib_plugin.recipe import read_arguments
    from lm_calib_plugin.runtime import Runtime

    given = given_fields(ctx)
    recipe = read_arguments(given)[0] if given else None
    folder = check_out(out)

    from lm_calib_plugin.diagnostics.generation import Prompts, diagnose
    from lm_calib_plugin.diagnostics.pair import check_pair
    from lm_calib_plugin.loading import Loading

    check_pair(recipe, compressed)
    asked = Prompts(prompts, prompt_count, prompt_length, chat, prompt_seed)
    loading = Loading(pretrained, tokenizer, revision, dtype, device, trust_remote_code)
    found = diagnose(loading, asked, recipe, compressed, new_tokens, Runtime(progress=not quiet))
    typer.echo(found.text())
    if folder is not None:
        for path in found.write(folder, "generation"):
            typer.echo(f"wrote {path}", err=True)
