"""An Analysis as a folder of files."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from lm_calib_plugin import storage
from lm_calib_plugin.drawing import rendered, words
from lm_calib_plugin.leaderboard.report import flat, page, plots
from lm_calib_plugin.leaderboard.report.markdown import markdown
from lm_calib_plugin.leaderboard.tables import Analysis

# Names that only we give: what an earlier report left is told from a user's own file.
_PLOT = re.compile(rf"({'|'.join(plots.KINDS)})-.*[0-9a-f]{{8}}\.(png|svg)")
_HUB = re.compile(r".*[0-9a-f]{8}\.json")


def write_report(analysis: Analysis, folder: Path) -> list[Path]:
    """Write everything that a leaderboard shows; the same bytes for the same Analysis.

    Parameters
    ----------
    folder
        Gets ``index.html``, ``report.md``, ``leaderboard.csv``, ``comparisons.csv``,
        ``leaderboard.json``, ``hub/*.json`` and, where matplotlib is installed, ``plots/*.png``
        and ``plots/*.svg``. Plots and hub files of an earlier report in it are removed.

    Returns
    -------
    list of Path
        The files.
    """
    drawn = plots.draw(analysis) if rendered.available() else None
    if drawn is None:
        print(f"lm-calib: {words.NO_PLOTS} To install it: {words.INSTALL_PLOTS}", file=sys.stderr)
    files: dict[str, bytes] = {}
    for plot in drawn or ():
        files[f"plots/{plot.name}.png"] = plot.png
        files[f"plots/{plot.name}.svg"] = plot.svg.encode()
    for name, text in flat.hub_json(analysis).items():
        files[f"hub/{name}"] = text.encode()
    addresses = None
    if drawn is not None:
        addresses = [(plot.title, f"plots/{plot.name}.svg") for plot in drawn]
    texts = {
        "leaderboard.csv": flat.leaderboard_csv(analysis),
        "comparisons.csv": flat.comparisons_csv(analysis),
        "leaderboard.json": flat.leaderboard_json(analysis),
        "report.md": markdown(analysis, addresses),
        "index.html": page.render(analysis, drawn),
    }
    files.update({name: text.encode() for name, text in texts.items()})
    for name, content in files.items():
        storage.write_bytes(folder / name, content)
    _remove(folder / "plots", _PLOT, files)
    _remove(folder / "hub", _HUB, files)
    return [folder / name for name in files]


def _remove(folder: Path, ours: re.Pattern[str], kept: Iterable[str]) -> None:
    """Remove what an earlier report wrote and this one did not."""
    names = {Path(name).name for name in kept}
    for path in sorted(folder.glob("*")):
        if ours.fullmatch(path.name) and path.name not in names:
            path.unlink()
