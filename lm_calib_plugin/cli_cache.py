"""``lm-calib cache ls | rm | verify``: compressed models that are kept for the next run."""

from __future__ import annotations

import typer


def add_to(app: typer.Typer) -> None:
    """Add the commands to the command line."""
