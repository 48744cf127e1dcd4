"""``lm-calib inspect layers``."""

from __future__ import annotations

import typer

from lm_calib_plugin.cli_inspect.options import Pretrained


def inspect_layers(ctx: typer.Context, pretrained: Pretrained) -> None:
    """Not there yet."""
    raise NotImplementedError
