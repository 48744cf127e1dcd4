"""Plots of what a bank tells: spread of draws, transfer between domains, proxy against measured.

Drawn on figures of their own with the file renderer: neither the state of ``pyplot`` nor a
display is touched.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lm_calib_plugin import storage
from lm_calib_plugin.bank.draws import Draws
from lm_calib_plugin.bank.transfer import Transfer
from lm_calib_plugin.comparison import spearman
from lm_calib_plugin.errors import UserError

FORMATS = ("png", "pdf", "svg")
_COLORS = "tab10"


@dataclass(frozen=True)
class Point:
    """One calibration set: its ``source``, the proxy error, and what a full evaluation measured."""

    source: str
    proxy: float
    measured: float


def require_plots() -> None:
    """Raise a UserError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            "plots",
            "matplotlib is not installed",
            "plots are an optional part",
            "pip install 'lm-calib-plugin[plots]'",
        ) from None


def plot_draws(draws: Sequence[Draws], file: str | Path) -> Path:
    """Draw the distribution of E_g over draws, and the overlap of what draws remove, by layer.

    Parameters
    ----------
    draws
        One entry a source.
    file
        ``.png``, ``.pdf`` or ``.svg``; replaced when it is there.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    UserError
        Without matplotlib, for another kind of file, or when there is nothing to draw.
    """
    file = _check(file, draws)
    domains = list(dict.fromkeys(d for found in draws for d in found.domains))
    overlaps = [found for found in draws if found.jaccard is not None]
    count = len(domains) + bool(overlaps)
    figure, axes = _figure(max(1, count), width=4.2, height=3.4)
    for axis, domain in zip(axes, domains, strict=False):
        shown = [found for found in draws if domain in found.domains]
        parts = axis.violinplot(
            [found.errors(domain).tolist() for found in shown], showmedians=True
        )
        for number, body in enumerate(parts["bodies"]):
            body.set_facecolor(_color(number))
        axis.set_xticks(range(1, len(shown) + 1), [found.source for found in shown])
        axis.set_ylabel(f"error on {domain} (sum over layers)")
        axis.set_xlabel(f"calibrated on, {shown[0].draws} draws")
    if overlaps:
        for found in overlaps:
            values = [layer.jaccard for layer in found.layers]
            axes[-1].plot(values, ".-", color=_color(draws.index(found)), label=found.source)
        axes[-1].set_xlabel("layer")
        axes[-1].set_ylabel("mean Jaccard of two draws' removed weights")
        axes[-1].legend()
    elif not domains:
        axes[0].set_axis_off()
        axes[0].text(0.5, 0.5, "no domain was judged", ha="center")
    return _write(figure, file)


def plot_transfer(found: Transfer, file: str | Path) -> Path:
    """Draw R_g of every set on every domain as a heat map; cells that do not transfer are marked.

    Parameters and errors as for :func:`plot_draws`.
    """
    file = _check(file, found.entries)
    sets, domains = found.sets, found.domains
    figure, (axis,) = _figure(1, width=2.4 + 0.9 * len(domains), height=1.6 + 0.45 * len(sets))
    regrets = torch.tensor([[found.at(s, d).regret for d in domains] for s in sets])
    image = axis.imshow(regrets.log().numpy(), cmap="Reds", vmin=0, aspect="auto")
    dark = image.get_clim()[1] / 2
    for row, name in enumerate(sets):
        for column, domain in enumerate(domains):
            entry = found.at(name, domain)
            text = f"{entry.regret:.2f}" + ("" if entry.transfers else " ×")
            white = bool(regrets[row, column].log() > dark)
            color = "white" if white else "black"
            axis.text(column, row, text, ha="center", va="center", color=color)
    axis.set_xticks(range(len(domains)), domains)
    axis.set_yticks(range(len(sets)), sets)
    axis.set_xlabel("judged on")
    axis.set_ylabel("calibrated on")
    axis.set_title(f"{found.method}: error / error of own text\n(×: does not transfer)", fontsize=9)
    return _write(figure, file)


def plot_proxy(points: Sequence[Point], file: str | Path, *, within: bool = False) -> Path:
    """Draw the proxy error against what was measured, with Spearman's rank correlation.

    Parameters and errors as for :func:`plot_draws`; ``points`` need two or more. ``within``: the
    groups have levels of their own (domains), so the correlation of each is told, not that of all.
    """
    file = _check(file, points)
    figure, (axis,) = _figure(1, width=4.6, height=3.8)
    for number, source in enumerate(dict.fromkeys(p.source for p in points)):
        own = [p for p in points if p.source == source]
        x, y = [p.proxy for p in own], [p.measured for p in own]
        label = f"{source} ({spearman(x, y).value:.2f})" if within else source
        axis.scatter(x, y, color=_color(number), label=label)
    title = f"{len(points)} points (Spearman within each group)"
    if not within:
        rank = spearman([p.proxy for p in points], [p.measured for p in points])
        title = f"Spearman {rank.value:.2f}, {len(points)} points"
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("proxy: relative error of layer outputs")
    axis.set_ylabel("measured")
    axis.legend()
    return _write(figure, file)


def _check(file: str | Path, content: Sequence[Any]) -> Path:
    require_plots()
    file = Path(file)
    if file.suffix.lstrip(".").lower() not in FORMATS:
        raise UserError("file", f"got {file.name}", "a .png, .pdf or .svg file")
    if not content:
        raise UserError("plots", "nothing to draw", "one entry or more")
    return file


def _figure(columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, list(axes)


def _color(number: int) -> Any:
    import matplotlib

    return matplotlib.colormaps[_COLORS](number % 10)


def _write(figure: Any, file: Path) -> Path:
    content = io.BytesIO()
    figure.savefig(content, format=file.suffix.lstrip(".").lower(), dpi=150)
    storage.write_bytes(file, content.getvalue())
    return file
