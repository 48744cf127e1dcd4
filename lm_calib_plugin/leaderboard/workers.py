"""``--jobs``: several processes on one folder, a GPU each; one that dies is started again.

``python -m lm_calib_plugin.leaderboard.workers FOLDER NUMBER COUNT PARENT`` is one of them: it
reads cells on its standard input and writes the key of each that it measured to standard output.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lm_calib_plugin.leaderboard.cells import Cell
from lm_calib_plugin.leaderboard.claims import TRIALS
from lm_calib_plugin.leaderboard.local import (
    Stopped,
    cells_from,
    cells_text,
    order_of,
    run_cells,
    shard_of,
    stoppable,
    waiting,
)
from lm_calib_plugin.leaderboard.progress import Bar
from lm_calib_plugin.leaderboard.records import Record, Records
from lm_calib_plugin.values import whole

LOGS = "logs"
COMMAND = (sys.executable, "-m", "lm_calib_plugin.leaderboard.workers")
THREADS, GPUS = "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"
POLL = 0.5
# Seconds that a worker has to give its cell back; what it computes may take as long.
GRACE = 30.0
_PR_SET_PDEATHSIG = 1
_COUNT_GPUS = "import torch; print(torch.cuda.device_count())"


def jobs_of(text: str, cells: Sequence[Cell]) -> tuple[int, list[str]]:
    """Return how many processes ``--jobs`` means, and the GPUs that they share out.

    There are none to share where cells name their device, or spread a model over all.

    Raises
    ------
    UserError
        When it is neither a number nor ``auto``.
    """
    auto = text == "auto"
    number = 1 if auto else whole("jobs", text, lowest=1)
    if number == 1 and not auto:
        return 1, []
    devices = {str(c.harness.get("device") or c.loading.get("device") or "cuda") for c in cells}
    spread = any(cell.loading.get("parallelize") for cell in cells)
    gpus = visible_gpus() if devices == {"cuda"} and not spread else []
    return (max(1, len(gpus)) if auto else number), gpus


def visible_gpus() -> list[str]:
    """Return the names by which ``CUDA_VISIBLE_DEVICES`` knows the GPUs of this process."""
    named = os.environ.get(GPUS)
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    # In a process of its own: torch is large, and this one only waits for others.
    asked = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", _COUNT_GPUS], capture_output=True, text=True, check=False
    )
    return [str(n) for n in range(int(asked.stdout))] if asked.stdout.strip().isdigit() else []


@dataclass
class _Worker:
    """A place for a process; ``deaths`` counts those in a row without a record."""

    number: int
    log: Path
    environment: Mapping[str, str]
    deaths: int = 0
    process: subprocess.Popen[bytes] | None = None
    written: IO[bytes] = field(default_factory=tempfile.TemporaryFile)

    def start(self, command: Sequence[str], cells: str) -> None:
        self.written.close()
        self.written = tempfile.TemporaryFile()  # noqa: SIM115 - as long as its process
        with tempfile.TemporaryFile() as given, self.log.open("ab") as log:
            given.write(cells.encode())
            given.seek(0)
            self.process = subprocess.Popen(  # noqa: S603 - our own interpreter
                command,
                stdin=given,
                stdout=self.written,
                stderr=log,
                env=self.environment,
                # Ctrl-C reaches the parent alone, which ends its workers in order.
                start_new_session=True,
            )

    def ended(self) -> int | None:
        """Return the exit code of a process that has ended."""
        return None if self.process is None else self.process.poll()

    def died(self, code: int) -> str:
        """Count a death; return what happened in words."""
        self.process = None
        wrote = os.fstat(self.written.fileno()).st_size > 0
        self.deaths = 1 if wrote else self.deaths + 1
        if code < 0:
            return f"worker {self.number} was ended by signal {-code} ({signal.strsignal(-code)})"
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        return f"worker {self.number} ended with code {code}: {last.strip()[:300]}"


def run_workers(
    cells: Sequence[Cell],
    folder: Path,
    jobs: int,
    *,
    gpus: Sequence[str] = (),
    quiet: bool = False,
    command: Sequence[str] = COMMAND,
) -> None:
    """Measure cells in ``jobs`` processes; return when these have ended.

    Each begins at another place of the list, so that what it shares is shared as long as possible.
    A process that dies is started again, until it has died several times without one record.
    """
    left = waiting(cells, Records(folder))
    jobs = min(jobs, len(left))
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    environment = _environment(jobs)
    workers = [
        _Worker(n, folder / LOGS / f"worker-{n}.log", environment | _gpu(n, gpus))
        for n in range(1, jobs + 1)
    ]
    text = cells_text(left)

    def start(worker: _Worker) -> None:
        words = (str(folder), str(worker.number), str(jobs), str(os.getpid()))
        worker.start([*command, *words], text)

    with Bar(cells, folder, jobs, quiet) as bar:
        try:
            for worker in workers:
                worker.log.unlink(missing_ok=True)
                start(worker)
            while any(worker.process for worker in workers):
                time.sleep(POLL)
                for worker in workers:
                    _look_after(worker, start, bar, lambda: bool(waiting(left, Records(folder))))
                bar.look()
        finally:
            _stop([worker.process for worker in workers if worker.process])


def _look_after(
    worker: _Worker, start: Callable[[_Worker], None], bar: Bar, unfinished: Callable[[], bool]
) -> None:
    """Start the process of a worker again if it died."""
    code = worker.ended()
    if code is None:
        return
    if code == 0:
        worker.process = None
        return
    words = worker.died(code)
    if not unfinished():
        bar.say(words)
    elif worker.deaths > TRIALS:
        bar.say(f"{words}; {worker.deaths} times without a record: given up, see {worker.log}")
    else:
        bar.say(f"{words}; it is started again")
        start(worker)


def _environment(jobs: int) -> dict[str, str]:
    environment = dict(os.environ)
    if not environment.get(THREADS):
        threads = max(1, _cores() // max(1, jobs))
        environment[THREADS] = str(threads)
        sys.stderr.write(f"lm-calib: {jobs} workers, {THREADS}={threads} each\n")
    return environment


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpu(number: int, gpus: Sequence[str]) -> dict[str, str]:
    """Return the variable that leaves a worker one GPU, where there are several."""
    return {GPUS: gpus[(number - 1) % len(gpus)]} if len(gpus) > 1 else {}


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End processes: asked first, killed when they do not follow or we are asked again."""
    for process in processes:
        process.terminate()
    end = time.monotonic() + GRACE
    try:
        for process in processes:
            process.wait(max(0.0, end - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for process in processes:
            process.kill()
            process.wait()


def work(
    arguments: Sequence[str], measure: Callable[[Path], Callable[[Cell], Record]] | None = None
) -> int:
    """Be one of the workers; return the exit code.

    Parameters
    ----------
    arguments
        Folder, number of the worker, how many there are, and the process that started it.
    measure
        Makes of the folder for logs what measures cells; None: the real thing.
    """
    folder, parent = Path(arguments[0]), int(arguments[3])
    tell = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print belongs to the log
    with stoppable():
        try:
            _end_with(parent)
            cells, number, count = (
                cells_from(sys.stdin.read()),
                int(arguments[1]),
                int(arguments[2]),
            )
            logs = folder / LOGS
            # What others may do as well, it is not to watch for them.
            own = waiting(shard_of(cells, f"{number}/{count}"), Records(folder))
            run_cells(
                order_of(cells, number, count),
                folder,
                measure(logs) if measure else bench(logs, own),
                done=lambda cell, record: tell.write(f"{cell.key}\n"),
                go_on=lambda: os.getppid() == parent,
            )
        except KeyboardInterrupt:
            return 130
    return 0


def bench(logs: Path, cells: Sequence[Cell]) -> Callable[[Cell], Record]:
    """Return what measures these cells in this process; ``logs`` is for what they print."""
    from lm_calib_plugin.leaderboard.run import Bench

    return Bench(logs, cells=cells).measure


def _end_with(parent: int) -> None:
    """Have the system end this process when its parent dies."""
    if sys.platform == "linux":
        system: Any = ctypes.CDLL(None)
        system.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        raise Stopped


if __name__ == "__main__":
    raise SystemExit(work(sys.argv[1:]))
