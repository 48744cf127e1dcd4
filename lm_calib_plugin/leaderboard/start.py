"""Starts the cells of a grid where they are asked to run, and says how it came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.leaderboard.cells import Cell
from lm_calib_plugin.leaderboard.claims import Claims
from lm_calib_plugin.leaderboard.local import forget_failed, run_cells, shard_of, waiting
from lm_calib_plugin.leaderboard.progress import Bar
from lm_calib_plugin.leaderboard.records import FAILED, Records


@dataclass(frozen=True)
class Where:
    """The arguments of ``lm-calib leaderboard run`` that say where cells run."""

    jobs: str = "1"
    shard: str | None = None
    engine: str = "local"
    ray_address: str | None = None
    ray_resources: str | None = None

    def check(self) -> None:
        """Raise a UserError for arguments that do not go together."""
        if self.engine == "ray":
            if self.jobs != "1":
                raise UserError(
                    "jobs", "is not for --engine ray", fix="for instance --ray-resources CPU=2"
                )
            return
        for name in ("ray_address", "ray_resources"):
            if getattr(self, name) is not None:
                raise UserError(name.replace("_", "-"), "needs Ray", fix="add --engine ray")


@dataclass(frozen=True)
class Outcome:
    """What is there after a run: a line for people, and the exit code."""

    words: str
    code: int


def run_grid(
    cells: Sequence[Cell],
    folder: Path,
    where: Where,
    *,
    retry_failed: bool = False,
    quiet: bool = False,
) -> Outcome:
    """Measure the cells that have no record.

    Parameters
    ----------
    cells
        All of the grid.
    folder
        That of the leaderboard.
    where
        Where they run, and which of them.
    retry_failed
        Whether failed cells are run again.
    quiet
        Whether no progress is shown.

    Raises
    ------
    UserError
        For arguments that can not be used; nothing has been started then.
    """
    where.check()
    cells = shard_of(cells, where.shard)
    if where.engine == "ray":
        from lm_calib_plugin.leaderboard.ray_engine import require_ray, resources_of, run_on_ray

        require_ray()
        resources = resources_of(where.ray_resources)
    else:
        from lm_calib_plugin.leaderboard.workers import bench, jobs_of, run_workers

        jobs, gpus = jobs_of(where.jobs, cells)
    if retry_failed:
        forget_failed(cells, folder)
    if not waiting(cells, Records(folder)):
        return outcome(cells, folder)
    if where.engine == "ray":
        run_on_ray(cells, folder, address=where.ray_address, resources=resources, quiet=quiet)
    elif jobs > 1:
        run_workers(cells, folder, jobs, gpus=gpus, quiet=quiet)
    else:
        with Bar(cells, folder, quiet=quiet) as bar:
            measure = bench(folder / "logs", waiting(cells, Records(folder)))
            run_cells(cells, folder, measure, done=lambda cell, record: bar.look())
    return outcome(cells, folder)


def outcome(cells: Sequence[Cell], folder: Path) -> Outcome:
    """Return how many cells are done, failed and open; failed or left ones make exit code 1."""
    records, claims = Records(folder), Claims(folder)
    failed = sum(r.status == FAILED for r in records.read_all(c.key for c in cells))
    left = waiting(cells, records)
    held = sum(claims.is_held(cell.key) for cell in left)
    parts = [f"{len(cells) - failed - len(left)} of {len(cells)} cells are done in {folder}"]
    if failed:
        parts.append(f"{failed} failed (lm-calib leaderboard status says why; --retry-failed)")
    if held:
        parts.append(f"{held} are measured by another process")
    if len(left) > held:
        parts.append(f"{len(left) - held} are left; the same command goes on")
    return Outcome("; ".join(parts), int(bool(failed or len(left) > held)))
