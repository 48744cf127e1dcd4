"""Who waits for whom: only for what will be kept, and only at a lock that others see."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lm_calib_plugin import Recipe, Runtime, compression
from lm_calib_plugin.artifacts import cache, keeping, shelf
from tests.artifacts.test_cache import FAMILIES, calibration, run
from tests.artifacts.test_sharing import made_not_kept, no_room
from tests.tiny import make_model

GIVEN = FAMILIES["wanda"][0]


def _overlapping(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> list[Any]:
    """Run a request several times at once; all but the first have to work at one time."""
    together, first = threading.Barrier(number - 1, timeout=60), threading.Event()
    original, results = compression.work_on, []

    def meeting(job: Any) -> Any:
        if first.is_set():
            together.wait()
        first.set()
        # Time for the others to come to the lock.
        time.sleep(1)
        return original(job)

    monkeypatch.setattr(compression, "work_on", meeting)

    def compressed(model: Any) -> None:
        runtime = Runtime(progress=False, cache=str(folder))
        report = compression.compress(model, None, Recipe(**GIVEN), runtime, calibration())
        results.append((model, report))

    # Models are made before: random numbers of threads would mix.
    threads = [threading.Thread(target=compressed, args=[make_model()]) for _ in range(number)]
    threads[0].start()
    assert first.wait(60)
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == number
    assert all(not report.cache["hit"] for _, report in results)
    return results


def test_nobody_waits_where_nothing_can_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, {**GIVEN, "sparsity": 0.4})
    plain = run(False, GIVEN)
    monkeypatch.setattr(cache, "check_room", no_room)
    for found in _overlapping(tmp_path, monkeypatch, 3):
        made_not_kept(found, plain, "^cache: nothing is free")


def test_who_waited_in_vain_does_not_wait_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(False, GIVEN)
    monkeypatch.setattr(keeping, "check_room", _no_space)
    results = _overlapping(tmp_path, monkeypatch, 4)
    for found in results[1:]:
        made_not_kept(found, plain, "^cache: another process could not keep the same model")
    assert "No space left" in results[0][1].warnings[-1]
    # What failed once is tried again by the next run.
    monkeypatch.undo()
    assert run(tmp_path, GIVEN)[1].cache["bytes"] > 0


def _no_space(*given: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_lock_may_be_deleted_by_who_holds_it(tmp_path: Path) -> None:
    """Who waits for a deleted lock holds the new one at the end, and nobody else does."""
    place, times = tmp_path / ("a" * 64), list[float]()

    def hold() -> None:
        with shelf.at_rest(place, wait=True):
            times.append(time.monotonic())
            time.sleep(0.2)
            times.append(time.monotonic())
            shelf.lock_of(place).unlink()

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(times) == 8
    assert times == sorted(times)
    assert list(tmp_path.iterdir()) == []
