"""Whatever happens while a folder is written, nothing half-written is taken for whole."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import lm_calib_plugin as lm_calib
from lm_calib_plugin import storage
from lm_calib_plugin.doctor import examine
from lm_calib_plugin.errors import CalibError, UserError
from lm_calib_plugin.export.folder import check_out, export_model
from lm_calib_plugin.export.records import verify_folder
from tests.tiny import make_model, make_tokenizer

RECIPE = {"method": "magnitude", "sparsity": 0.5}
# Says when the folder is there, then writes it again and again.
WRITER = """
import sys, itertools
from pathlib import Path
import lm_calib_plugin as lm_calib
from lm_calib_plugin.export.folder import export_model
from lm_calib_plugin.export.options import ExportOptions
from tests.tiny import make_model, make_tokenizer
model, tokenizer = make_model("llama"), make_tokenizer()
recipe = lm_calib.Recipe(method="magnitude", sparsity=0.5)
report = lm_calib.compress(model, tokenizer, recipe, lm_calib.Runtime(progress=False))
options = ExportOptions(overwrite=True, check=False, max_shard_size="20KB")
for number in itertools.count():
    export_model(model, tokenizer, recipe, report, Path(sys.argv[1]), options)
    if not number:
        print("ready", flush=True)
"""


def compressed() -> tuple[Any, Any, Any, Any]:
    model, tokenizer = make_model("llama"), make_tokenizer()
    recipe = lm_calib.Recipe(**RECIPE)
    report = lm_calib.compress(model, tokenizer, recipe, lm_calib.Runtime(progress=False))
    return model, tokenizer, recipe, report


def test_killed_at_any_moment(tmp_path: Path) -> None:
    out, chance = tmp_path / "out", random.Random(3)
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(chance.uniform(0, 0.6))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        storage.restore(out)
        verify_folder(out, progress=False)
        others = [p.name for p in tmp_path.iterdir() if p != out]
        assert all(n.startswith(".out.") and n.endswith(".tmp") for n in others), others


def test_a_replaced_folder_gets_its_name_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, given = tmp_path / "out", compressed()
    export_model(*given, out)
    key = verify_folder(out, progress=False).facts["key"]
    replace, count = Path.replace, itertools.count()

    def fails_at_the_second(self: Path, target: Path) -> Path:
        if next(count) == 1:
            raise OSError(errno.EIO, "gone")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fails_at_the_second)
    with pytest.raises(OSError, match="gone"), storage.new_folder(out, replace=True):
        pass
    monkeypatch.undo()
    assert verify_folder(out, progress=False).facts["key"] == key
    # Killed between the two renames.
    out.replace(tmp_path / ".out.01234567.old")
    check_out(out, lm_calib.Recipe(**RECIPE), overwrite=True)
    assert verify_folder(out, progress=False).facts["key"] == key
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_a_killed_process_go_with_the_next_export(tmp_path: Path) -> None:
    old, new = tmp_path / ".out.0123abcd.tmp", tmp_path / ".out.4567abcd.tmp"
    for folder in (old, new):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    hours_ago = time.time() - 7200
    os.utime(old / "model.safetensors", (hours_ago, hours_ago))
    os.utime(old, (hours_ago, hours_ago))
    told = {f.detail for f in examine(folders=[tmp_path]) if f.what == "leftover"}
    assert told == {
        f"{old} of an interrupted write; harmless, --clean deletes it",
        f"{new} is being written",
    }
    export_model(*compressed(), tmp_path / "out")
    # The other one may belong to a process that is at work.
    assert {p.name for p in tmp_path.iterdir()} == {"out", new.name}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_errors_of_the_disk_are_one_sentence(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_calib_plugin.export import folder

    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(folder, "write_files_record", fail)
    with pytest.raises(CalibError, match="the disk is full|can not be written"):
        export_model(*compressed(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() or mount is None:
        pytest.skip("only root can mount a small disk")
    command = [mount, "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_noticed_before_writing(small_disk: Path) -> None:
    with pytest.raises(UserError, match="MiB are free there"):
        export_model(*compressed(), small_disk / "out")
    assert not list(small_disk.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_calib_plugin import storage

    monkeypatch.setattr(storage, "require_space", lambda *_: None)
    (small_disk / "other").write_bytes(b"x" * 200_000)
    with pytest.raises(CalibError, match="the disk is full; nothing was kept"):
        export_model(*compressed(), small_disk / "out")
    assert [p.name for p in small_disk.iterdir()] == ["other"]


def test_a_disk_that_can_only_be_read(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match=r"can not be written \(Read-only file system\)"):
        check_out(small_disk / "out", lm_calib.Recipe(**RECIPE))


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        check_out(tmp_path / "file" / "out", lm_calib.Recipe(**RECIPE))
    with pytest.raises(UserError, match="exists"):
        check_out(tmp_path / "file", lm_calib.Recipe(**RECIPE))
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="exists"):
        check_out(tmp_path / "link", lm_calib.Recipe(**RECIPE))
