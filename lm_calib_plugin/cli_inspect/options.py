"""Options that the commands of ``lm-calib inspect`` share, each said once."""

from __future__ import annotations

from typing import Annotated

import typer

from lm_calib_plugin.cli_arguments import MODEL

Pretrained = Annotated[str, typer.Option(*MODEL, help="Hub name, folder, or builtin:smollm2-135m.")]
Compressed = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="A compressed model that is there, instead of a recipe: hub or folder."
    ),
]
Text = Annotated[
    str, typer.Option(metavar="EXPR", help="What to look at the models with: c4, file:my.txt...")
]
TextSamples = Annotated[int, typer.Option(min=1, help="Sequences of that text.")]
TextLength = Annotated[int, typer.Option(min=2, help="Tokens of each, at most.")]
TextSeed = Annotated[int, typer.Option(help="Of its draw.")]
Out = Annotated[
    str | None, typer.Option(metavar="DIR", help="Folder for the page, its plots and a JSON file.")
]
Tokenizer = Annotated[str | None, typer.Option(help="Another tokenizer than that of the model.")]
Revision = Annotated[str, typer.Option(help="Branch, tag or commit of the model.")]
Dtype = Annotated[str, typer.Option(help="Of the model.")]
Device = Annotated[str | None, typer.Option(help="Of the model.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
