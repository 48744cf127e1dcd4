"""``lm-calib inspect``: what an exported folder is; what compression changed, where, and why."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from lm_calib_plugin.cli_arguments import WithRecipe, WithSet
from lm_calib_plugin.cli_inspect.activations import inspect_activations
from lm_calib_plugin.cli_inspect.answers import inspect_answers
from lm_calib_plugin.cli_inspect.divergence import inspect_divergence
from lm_calib_plugin.cli_inspect.folder import inspect_folder
from lm_calib_plugin.cli_inspect.generation import inspect_generation
from lm_calib_plugin.cli_inspect.layers import inspect_layers
from lm_calib_plugin.cli_inspect.sensitivity import inspect_sensitivity

FOLDER = "folder"


class _OrFolder(TyperGroup):
    """A group of commands, of which the one about folders need not be named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        asks_help = not args or args[0] in ("--help", "--install-completion", "--show-completion")
        if not asks_help and args[0] not in self.commands:
            args = [FOLDER, *args]
        return list(super().parse_args(ctx, args))


def add_to(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    group = typer.Typer(
        cls=_OrFolder,
        rich_markup_mode=None,
        no_args_is_help=True,
        help="Look at an exported folder (inspect DIR), or at what compression changed.",
    )
    group.command(FOLDER)(inspect_folder)
    group.command("activations", cls=WithSet)(inspect_activations)
    group.command("divergence", cls=WithRecipe)(inspect_divergence)
    group.command("answers")(inspect_answers)
    group.command("sensitivity", cls=WithRecipe)(inspect_sensitivity)
    group.command("layers")(inspect_layers)
    group.command("generation", cls=WithRecipe)(inspect_generation)
    app.add_typer(group, name="inspect")
