"""``lm-calib cache ls | rm | verify``, and what ``doctor`` says of kept models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lm_calib_plugin import cli, doctor
from lm_calib_plugin.artifacts.record import RECORD, TENSORS
from lm_calib_plugin.artifacts.shelf import Entry, at_rest, entries, lock_of, mark_unkept
from tests.artifacts.test_cache import run

ROOT = Path(__file__).parents[2]
RECIPES: list[dict[str, Any]] = [
    {"method": "wanda", "sparsity": 0.5},
    {"method": "rtn", "bits": 4, "group_size": 16, "targets": "*q_proj"},
    {"method": "shortgpt", "blocks": 1},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models: the first was used last, ten days lie between them."""
    folder = tmp_path_factory.mktemp("made")
    for number, given in enumerate(RECIPES):
        _, report = run(folder, given)
        then = time.time() - number * 10 * 86400 - 60
        os.utime(Path(report.cache["artifact"]) / RECORD, (then, then))
    return folder


@pytest.fixture
def shelf(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "kept"))


def calib(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        cli.main(["cache", *arguments])
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out + captured.err


def there(shelf: Path) -> list[str]:
    return [entry.record["recipe"]["method"] for entry in entries(shelf) if entry.record]


def test_the_list_says_what_is_kept(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = calib("ls", "--cache", str(shelf), capsys=capsys)
    assert code == 0
    header, first, second, third, total = out.splitlines()
    assert header.split()[:6] == ["key", "what", "model", "calibration", "size", "made"]
    assert "wanda sparsity=0.5" in first
    assert "a given set (12 x 32, 39e936ab3534)" in first
    assert first.split("  ")[-1] == "1 minute ago"
    assert "rtn bits=4" in second
    assert second.endswith("10 days ago")
    assert "shortgpt" in third
    assert "blocks=1" in third
    for line, entry in zip((first, second, third), entries(shelf), strict=True):
        assert line.startswith(entry.key[:12])
    assert total.startswith("3 models, ")


def test_the_list_for_programs(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out = calib("ls", "--json", "--cache", str(shelf), capsys=capsys)
    found = json.loads(out)
    assert [one["recipe"]["method"] for one in found] == ["wanda", "rtn", "shortgpt"]
    sizes = [sum(f.stat().st_size for f in Path(one["folder"]).iterdir()) for one in found]
    assert [one["bytes"] for one in found] == sizes
    assert all(one["problem"] is None for one in found)
    assert {"key", "recipe_key", "last_used", "created", "weights_digest"} <= set(found[0])


def test_an_empty_cache_is_said(cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = calib("ls", capsys=capsys)
    assert (code, out) == (0, f"nothing is kept in {cache_dir / 'artifacts'}\n")
    code, out = calib("verify", capsys=capsys)
    assert code == 0
    code, out = calib("rm", "--all", capsys=capsys)
    assert (code, out.split(" deleted")[0]) == (0, "0 models")


def test_listing_imports_nothing_heavy() -> None:
    code = (
        "import sys; from lm_calib_plugin import cli\n"
        "try: cli.main(['cache', 'ls'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


# --- rm ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (["--all"], []),
        (["--older-than", "15d"], ["wanda", "rtn"]),
        (["--older-than", "1w"], ["wanda"]),
        (["--older-than", "1h"], ["wanda"]),
        (["--older-than", "300d"], ["wanda", "rtn", "shortgpt"]),
        (["--larger-than", "50KB"], ["rtn", "shortgpt"]),
        (["--larger-than", "1GB"], ["wanda", "rtn", "shortgpt"]),
        (["--keep", "1GB"], ["wanda", "rtn", "shortgpt"]),
        (["--keep", "0B"], []),
    ],
)
def test_rm_deletes_what_is_meant(
    arguments: list[str], left: list[str], shelf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {entry.key: entry for entry in entries(shelf)}
    code, out = calib("rm", *arguments, "--cache", str(shelf), capsys=capsys)
    assert code == 0
    assert there(shelf) == left
    gone = [key for key in before if key not in {entry.key for entry in entries(shelf)}]
    *lines, total = out.splitlines()
    assert sorted(line.split()[0] for line in lines) == sorted(key[:12] for key in gone)
    assert all(line.endswith("deleted") for line in lines)
    assert total.startswith(f"{len(gone)} model")
    assert doctor.leftovers(shelf) == []


def test_keep_deletes_the_least_recently_used_first(
    shelf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = [entry.bytes for entry in entries(shelf)]
    # Loading makes the oldest the newest.
    assert run(shelf, RECIPES[2])[1].cache["hit"]
    assert there(shelf) == ["shortgpt", "wanda", "rtn"]
    calib("rm", "--keep", f"{sizes[2] + sizes[0]}B", "--cache", str(shelf), capsys=capsys)
    assert there(shelf) == ["shortgpt", "wanda"]


def test_rm_by_key(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, _ = entries(shelf)
    calib("rm", first.key[:12], second.key, "--cache", str(shelf), capsys=capsys)
    assert there(shelf) == ["shortgpt"]


def test_locks_go_with_what_they_guard(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, _ = entries(shelf)
    mark_unkept(first.folder)
    assert lock_of(first.folder).exists()
    calib("rm", first.key, "--cache", str(shelf), capsys=capsys)
    assert not [path for path in shelf.iterdir() if first.key in path.name]
    assert lock_of(second.folder).exists()
    # What a run that came to nothing left behind, or an older version; what is foreign stays.
    mark_unkept(shelf / ("a" * 64))
    lock_of(shelf / ("b" * 64)).touch()
    (shelf / "mine.lock").touch()
    used = shelf / ("c" * 64)
    with at_rest(used) as free:
        assert free
        calib("rm", "--all", "--cache", str(shelf), capsys=capsys)
    assert {path.name for path in shelf.iterdir()} == {"mine.lock", lock_of(used).name}


def test_what_is_in_use_stays(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, *_ = entries(shelf)
    with at_rest(first.folder) as free:
        assert free
        code, out = calib("rm", "--all", "--cache", str(shelf), capsys=capsys)
        assert calib("verify", "--cache", str(shelf), capsys=capsys)[0] == 0
    assert code == 0
    assert f"{first.key[:12]}  wanda sparsity=0.5" in out
    assert "in use, left alone" in out
    assert there(shelf) == ["wanda"]


@pytest.mark.parametrize("command", ["rm", "verify"])
@pytest.mark.parametrize(
    "text", ["../outside", "..", ".", "/etc", "", "*", "abc", "link", "ABCDEF", "g" * 12, "a" * 65]
)
def test_only_keys_are_read(
    command: str, text: str, shelf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = shelf.parent / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    (shelf / "link").symlink_to(outside)
    code, out = calib(command, "--cache", str(shelf), "--", text, capsys=capsys)
    assert code == 2
    assert out.startswith(f"error: key: got {text!r}; 4 to 64 digits")
    assert (outside / "file").read_text() == "mine"
    assert len(there(shelf)) == 3


def test_a_link_is_deleted_and_not_what_it_leads_to(
    shelf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = shelf.parent / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    link = shelf / ("ab" * 32)
    link.symlink_to(outside)
    code, out = calib("verify", "abab", "--cache", str(shelf), capsys=capsys)
    assert code == 1
    assert "not a folder" in out
    code, _ = calib("rm", "abab", "--cache", str(shelf), capsys=capsys)
    assert code == 0
    assert not link.is_symlink()
    assert (outside / "file").read_text() == "mine"


def test_keys_that_name_none_or_several_are_refused(
    shelf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for ending in "01":
        (shelf / ("c0ffee" + ending * 58)).mkdir()
    code, out = calib("rm", "c0ffee", "--cache", str(shelf), capsys=capsys)
    assert code == 2
    assert "2 artifacts in" in out
    code, out = calib("rm", "deadbeef", "--cache", str(shelf), capsys=capsys)
    assert code == 2
    assert "no artifact in" in out
    assert len(entries(shelf)) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of KEY..."),
        (["--all", "--keep", "1GB"], "got 2 ways to choose"),
        (["abcd", "--all"], "got 2 ways to choose"),
        (["--older-than", "30"], "hours (h), days (d) or weeks (w)"),
        (["--older-than", "a month"], "hours (h), days (d) or weeks (w)"),
        (["--larger-than", "5"], "a size with its unit"),
        (["--keep", "-1GB"], "a size with its unit"),
        (["--keep", "lots"], "a size with its unit"),
    ],
)
def test_rm_wants_to_know_what(
    arguments: list[str], message: str, shelf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = calib("rm", *arguments, "--cache", str(shelf), capsys=capsys)
    assert code == 2
    assert message in out
    assert len(there(shelf)) == 3


def test_a_folder_that_is_not_there_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = calib("ls", "--cache", str(tmp_path / "typo"), capsys=capsys)
    assert code == 2
    assert out.startswith("error: --cache: no folder")


# --- verify and doctor ---------------------------------------------------------------------------


def damage(entry: Entry, name: str) -> None:
    content = bytearray((entry.folder / name).read_bytes())
    content[-2] ^= 1
    (entry.folder / name).write_bytes(bytes(content))


def test_verify_names_what_is_damaged(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = calib("verify", "--cache", str(shelf), capsys=capsys)
    assert code == 0
    assert out.count("  whole\n") == 3
    first, second, third = entries(shelf)
    damage(first, TENSORS)
    damage(second, RECORD)
    code, out = calib("verify", "--cache", str(shelf), capsys=capsys)
    assert code == 1
    lines = {line[:12]: line for line in out.splitlines()}
    assert f"{first.folder / TENSORS}: damaged: expected sha256" in lines[first.key[:12]]
    assert f"{second.folder / RECORD}: damaged" in lines[second.key[:12]]
    assert lines[third.key[:12]].endswith("whole")
    assert "3 models" in out.splitlines()[-1]
    assert out.splitlines()[-1].endswith("2 damaged")
    code, out = calib("verify", third.key[:8], "--cache", str(shelf), capsys=capsys)
    assert code == 0
    code, out = calib("ls", "--cache", str(shelf), capsys=capsys)
    assert "damaged" in out


def test_doctor_tells_of_kept_models_and_leftovers(cache_dir: Path) -> None:
    folder = cache_dir / "artifacts"
    assert list(doctor._artifacts()) == []
    for given in RECIPES[:2]:
        run(folder, given)
    (finding,) = doctor._artifacts()
    assert finding.detail.startswith(f"2 in {folder}, ")
    first, _ = entries(folder)
    damage(first, RECORD)
    _, finding = doctor._artifacts()
    assert finding.state is doctor.State.NOTE
    assert f"lm-calib cache rm {first.key[:12]}" in finding.detail
    left = folder / f".{first.key}.0123abcd.tmp"
    left.mkdir()
    (left / TENSORS).write_text("half")
    assert doctor.leftovers(cache_dir) == [left]
    list(doctor._cache(clean=True))
    assert doctor.leftovers(cache_dir) == []
    assert len(entries(folder)) == 2
