"""Processes that share a cache, disks that are full, folders that can only be read."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lm_calib_plugin import compression
from lm_calib_plugin.artifacts import cache, keeping, shelf
from lm_calib_plugin.artifacts.shelf import entries, verified
from lm_calib_plugin.errors import UserError
from tests.artifacts.test_cache import FAMILIES, alike, run

ROOT = Path(__file__).parents[2]
GIVEN = FAMILIES["wanda"][0]

# A rank of several: the process group is up, kernels are agreed on after the cache.
RANK = """
import datetime, json, os, sys
sys.path.insert(0, {root!r})
import torch
from lm_calib_plugin import Recipe, Runtime, compression
from tests.artifacts.test_cache import calibration
from tests.tiny import make_model
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group(
    "gloo", init_method="file://" + folder + "/group", rank=rank, world_size=2,
    timeout=datetime.timedelta(seconds=100),
)
original = compression.work_on
def counted(job):
    with open(folder + "/work", "a") as file:
        file.write("x")
    return original(job)
compression.work_on = counted
torch.distributed.barrier()
how = json.loads(sys.argv[3])
found = []
for recipe in ({{"method": "rtn", "scheme": "W8A8", "execution": "packed"}}, {given!r}):
    for _ in range(2):
        runtime = Runtime(progress=False, cache=folder + "/kept", **how)
        report = compression.compress(make_model(), None, Recipe(**recipe), runtime, calibration())
        cache = report.cache
        found.append([cache["hit"], cache["artifact"], report.weights_digest, report.key])
print(json.dumps(found))
torch.distributed.destroy_process_group()
"""


def two_ranks(folder: Path, **how: Any) -> list[list[list[Any]]]:
    """What each of two processes finds of two recipes, each asked for twice."""
    command = [sys.executable, "-W", "ignore", "-c", RANK.format(root=str(ROOT), given=GIVEN)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(folder), json.dumps(how)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    found = []
    for process in ranks:
        out, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors[-2000:]
        found.append(json.loads(out.splitlines()[-1]))
    return found


def test_two_processes_that_divide_the_work_come_and_go_together(tmp_path: Path) -> None:
    first, second = two_ranks(tmp_path)
    assert first == second
    assert [hit for hit, *_ in first] == [False, True, False, True]
    for made, loaded in (first[:2], first[2:]):
        assert made[1:] == loaded[1:]
        assert made[1]
    assert (tmp_path / "work").read_text() == "xx" * 2
    assert len(entries(tmp_path / "kept")) == 2


def test_two_processes_with_one_request_compute_once(tmp_path: Path) -> None:
    """Where each works for itself, the second one waits for the first, and loads."""
    first, second = two_ranks(tmp_path, split=False)
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        assert one[1:] == other[1:]
        assert sorted([one[0], other[0]]) == [number % 2 == 1, True]
    assert (tmp_path / "work").read_text() == "xx"


def test_who_waits_at_the_lock_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second thread gets the lock when the first has stored, and only then looks."""
    begun, results = threading.Event(), []
    original, calls = compression.work_on, []

    def slow(job: Any) -> Any:
        calls.append(job)
        begun.set()
        time.sleep(0.3)
        return original(job)

    monkeypatch.setattr(compression, "work_on", slow)
    other = threading.Thread(target=lambda: results.append(run(tmp_path, GIVEN)))
    other.start()
    assert begun.wait(60)
    mine = run(tmp_path, GIVEN)
    other.join()
    assert len(calls) == 1
    assert mine[1].cache["hit"] is True
    assert results[0][1].cache["hit"] is False
    alike(mine, results[0])


def test_work_that_fails_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(compression, "work_on", _fail)
        with pytest.raises(RuntimeError, match="no work"):
            run(tmp_path, GIVEN)
    assert entries(tmp_path) == []
    assert run(tmp_path, GIVEN)[1].cache["hit"] is False


def _fail(job: Any) -> Any:
    raise RuntimeError("no work was to be done")


# --- disks ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a small disk; skip the test where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False).returncode
    except OSError:
        done = 1
    if done:
        pytest.skip("no disk can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


def test_a_full_disk_is_noticed_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "work_on", _fail)
    monkeypatch.setattr(compression, "_draw", _fail)
    with disk(tmp_path / "disk", "500k") as folder:
        with pytest.raises(UserError) as caught:
            run(folder, GIVEN)
        text = str(caught.value)
        assert text.startswith("cache: ")
        assert f"are free in {folder}; keeping this model may need" in text
        assert "lm-calib cache rm --keep" in text
        assert "cache=false" in text


def test_where_something_is_kept_the_request_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk what is kept is loaded, and what is not is made, and not kept."""
    other = {**GIVEN, "sparsity": 0.4}
    plain = run(False, other)
    with disk(tmp_path / "disk", "3m") as folder:
        first = run(folder, GIVEN)
        (folder / "more").write_bytes(b"x" * (2 << 20))
        with monkeypatch.context() as patch:
            patch.setattr(compression, "work_on", _fail)
            second = run(folder, GIVEN)
        assert second[1].cache["hit"]
        alike(second, first)
        made_not_kept(run(folder, other), plain, r"^cache: \d+ MiB are free")
        assert len(entries(folder)) == 1


def made_not_kept(found: Any, plain: Any, why: str) -> None:
    note = found[1].warnings.pop()
    assert re.search(why, note)
    assert note.endswith("The model was compressed, and not kept.")
    assert found[1].cache == {"hit": False, "artifact": None}
    alike(found, plain)


def test_too_little_room_is_said_before_data_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, GIVEN)
    monkeypatch.setattr(shelf, "check_room", lambda *given: None)
    monkeypatch.setattr(cache, "check_room", no_room)
    monkeypatch.setattr(compression, "_draw", _fail)
    caplog.clear()
    with pytest.raises(RuntimeError):
        run(tmp_path, GIVEN)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("cache: nothing is free")
    assert said.endswith("Unless it is there already, the model will not be kept.")


def no_room(*given: Any) -> None:
    raise UserError("cache", "nothing is free")


@pytest.mark.parametrize("looks", [True, False])
def test_a_disk_that_fills_up_meanwhile_costs_no_work(
    looks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = compression.work_on
    plain = run(False, GIVEN)
    if not looks:
        # As when the last bytes go between the look and the writing.
        monkeypatch.setattr(keeping, "check_room", lambda *given: None)
    with disk(tmp_path / "disk", "3m") as folder:

        def filling(job: Any) -> Any:
            done = original(job)
            with contextlib.suppress(OSError), (folder / "more").open("wb", 0) as file:
                while True:
                    file.write(b"x" * 4096)
            return done

        monkeypatch.setattr(compression, "work_on", filling)
        model, report = run(folder, GIVEN)
        note = report.warnings.pop()
        assert note.startswith("cache: not kept, because it could not be written")
        assert report.cache == {"hit": False, "artifact": None}
        alike((model, report), plain)
        assert entries(folder) == []
        assert [path for path in folder.iterdir() if path.suffix == ".tmp"] == []
        (folder / "more").unlink()
        monkeypatch.setattr(compression, "work_on", original)
        assert run(folder, GIVEN)[1].cache["bytes"] > 0


def test_a_folder_that_can_only_be_read_serves_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {**GIVEN, "sparsity": 0.4}
    plain, twin = run(False, GIVEN), run(False, other)
    with disk(tmp_path / "disk", "5m") as folder:
        run(folder, GIVEN)
        remount(folder, "ro")
        monkeypatch.setattr(compression, "work_on", _fail)
        found = run(folder, GIVEN)
        assert found[1].cache["hit"]
        alike(found, plain)
        monkeypatch.undo()
        made_not_kept(run(folder, other), twin, "^cache: .* can not be written")


def test_an_empty_folder_that_can_only_be_read_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "_draw", _fail)
    with disk(tmp_path / "disk", "5m") as folder:
        remount(folder, "ro")
        with pytest.raises(UserError) as caught:
            run(folder, GIVEN)
    assert str(caught.value).startswith(f"cache: {folder} can not be written (")
    assert "cache=DIR names another folder, cache=false keeps nothing" in str(caught.value)


def test_a_folder_of_somebody_else_is_refused_at_once(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="^cache: .* can not be written"):
        run(tmp_path, GIVEN)


def test_the_folder_is_ours_unless_named(cache_dir: Path) -> None:
    from lm_calib_plugin import Recipe, Runtime
    from tests.artifacts.test_cache import calibration
    from tests.tiny import make_model

    runtime = Runtime(progress=False, cache=True)
    report = compression.compress(make_model(), None, Recipe(**GIVEN), runtime, calibration())
    assert report.cache is not None
    assert Path(report.cache["artifact"]).parent == cache_dir / "artifacts"
    (entry,) = entries(cache_dir / "artifacts")
    assert verified(entry) == ""


def test_the_lock_is_free_again(tmp_path: Path) -> None:
    _, report = run(tmp_path, GIVEN)
    place = Path(report.cache["artifact"])
    with shelf.at_rest(place), pytest.raises(TimeoutError):
        _waits(place)


def _waits(place: Path) -> None:
    done = threading.Thread(target=lambda: _hold(place), daemon=True)
    done.start()
    done.join(0.5)
    if done.is_alive():
        raise TimeoutError


def _hold(place: Path) -> None:
    with cache._lock(place):
        pass
