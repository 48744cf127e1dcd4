"""``lm-calib inspect DIR``: what an exported folder is."""

from __future__ import annotations

import typer


def inspect_folder(
    folder: str = typer.Argument(metavar="DIR", help="An exported folder, or an archive."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object, for programs."),
    verify: bool = typer.Option(True, help="Read every byte, weights included."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress bars."),
) -> None:
    """Say what an exported folder is, and whether every file is whole; else exit code 1."""
    import json
    from pathlib import Path

    from lm_calib_plugin.export.look import look

    found = look(Path(folder).expanduser(), verify=verify, progress=not quiet)
    typer.echo(json.dumps(found.plain(), indent=1) if as_json else found.table())
    raise typer.Exit(int(found.whole is False))
