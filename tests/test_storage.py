"""Files appear whole or not at all; digests are what they say."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_calib_plugin import storage
from lm_calib_plugin.errors import UserError

scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
scalars |= st.floats(allow_nan=False, allow_infinity=False)
plain = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(max_size=3), scalars)


# --- digests -----------------------------------------------------------------------------


def test_canonical_json_is_pinned() -> None:
    value = {"b": [1, 0.5, None, True], "a": {"z": "é", "y": ""}}
    text = '{"a":{"y":"","z":"\\u00e9"},"b":[1,0.5,null,true]}'
    assert storage.canonical_json(value) == text
    assert storage.digest(value) == hashlib.sha256(text.encode()).hexdigest()


@given(st.dictionaries(st.text(max_size=4), plain, max_size=5))
def test_order_of_keys_is_irrelevant_and_content_is_not(value: dict[str, Any]) -> None:
    turned = dict(reversed(list(value.items())))
    assert storage.digest(turned) == storage.digest(value)
    assert json.loads(storage.canonical_json(value)) == value
    assert storage.digest({**value, "one more key": 1}) != storage.digest(value)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_without_an_identity_are_refused(number: float) -> None:
    with pytest.raises(ValueError):
        storage.digest({"x": number})


def test_things_without_a_plain_form_are_refused() -> None:
    with pytest.raises(TypeError):
        storage.digest({"x": object()})


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, 3_000_000])
def test_file_digest(tmp_path: Path, size: int) -> None:
    file = tmp_path / "x"
    content = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    file.write_bytes(content)
    assert storage.file_digest(file) == hashlib.sha256(content).hexdigest()


# --- where -------------------------------------------------------------------------------


def test_cache_folder_order(monkeypatch: pytest.MonkeyPatch, cache_dir: Path) -> None:
    assert storage.cache_dir() == cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert storage.cache_dir() == cache_dir
    monkeypatch.setenv("LM_CALIB_CACHE", "")
    assert storage.cache_dir() == Path("/somewhere/lm_calib_plugin")
    monkeypatch.delenv("LM_CALIB_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert storage.cache_dir() == Path("/home/me/.cache/lm_calib_plugin")
    monkeypatch.setenv("LM_CALIB_CACHE", "~/calib")
    assert storage.cache_dir() == Path("/home/me/calib")


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    with pytest.raises(UserError, match=r"a model needs \d+ MiB; \d+ MiB are free there"):
        storage.require_space(folder, 1 << 60, "a model")
    assert not (tmp_path / "not").exists()
    storage.require_space(folder, 1, "a model")


def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "report.json"
    storage.write_text(file, "old")

    def nearly_full(path: Any) -> Any:
        return type("Usage", (), {"free": 100})()

    monkeypatch.setattr(storage.shutil, "disk_usage", nearly_full)
    with pytest.raises(UserError):
        storage.write_text(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


# --- whole or not at all -----------------------------------------------------------------


def test_write_text_makes_folders_and_replaces(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "report.json"
    storage.write_text(file, "é\n")
    storage.write_text(file, "second\n")
    assert file.read_bytes() == b"second\n"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("broken", ["write_bytes", "replace"])
def test_failed_write_leaves_the_old_file_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    file = tmp_path / "report.json"
    storage.write_text(file, "old")

    def fail(self: Path, *args: Any, **kwargs: Any) -> Any:
        if broken == "write_bytes":
            with self.open("wb") as stream:
                stream.write(b"hal")
        raise OSError("no")

    with monkeypatch.context() as patched:
        patched.setattr(Path, broken, fail)
        with pytest.raises(OSError, match="no"):
            storage.write_text(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_new_folder_appears_when_its_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "set"
    with storage.new_folder(target) as folder:
        (folder / "a.txt").write_text("a")
        assert not target.exists()
        assert folder.parent == target.parent  # one rename, on one file system
    assert (target / "a.txt").read_text() == "a"
    assert list(target.parent.iterdir()) == [target]


def test_new_folder_leaves_nothing_when_its_block_fails(tmp_path: Path) -> None:
    target = tmp_path / "set"

    def broken() -> None:
        with storage.new_folder(target) as folder:
            (folder / "a.txt").write_text("a")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert list(tmp_path.iterdir()) == []


def test_new_folder_never_merges_with_an_old_one(tmp_path: Path) -> None:
    target = tmp_path / "set"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with pytest.raises(OSError), storage.new_folder(target) as folder:
        (folder / "new.txt").write_text("new")
    assert [p.name for p in target.iterdir()] == ["old.txt"]
    assert list(tmp_path.iterdir()) == [target]


def test_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    """Readers of the target see the old content, whole, whenever the writer dies."""
    file = tmp_path / "report.json"
    storage.write_text(file, "old")
    code = f"""
import os, signal
from pathlib import Path
from lm_calib_plugin import storage
Path.replace = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)
storage.write_text(Path({str(file)!r}), "new")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert done.returncode < 0
    assert file.read_text() == "old"
    rest = [p for p in tmp_path.iterdir() if p != file]
    assert [p.name.startswith(".report.json.") and p.suffix == ".tmp" for p in rest] == [True]


def test_writers_at_the_same_time_leave_one_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    texts = [str(i) * 20000 for i in range(4)]
    threads = [
        threading.Thread(target=lambda t=t: [storage.write_text(file, t) for _ in range(10)])
        for t in texts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.read_text() in texts
    assert list(tmp_path.iterdir()) == [file]


def test_only_once_lets_one_in_at_a_time(tmp_path: Path) -> None:
    target, inside, most = tmp_path / "deep" / "set", [0], [0]

    def work() -> None:
        with storage.only_once(target):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.02)
            inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert not target.exists()
