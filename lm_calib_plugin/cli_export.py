"""``lm-calib export | unpack | inspect``: folders that leave this program, and come back."""

from __future__ import annotations

import typer


def add_to(app: typer.Typer) -> None:
    """Add the commands to the command line."""
