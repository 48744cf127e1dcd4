"""Nothing damaged, half-written, foreign or newer is ever taken for an artifact."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lm_calib_plugin import doctor, storage
from lm_calib_plugin.artifacts import record as records
from lm_calib_plugin.artifacts.record import (
    RECORD,
    TENSORS,
    DamagedError,
    NewerError,
    check_tensors,
    read_record,
    write_record,
)
from lm_calib_plugin.artifacts.shelf import entries, verified
from tests.artifacts.test_cache import FAMILIES, alike, run

ROOT = Path(__file__).parents[2]
# One small layer, so that every byte can be tried.
SMALL = {"method": "rtn", "bits": 4, "group_size": 16, "targets": "*0.self_attn.k_proj"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shelf = tmp_path_factory.mktemp("made")
    run(shelf, SMALL)
    (entry,) = entries(shelf)
    return entry.folder


@pytest.fixture
def kept(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / made.name)
    return tmp_path / made.name


def check(folder: Path) -> None:
    check_tensors(folder, read_record(folder))


def test_every_changed_byte_is_noticed(kept: Path) -> None:
    check(kept)
    for name in (RECORD, TENSORS):
        file = kept / name
        whole = file.read_bytes()
        known = read_record(kept)
        for place in range(len(whole)):
            changed = bytearray(whole)
            changed[place] ^= 1 << (place % 8)
            file.write_bytes(bytes(changed))
            with pytest.raises((DamagedError, NewerError)):
                _ = read_record(kept) if name == RECORD else check_tensors(kept, known)
        file.write_bytes(whole)
    check(kept)


def test_every_cut_is_noticed(kept: Path) -> None:
    for name in (RECORD, TENSORS):
        file = kept / name
        whole = file.read_bytes()
        lengths = {*range(0, len(whole), 37), len(whole) - 1}
        for content in (*(whole[:length] for length in lengths), whole + b"\n", whole + whole):
            file.write_bytes(content)
            with pytest.raises(DamagedError):
                check(kept)
        file.write_bytes(whole)
    check(kept)


def test_files_too_few_too_many_and_links_are_noticed(kept: Path, tmp_path: Path) -> None:
    for name in (RECORD, TENSORS):
        aside = tmp_path / "aside"
        (kept / name).rename(aside)
        with pytest.raises(DamagedError, match="missing"):
            check(kept)
        (kept / name).symlink_to(aside)
        with pytest.raises(DamagedError, match="not a plain file"):
            check(kept)
        (kept / name).unlink()
        aside.rename(kept / name)
    (kept / "more").write_text("")
    with pytest.raises(DamagedError, match="'more' does not belong there"):
        check(kept)
    (kept / "more").unlink()
    moved = tmp_path / "moved"
    kept.rename(moved)
    kept.symlink_to(moved)
    with pytest.raises(DamagedError, match="not a folder"):
        check(kept)
    kept.unlink()
    kept.write_text("")
    with pytest.raises(DamagedError, match="not a folder"):
        check(kept)


def test_an_artifact_under_another_name_is_noticed(kept: Path) -> None:
    other = kept.with_name("0" * 64)
    kept.rename(other)
    with pytest.raises(DamagedError, match="belongs to"):
        check(other)


DAMAGE = {
    "tensors": lambda folder: _flip(folder / TENSORS),
    "record": lambda folder: _flip(folder / RECORD),
    "cut": lambda folder: os.truncate(folder / TENSORS, 100),
    "gone": lambda folder: (folder / RECORD).unlink(),
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
    "link": lambda folder: (folder.rename(folder.parent / "x"), folder.symlink_to("x")),
    "dead link": lambda folder: (shutil.rmtree(folder), folder.symlink_to("nowhere")),
    "file": lambda folder: (shutil.rmtree(folder), folder.write_text("x")),
}


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_made_again_with_a_warning(damage: str, tmp_path: Path) -> None:
    plain = run(False, SMALL)
    run(tmp_path, SMALL)
    (entry,) = entries(tmp_path)
    DAMAGE[damage](entry.folder)
    model, report = run(tmp_path, SMALL)
    assert report.cache["hit"] is False
    notes = [w for w in report.warnings if w.startswith("cache: ")]
    assert len(notes) == 1
    assert "damaged" in notes[0]
    assert notes[0].endswith("It was made again.")
    report.warnings.remove(notes[0])
    alike((model, report), plain)
    again = run(tmp_path, SMALL)
    assert again[1].cache["hit"] is True
    alike(again, plain)


def changed(folder: Path, **fields: Any) -> None:
    """Write a record with other fields that agrees with itself, as an attacker would."""
    content = {**read_record(folder), **fields}
    del content["format"], content["format_version"]
    write_record(folder, content)


FORGED: dict[str, Any] = {
    "other_result": lambda r: {"result": {**r["result"], "rows": [{"name": "x"}]}},
    "no_result": lambda r: {"result": {}},
    "other_recipe": lambda r: {"result": {**r["result"], "unchanged": True}},
    "other_names": lambda r: {"changes": {**r["changes"], "changed": ["../x"]}},
    "no_block": lambda r: {"changes": {**r["changes"], "kept": [7]}},
    "no_blocks": lambda r: {"changes": {**r["changes"], "kept": []}},
    "no_module": lambda r: {
        "changes": {
            **r["changes"],
            "stand_ins": [{"block": 0, "members": ["__class__"], "outputs": 2}],
        }
    },
    "no_place": lambda r: {"changes": {**r["changes"], "biases": ["lm_head.bias"]}},
    "no_term": lambda r: {"changes": {**r["changes"], "terms": [{"block": 9, "before": True}]}},
    "more_words": lambda r: {"changes": {**r["changes"], "code": "x"}},
    "no_grids": lambda r: {"grids": {}},
    "other_grids": lambda r: {
        "grids": {name: {**grid, "kind": "Grid"} for name, grid in r["grids"].items()}
    },
    "inputs": lambda r: {"activations": {"spec": "int8 dynamic", "limits": {}}},
    "kv": lambda r: {"kv_bits": 4},
}


@pytest.mark.parametrize("forged", FORGED)
def test_a_forged_record_leads_nowhere(forged: str, tmp_path: Path) -> None:
    plain = run(False, SMALL)
    run(tmp_path, SMALL)
    (entry,) = entries(tmp_path)
    changed(entry.folder, **FORGED[forged](entry.record))
    check(entry.folder)
    model, report = run(tmp_path, SMALL)
    assert report.cache["hit"] is False
    note = report.warnings.pop()
    assert "does not fit this model" in note
    alike((model, report), plain)


def test_forged_tensors_end_in_an_error(tmp_path: Path) -> None:
    """Where both files agree with each other, the digest of the whole model is what tells."""
    run(tmp_path, SMALL)
    (entry,) = entries(tmp_path)
    file = entry.folder / TENSORS
    tensors = load_file(file)
    name = next(name for name in tensors if name.startswith("parameter/"))
    tensors[name][0, 0] += 1
    save_file(tensors, file)
    changed(entry.folder, sha256=storage.file_digest(file))
    check(entry.folder)
    with pytest.raises(Exception, match="it was kept with"):
        run(tmp_path, SMALL)


def test_a_newer_artifact_is_left_alone_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(False, SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(records, "FORMAT_VERSION", 2)
        run(tmp_path, SMALL)
    (entry,) = entries(tmp_path)
    before = (entry.folder / RECORD).read_bytes()
    assert "written in format 2, this build reads up to 1" in entry.problem
    model, report = run(tmp_path, SMALL)
    assert report.cache == {"hit": False, "artifact": None}
    note = report.warnings.pop()
    assert "pip install --upgrade" in note
    assert "left alone" in note
    alike((model, report), plain)
    assert (entry.folder / RECORD).read_bytes() == before


# Children are killed at every step of storing, and in the middle of the large file.
KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from lm_calib_plugin.artifacts import keeping, shelf
from tests.artifacts.test_cache import FAMILIES, run

shelf_folder, given = Path(sys.argv[1]), FAMILIES["magnitude"][0]

def steps():
    # Before every call that touches the disk.
    count = [0]
    stop = [10 ** 9]
    def counted(owner, name):
        original = getattr(owner, name)
        def call(*args, **named):
            count[0] += 1
            if count[0] == stop[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **named)
        setattr(owner, name, call)
    for name in ("mkdir", "replace", "unlink", "write_bytes"):
        counted(Path, name)
    counted(shutil, "rmtree")
    original = keeping.save_file
    def slowly(tensors, path):
        original(tensors, path)
        whole = Path(path).read_bytes()
        with open(path, "wb") as file:
            for start in range(0, len(whole), len(whole) // 2):
                file.write(whole[start : start + len(whole) // 2])
                file.flush()
                count[0] += 1
                if count[0] == stop[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
    keeping.save_file = slowly
    return count, stop

found = []
number = 1
while True:
    child = os.fork()
    if not child:
        count, stop = steps()
        stop[0] = number
        try:
            run(shelf_folder, given)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    whole = [(e.key, e.problem, shelf.verified(e)) for e in shelf.entries(shelf_folder)]
    found.append([status, whole])
    if status == 0:
        break
    number += 1
print(json.dumps(found))
"""


def test_a_killed_process_leaves_nothing_half_written(cache_dir: Path, tmp_path: Path) -> None:
    shelf = cache_dir / "artifacts"
    done = subprocess.run(
        [sys.executable, "-c", KILLED.format(root=str(ROOT)), str(shelf)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    statuses = [status for status, _ in found]
    assert len(statuses) > 5
    assert set(statuses[:-1]) == {9}
    for _, there in found:
        assert all(problem == said == "" for _, problem, said in there), there
    assert len(found[-1][1]) == 1
    left = doctor.leftovers(cache_dir)
    assert left
    assert not any(doctor.is_in_use(path) for path in left)
    list(doctor._cache(clean=True))
    assert doctor.leftovers(cache_dir) == []
    (entry,) = entries(shelf)
    assert verified(entry) == ""
    given, name = FAMILIES["magnitude"]
    found = run(shelf, given, name)
    assert found[1].cache["hit"]
    alike(found, run(False, given, name))
