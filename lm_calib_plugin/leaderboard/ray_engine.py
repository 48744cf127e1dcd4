"""``--engine ray``: groups of cells as tasks of Ray, on this machine or on a cluster.

Ray hands functions and values between its own processes with pickle. That is no code from data:
both ends are one program, and what we send and take back are texts.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import secrets
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_calib_plugin.errors import CalibError, UserError
from lm_calib_plugin.leaderboard.cells import Cell
from lm_calib_plugin.leaderboard.claims import FOLDER as CLAIMS
from lm_calib_plugin.leaderboard.claims import TRIALS
from lm_calib_plugin.leaderboard.local import cells_from, cells_text, run_cells, waiting
from lm_calib_plugin.leaderboard.progress import Bar
from lm_calib_plugin.leaderboard.records import Records
from lm_calib_plugin.leaderboard.workers import bench
from lm_calib_plugin.storage import write_text

DEFAULTS = {"CPU": 1.0, "GPU": 1.0}
POLL = 1.0
# Seconds that tasks have to give their cells back when everything is stopped.
GRACE = 10.0
TELEMETRY = {"RAY_USAGE_STATS_ENABLED": "0"}
# A cluster on this machine is reached from this machine only, and only with a password: whoever
# reaches a cluster can run code on it. (The name is Ray's; it means clusters of many machines.)
ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
TOKEN = "RAY_AUTH_TOKEN"  # noqa: S105 - the name of a variable
OWN = {"include_dashboard": False}


def require_ray() -> None:
    """Raise a UserError when Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise UserError(
            "engine",
            "ray is not installed",
            "local works without it",
            "pip install 'lm-calib-plugin[ray]'",
        )


def resources_of(text: str | None) -> dict[str, float]:
    """Return what ``CPU=2,GPU=1`` names: resources of Ray that each group of cells holds.

    Raises
    ------
    UserError
        When it is no list of such pairs.
    """
    found: dict[str, float] = {}
    for pair in text.split(",") if text else ():
        name, equals, amount = pair.strip().partition("=")
        try:
            found[name.strip()] = float(amount)
        except ValueError:
            equals = ""
        if not (equals and name.strip() and 0 <= found[name.strip()] < float("inf")):
            raise UserError(
                "ray-resources",
                f"got {pair!r}",
                "NAME=AMOUNT, joined by commas",
                "for instance CPU=2,GPU=1",
            )
    return found


def groups_of(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Return cells that share a model and a draw of calibration data, in the order given."""
    found: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.model, cell.calibration, cell.draw), []).append(cell)
    return list(found.values())


def run_on_ray(
    cells: Sequence[Cell],
    folder: Path,
    *,
    address: str | None = None,
    resources: Mapping[str, float] | None = None,
    quiet: bool = False,
    measure: Callable[[Path], Callable[[Cell], Any]] | None = None,
) -> None:
    """Measure cells on Ray; the records end up in ``folder``.

    Workers that see the folder write records there themselves, all others send them. Groups whose
    process dies are begun again, without what is there already.

    Parameters
    ----------
    cells
        Those without a record are run.
    folder
        That of the leaderboard.
    address
        Of a cluster, as ``ray.init`` takes it; None: one on this machine, for as long as this runs.
    resources
        What a group holds; see :func:`resources_of`. Default: a CPU, and a GPU where there are any.
    quiet
        Whether nothing but failures is shown.
    measure
        Makes of the folder for logs what measures cells; None: the real thing.

    Raises
    ------
    CalibError
        When groups could not be brought to an end.
    """
    require_ray()
    folder = folder.resolve()
    with _connected(address) as ray, _token(folder) as token:
        wanted = _available(ray, resources)
        groups = groups_of(waiting(cells, Records(folder)))
        run = ray.remote(_run_group)
        tasks = {
            run.options(
                num_cpus=wanted.get("CPU", 0),
                num_gpus=wanted.get("GPU", 0),
                resources={k: v for k, v in wanted.items() if k not in DEFAULTS},
                # Every cell may be the one that ends its process, several times.
                max_retries=TRIALS * len(group),
            ).remote(cells_text(group), str(folder), token, number, _place(wanted), measure): group
            for number, group in enumerate(groups)
        }
        with Bar(cells, folder, _at_once(ray, wanted, len(groups)), quiet) as bar:
            try:
                errors = _collected(ray, tasks, Records(folder), bar)
            except BaseException:
                _cancel(ray, list(tasks))
                raise
    if errors:
        raise CalibError(f"{len(errors)} groups of cells ended early: {'; '.join(errors)[:1000]}")


def _collected(
    ray: Any, tasks: Mapping[Any, Sequence[Cell]], records: Records, bar: Bar
) -> list[str]:
    """Wait for all tasks; return the errors of those that did not end well."""
    open_tasks, errors = list(tasks), []
    while open_tasks:
        ended, open_tasks = ray.wait(open_tasks, timeout=POLL)
        for task in ended:
            try:
                take(ray.get(task), tasks[task], records)
            except (ray.exceptions.RayError, UserError, OSError) as error:
                first = tasks[task][0].title
                errors.append(f"{first} and {len(tasks[task]) - 1} more: {_short(error)}")
                bar.say(f"lm-calib: {errors[-1]}")
        bar.look()
    return errors


def take(texts: Iterable[str], cells: Sequence[Cell], records: Records) -> None:
    """Write the records, of these cells, that are not there yet.

    Raises
    ------
    UserError
        When a text is no record of one of these cells.
    """
    from lm_calib_plugin.leaderboard.records import Record

    keys = {cell.key for cell in cells}
    for text in texts:
        record = Record.from_bytes(text.encode(), "ray")
        if record.key not in keys:
            raise UserError("ray", f"a worker sent a record of another cell, {record.key[:16]}")
        if not records.has(record.key):
            records.write(record)


def _run_group(
    text: str,
    folder: str,
    token: str,
    number: int,
    place: Mapping[str, str],
    measure: Callable[[Path], Callable[[Cell], Any]] | None,
) -> list[str]:
    """Measure a group of cells in a process of Ray; return its records as texts."""
    with contextlib.suppress(OSError):
        os.chdir(place["folder"])
    if "torch" not in sys.modules:
        os.environ["OMP_NUM_THREADS"] = place["threads"]
    cells, shared = cells_from(text), Path(folder)
    seen = (shared / CLAIMS / token).is_file()
    # Without a shared disk, what a retry of this group can go on from stays on this machine.
    own = shared if seen else Path(tempfile.gettempdir()) / f"lm-calib-{token}" / str(number)
    records = Records(own)
    logs = own / "logs"
    run_cells(cells, own, measure(logs) if measure else bench(logs, waiting(cells, records)))
    texts = [records.path(c.key).read_text("utf-8") for c in cells if records.has(c.key)]
    if not seen:
        shutil.rmtree(own, ignore_errors=True)
    return texts


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Yield Ray, connected to a cluster, or to one of its own that ends with the block."""
    alone = {} if address else {**ALONE, TOKEN: secrets.token_hex(32)}
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    with _environment({**TELEMETRY, **alone}):
        ray: Any = importlib.import_module("ray")
        try:
            ray.init(address=address or "local", **({} if address else OWN), **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError("ray-address", _short(error), "that of a running cluster") from None
        try:
            yield ray
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables that Ray and its processes read."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _token(folder: Path) -> Iterator[str]:
    """Yield the name of a file by which workers see whether they share the folder."""
    name = f"ray-{uuid.uuid4().hex}"
    path = folder / CLAIMS / name
    write_text(path, "")
    try:
        yield name
    finally:
        path.unlink(missing_ok=True)


def _available(ray: Any, wanted: Mapping[str, float] | None) -> dict[str, float]:
    """Return what a group gets; there is a machine that has it."""
    total = ray.cluster_resources()
    found = {name: amount for name, amount in DEFAULTS.items() if total.get(name, 0) >= amount}
    found |= wanted or {}
    for name, amount in found.items():
        most = max(node["Resources"].get(name, 0) for node in ray.nodes() if node["Alive"])
        if amount > most:
            raise UserError(
                "ray-resources",
                f"asks for {name}={amount:g}",
                f"the largest machine of the cluster has {most:g}",
            )
    return found


def _at_once(ray: Any, wanted: Mapping[str, float], groups: int) -> int:
    """Return how many groups run at a time."""
    total = ray.cluster_resources()
    room = [int(total.get(name, 0) // amount) for name, amount in wanted.items() if amount]
    return max(1, min([groups, *room]))


def _place(wanted: Mapping[str, float]) -> dict[str, str]:
    """Return where and with how many threads the driver would work, for workers."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, int(wanted.get("CPU", 1))))
    return {"folder": str(Path.cwd()), "threads": threads}


def _cancel(ray: Any, tasks: list[Any]) -> None:
    """Stop all tasks in order, so that no cell is held guilty."""
    with contextlib.suppress(Exception, KeyboardInterrupt):
        for task in tasks:
            ray.cancel(task)
        ray.wait(tasks, num_returns=len(tasks), timeout=GRACE)


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
