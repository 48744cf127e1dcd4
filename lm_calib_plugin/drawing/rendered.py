"""A figure as files, and as an element for a page; the same figure gives the same bytes.

Drawn on figures of their own with the file renderer; neither the state of ``pyplot`` nor a display
is touched.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lm_calib_plugin.drawing import svg
from lm_calib_plugin.drawing.words import one_line

SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lm-calib",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "text.parse_math": False,  # names may hold a dollar sign
    "axes.unicode_minus": True,
}


@dataclass(frozen=True)
class Rendered:
    """A figure: ``png``, an ``svg`` file, and the SVG element ``inline`` for a page."""

    png: bytes
    svg: str
    inline: str


def available() -> bool:
    """Tell whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """Draw with our settings, whatever those of the user are, and leave these alone."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        ours: Any = matplotlib.rcParams
        ours.update(SETTINGS)
        # Fonts do not know every name that people give; the table and the description do.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def rendered(
    paint: Callable[[svg.Palette], Any], name: str, title: str, description: str
) -> Rendered:
    """Return a figure, drawn inside :func:`settings`.

    Parameters
    ----------
    paint
        Draws it in given colors, on :func:`~lm_calib_plugin.drawing.canvas.new_figure`.
    name
        Unique on a page.
    title, description
        For those who can not see it.
    """
    png = _saved(paint(svg.LIGHT), "png")
    raw = _saved(paint(svg.ADAPTIVE), "svg")
    inline = svg.adaptive(raw, name, one_line(title), one_line(description))
    return Rendered(png, svg.standalone(inline), inline)


def _saved(figure: Any, kind: str) -> bytes:
    content = io.BytesIO()
    if kind == "png":
        figure.savefig(content, format=kind, dpi=200, metadata={"Software": None})
    else:
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(content, format=kind, transparent=True, metadata=nothing)
    return content.getvalue()
