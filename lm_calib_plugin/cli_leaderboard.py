"""``lm-calib leaderboard plan | run | status | report | verify``: cells of a grid, their table."""

from __future__ import annotations

from enum import Enum
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


class _Engine(str, Enum):
    local = "local"
    ray = "ray"


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
    jobs: str = typer.Option("1", metavar="N|auto", help="Processes; auto: as many as GPUs."),
    shard: str = typer.Option(None, metavar="I/N", help="Only this part of the cells."),
    engine: _Engine = typer.Option("local", help="Where cells run."),  # noqa: B008
    ray_address: str = typer.Option(None, help="Of a Ray cluster. Default: one on this machine."),
    ray_resources: str = typer.Option(
        None, metavar="CPU=2,GPU=1", help="What a group of cells holds."
    ),
    retry_failed: bool = typer.Option(False, "--retry-failed", help="Run failed cells again."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress bars."),
) -> None:
    """Measure every cell that has no record yet; run it again to go on."""
    from lm_calib_plugin.leaderboard.local import Stopped, stoppable
    from lm_calib_plugin.leaderboard.start import Where, run_grid

    _, cells, folder = _read(grid, changes, out)
    where = Where(jobs, shard, engine.value, ray_address, ray_resources)
    try:
        with stoppable():
            outcome = run_grid(cells, folder, where, retry_failed=retry_failed, quiet=quiet)
    except KeyboardInterrupt as stop:
        typer.echo("stopped; the same command goes on from here", err=True)
        raise typer.Exit(143 if isinstance(stop, Stopped) else 130) from None
    typer.echo(outcome.words)
    raise typer.Exit(outcome.code)


@app.command("status")
def status(grid: str = GRID, changes: list[str] = SET, out: str = OUT) -> None:
    """Print what is done, failed, running and open, with errors and costs; writes nothing."""
    from lm_calib_plugin.leaderboard.status import status_lines

    _, cells, folder = _read(grid, changes, out)
    for line in status_lines(cells, folder):
        typer.echo(line)


@app.command("verify")
def verify_cells(
    grid: str = GRID,
    changes: list[str] = SET,
    out: str = OUT,
    cell: str = typer.Option(None, help="Beginning of a key (see status), or part of a title."),
    seed: int = typer.Option(None, min=0, help="Of the choice of cells. Default: another one."),
    count: int = typer.Option(1, min=1, help="How many cells."),
) -> None:
    """Measure done cells again and compare every value; exit code 1 if one differs."""
    import secrets

    from lm_calib_plugin.leaderboard import verify

    _, cells, folder = _read(grid, changes, out)
    if seed is None:
        seed = secrets.randbelow(10**6)
    picked = verify.chosen(cells, folder, name=cell, seed=seed, count=count)
    if cell is None:
        typer.echo(f"{len(picked)} of the done cells, --seed {seed}")

    from lm_calib_plugin.leaderboard.run import Bench

    worst = 0
    with verify.afresh() as logs:
        # A result of the cache would be compared with itself.
        for check in verify.verify(picked, folder, Bench(logs, {"cache": False}).measure):
            typer.echo("\n".join(check.lines()))
            worst = max(worst, int(bool(check.differences)))
    raise typer.Exit(worst)


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
    missed = shortfalls(analysis, gates, found.methods)
    for line in missed:
        typer.echo(f"below the limit: {line}", err=True)
    raise typer.Exit(1 if missed else 0)
