"""``lm-calib inspect divergence``."""

from __future__ import annotations

import typer

from lm_calib_plugin.cli_inspect.options import Pretrained


def inspect_divergence(ctx: typer.Context, pretrained: Pretrained) -> None:
    """Not there yet."""
    raise NotImplementedError
