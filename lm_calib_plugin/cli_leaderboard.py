"""``lm-calib leaderboard plan | run | status | report | verify``: cells of a grid, their table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from lm_calib_plugin.leaderboard.cells import Cell
    from lm_calib_plugin.leaderboard.grid import Grid

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)

GRID: Any = typer.Argument(metavar="GRID", help="A YAML file; see examples/leaderboards.")
SET: Any = typer.Option(
    [], "--set", metavar="PATH=VALUE", help="Replace a value of the grid, such as draws=2."
)
OUT: Any = typer.Option(None, help="Folder of the leaderboard. Default: leaderboards/NAME.")


def add_to(root: typer.Typer) -> None:
    """Add the commands to the command line."""
    root.add_typer(app, name="leaderboard", help="Compare methods and calibration sets in a grid.")


def _read(grid: str, changes: list[str], out: str | None) -> tuple[Grid, list[Cell], Path]:
    from lm_calib_plugin.leaderboard.cells import cells_of
    from lm_calib_plugin.leaderboard.grid import read_grid

    found = read_grid(grid, changes)
    folder = Path(out).expanduser() if out else Path("leaderboards") / found.name
    return found, cells_of(found), folder


@app.command("plan")
def plan(grid: str = GRID, changes: list[str] = SET, out: str = OUT) -> None:
    """Print every cell as a line for the shell, what is done already, and how long it may take."""
    from lm_calib_plugin.leaderboard.progress import estimate
    from lm_calib_plugin.leaderboard.records import Records

    _, cells, folder = _read(grid, changes, out)
    records = Records(folder)
    for cell in cells:
        record = records.read(cell.key)
        state = "open" if record is None else record.status
        typer.echo(f"# {state:<6} {cell.title}\n{cell.command()}")
    typer.echo(f"# {estimate(cells, records)}")


@app.command("run")
def run(
    grid: str = GRID,
    changes: list[str] = SET,
    out: str = OUT,
    shard: str = typer.Option(None, metavar="I/N", help="Only this part of the cells."),
    retry_failed: bool = typer.Option(False, "--retry-failed", help="Run failed cells again."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress bars."),
) -> None:
    """Measure every cell that has no record yet; run it again to go on."""
    from lm_calib_plugin.leaderboard.local import run_cells, shard_of, waiting
    from lm_calib_plugin.leaderboard.progress import Bar
    from lm_calib_plugin.leaderboard.records import Records

    _, cells, folder = _read(grid, changes, out)
    cells = shard_of(cells, shard)
    left = waiting(cells, Records(folder), retry_failed)
    if left:
        from lm_calib_plugin.leaderboard.run import Bench

        with Bar(cells, folder, quiet) as bar:
            run_cells(
                cells,
                folder,
                Bench(folder / "logs").measure,
                retry_failed=retry_failed,
                done=bar.done,
            )
    typer.echo(f"{len(cells)} cells in {folder}")
    sys.stdout.flush()


@app.command("report")
def report(
    grid: str = GRID,
    changes: list[str] = SET,
    out: str = OUT,
    to: str = typer.Option(None, help="Folder of the report. Default: report in that of --out."),
    fail_below: list[str] = typer.Option(  # noqa: B008
        [],
        "--fail-below",
        metavar="MEASURE=LIMIT",
        help="Exit with 1 below, such as recovery=0.95.",
    ),
) -> None:
    """Write the table as Markdown, CSV, JSON, plots and one page to look at."""
    from lm_calib_plugin.leaderboard.gate import read_gates, shortfalls

    gates = read_gates(fail_below)
    found, cells, folder = _read(grid, changes, out)

    from lm_calib_plugin.leaderboard.analysis import analyze
    from lm_calib_plugin.leaderboard.records import Records
    from lm_calib_plugin.leaderboard.report import write_report

    analysis = analyze(found, cells, Records(folder))
    target = Path(to).expanduser() if to else folder / "report"
    write_report(analysis, target)
    for reason in analysis.no_ranking:
        typer.echo(f"not ranked: {reason}", err=True)
    typer.echo(target / "index.html")
    missed = shortfalls(analysis, gates)
    for line in missed:
        typer.echo(f"below the limit: {line}", err=True)
    raise typer.Exit(1 if missed else 0)
