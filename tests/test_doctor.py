"""What ``lm-calib doctor`` sees, says and deletes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm_calib_plugin import _autoload, builtin_models, doctor, storage
from lm_calib_plugin.doctor import State

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("LM_CALIB_CACHE", str(folder))
    return folder


def age(path: Path) -> None:
    then = time.time() - 60
    for each in (*path.rglob("*"), path):
        os.utime(each, (then, then))


def test_leftovers_of_a_killed_process_are_found_and_cleaned(cache: Path):
    code = (
        "import os\nfrom lm_calib_plugin import storage\n"
        "folder = storage.cache_dir() / 'models' / 'm'\n"
        "with storage.only_once(folder), storage.new_folder(folder) as temporary:\n"
        "    (temporary / 'half').write_text('x'); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=60)
    assert done.returncode == -9
    (left,) = doctor.leftovers(cache)
    assert not doctor.is_in_use(left)  # its lock is free, so nobody writes there
    (seen,) = [f for f in doctor._cache(clean=False) if f.what == "leftover"]
    assert seen.state is State.NOTE
    assert "--clean" in seen.detail
    (gone,) = [f for f in doctor._cache(clean=True) if f.what == "leftover"]
    assert "deleted" in gone.detail
    assert doctor.leftovers(cache) == []


def test_what_is_being_written_is_left_alone(cache: Path):
    folder = cache / "m"
    with storage.only_once(folder), storage.new_folder(folder) as temporary:
        age(temporary)
        (left,) = doctor.leftovers(cache)
        assert doctor.is_in_use(left)
        findings = list(doctor._cache(clean=True))
        assert temporary.is_dir()
    assert any("being written" in f.detail for f in findings)


def test_without_a_lock_age_decides(cache: Path):
    left = cache / ".report.json.0123abcd.tmp"
    left.write_text("{")
    assert doctor.is_in_use(left)
    age(left)
    assert not doctor.is_in_use(left)
    list(doctor._cache(clean=True))
    assert not left.exists()


def test_other_files_are_never_touched(cache: Path):
    for name in ("x.tmp", ".hidden", ".a.0123abcd.tmp.txt", ".a.0123ABCD.tmp"):
        (cache / name).write_text("")
    assert doctor.leftovers(cache) == []


NAMES = list(_autoload.MODELS)


@pytest.mark.parametrize(
    ("seen", "opted_out", "said"),
    [
        ((False, ["hf", *NAMES]), "", "ok active: lm_eval knows calib, calib_pruned"),
        ((False, ["hf"]), "", "problem the start-up file did not run"),
        ((False, ["hf"]), "1", "note off, LM_CALIB_NO_AUTOLOAD is set"),
        ((True, ["hf"]), "", "ok not needed"),
    ],
)
def test_bridge_is_told_in_each_state(
    seen: tuple[bool, list[str]], opted_out: str, said: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(doctor, "_seen_by_lm_eval", lambda: seen)
    monkeypatch.setenv(_autoload.OPT_OUT, opted_out)
    (finding,) = doctor._bridge()
    assert f"{finding.state.value} {finding.detail}".startswith(said)


def test_bridge_is_looked_at_in_a_process_without_our_package():
    finds_plugins, names = doctor._seen_by_lm_eval()
    assert not finds_plugins
    assert "hf" in names


def test_broken_lm_eval_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "lm_eval.py").write_text("raise RuntimeError('half installed')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (finding,) = doctor._bridge()
    assert finding.state is State.PROBLEM
    assert "half installed" in finding.detail


def test_builtin_models_are_examined(cache: Path, monkeypatch: pytest.MonkeyPatch):
    name = builtin_models.names()[0]
    monkeypatch.setattr(builtin_models, "missing", lambda n: "pip install it")
    (finding,) = doctor._builtin()
    assert (finding.state, finding.detail) == (State.NOTE, "not installed; pip install it")
    folder = builtin_models.folder_of(name)
    folder.mkdir(parents=True)
    (finding,) = doctor._builtin()
    assert finding.state is State.PROBLEM
    (folder / builtin_models.MARKER).write_text("{}")
    (finding,) = doctor._builtin()
    assert finding.state is State.OK


def test_whole_report_from_the_command_line(cache: Path):
    done = subprocess.run(
        [sys.executable, "-m", "lm_calib_plugin", "doctor"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode in (0, 1)
    assert done.stderr == ""
    for word in ("lm-calib-plugin", "lm-eval", "torch", "bridge", str(cache), "builtin:"):
        assert word in done.stdout
    assert (done.returncode == 1) == ("problem" in done.stdout)
