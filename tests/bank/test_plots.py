"""Plots are files that appear whole, drawn without touching the state of pyplot."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_calib_plugin.bank import plots
from lm_calib_plugin.bank.draws import Draws, LayerDraws
from lm_calib_plugin.bank.plots import Point, plot_draws, plot_proxy, plot_transfer
from lm_calib_plugin.bank.transfer import Entry, Transfer
from lm_calib_plugin.errors import UserError


def draws(source: str, domains: tuple[str, ...] = ("p",), jaccard: float | None = 0.9) -> Draws:
    errors = torch.rand(20, len(domains), dtype=torch.float64)
    layers = tuple(LayerDraws(n, 0.1, jaccard, errors) for n in "xyz")
    return Draws(source, "choose", 4, domains, layers, 16, torch.ones(20, 8), 0, 0.1)


ENTRIES = tuple(
    Entry(s, d, 1.0, r, t, 1.0, "layer")
    for s, d, r, t in (("x", "p", 1.0, 0.3), ("x", "q", 3.0, 0.95), ("y", "p", 1.1, 0.4),
                       ("y", "q", 0.98, 0.2))
)  # fmt: skip
POINTS = [Point("a", 0.1, 3.0), Point("a", 0.2, 3.5), Point("b", 0.3, 3.2), Point("b", 0.4, 9.0)]


def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note every text of a figure that is written."""
    import matplotlib.text

    seen: list[str] = []

    def note(figure: Any, file: Path) -> Path:
        seen.extend(t.get_text() for t in figure.findobj(matplotlib.text.Text))
        return write(figure, file)

    write = plots._write
    monkeypatch.setattr(plots, "_write", note)
    return seen


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_files_are_written_whole(suffix: str, tmp_path: Path) -> None:
    # Other tests of the same process may have loaded it.
    before = "matplotlib.pyplot" in sys.modules
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix]
    for name, draw in (
        ("draws", lambda f: plot_draws([draws("s"), draws("t", ("p", "q"))], f)),
        ("masks", lambda f: plot_draws([draws("s", ())], f)),
        ("levels", lambda f: plot_draws([draws("s", (), None)], f)),
        ("transfer", lambda f: plot_transfer(Transfer("Wanda", "Magnitude", ENTRIES), f)),
        ("proxy", lambda f: plot_proxy(POINTS, f)),
    ):
        file = draw(tmp_path / "new" / f"{name}.{suffix}")
        assert file.read_bytes().startswith(start)
    assert not [f for f in (tmp_path / "new").iterdir() if f.name.startswith(".")]
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_values_and_marks_are_on_the_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = texts(monkeypatch)
    plot_transfer(Transfer("Wanda", "Magnitude", ENTRIES), tmp_path / "t.png")
    assert {"1.00", "3.00 ×", "1.10", "0.98", "x", "y", "p", "q"} <= set(seen)
    plot_proxy(POINTS, tmp_path / "p.png")
    assert any("Spearman 0.80, 4 points" in t for t in seen)
    plot_proxy(POINTS, tmp_path / "w.png", within=True)
    assert {"a (1.00)", "b (1.00)", "4 points (Spearman within each group)"} <= set(seen)


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"\.png, \.pdf or \.svg"):
        plot_proxy(POINTS, tmp_path / "p.gif")
    with pytest.raises(UserError, match="nothing to draw"):
        plot_draws([], tmp_path / "p.png")
    original = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'lm-calib-plugin\[plots\]'"):
        plot_proxy(POINTS, tmp_path / "p.png")
    assert list(tmp_path.iterdir()) == []
