"""``optimum-cli export calib``: the words of ``lm-calib export``, found without being installed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lm_calib_plugin import cli
from tests.tiny import saved_model

ROOT = Path(__file__).parents[2]
FILE = ROOT / "optimum" / "commands" / "register" / "register_calib.py"
OPTIMUM = Path(sys.executable).parent / "optimum-cli"
HEAVY = ("torch", "transformers", "typer", "pydantic", "accelerate", "lm_calib_plugin.cli")

needs_optimum = pytest.mark.skipif(not OPTIMUM.exists(), reason="optimum-cli is not installed")


def run(*words: str, path: tuple[Path, ...] = (ROOT,), **extra: str) -> Any:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1", **extra}
    return subprocess.run(
        [str(OPTIMUM), *words], env=env, capture_output=True, text=True, timeout=300, check=False
    )


def module() -> Any:
    spec = importlib.util.spec_from_file_location("register_calib_under_test", FILE)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_nothing_stands_in_the_way_of_the_namespace() -> None:
    """One ``__init__.py`` on this path, and Optimum itself could not be imported."""
    files = [p for p in (ROOT / "optimum").rglob("*") if p.is_file() and p.suffix != ".pyc"]
    assert files == [FILE]


@needs_optimum
def test_help_lists_the_command_and_imports_nothing_for_it() -> None:
    listed = run("export", "--help")
    assert listed.returncode == 0, listed.stderr
    assert "calib     Prune or quantize" in listed.stdout
    code = (
        "import sys; sys.argv = ['optimum-cli', '--help']\n"
        "from optimum.commands.optimum_cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print('heavy', [m for m in {HEAVY} if m in sys.modules])\n"
        "print('found', 'optimum.commands.register.register_calib' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "heavy []\nfound True" in done.stdout, done.stderr


@needs_optimum
def test_other_commands_are_as_before() -> None:
    done = run("env", "--help")
    assert (done.returncode, done.stderr) == (0, "")


@needs_optimum
def test_help_and_errors_are_those_of_lm_calib(tmp_path: Path) -> None:
    shown = run("export", "calib", "--help")
    assert shown.returncode == 0
    assert "Usage: lm-calib export" in shown.stdout
    assert "--sparsity VALUE" in shown.stdout
    given = ["--method", "wanda", "--sparsty", "0.5"]
    done = run("export", "calib", "--model", "no/such", *given, str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: --sparsty: unknown option; did you mean `--sparsity`?")
    assert done.stderr.count("\n") == 1


def test_it_exports_what_lm_calib_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real ``optimum-cli`` in this process, where everything is loaded already."""
    from optimum.commands import optimum_cli

    folder = saved_model(tmp_path / "model")
    recipe = ["--method", "magnitude", "--sparsity", "0.5", "--quiet"]
    monkeypatch.syspath_prepend(str(ROOT))
    given = ["export", "calib", f"--model={folder}", *recipe, str(tmp_path / "a")]
    monkeypatch.setattr(sys, "argv", ["optimum-cli", *given])
    with pytest.raises(SystemExit) as ended:
        optimum_cli.main()
    assert ended.value.code in (None, 0)
    told = json.loads((tmp_path / "a" / "report.json").read_text())
    assert told["command"].startswith(
        f"lm-calib export --model={Path(folder).name} --method magnitude"
    )
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", "--pretrained", folder, *recipe, str(tmp_path / "b")])
    assert ended.value.code in (None, 0)
    one, other = ((tmp_path / x / "model.safetensors").read_bytes() for x in "ab")
    assert one == other


@needs_optimum
def test_two_places_are_no_conflict(tmp_path: Path) -> None:
    """An editable install has the file in the source tree and beside Optimum."""
    shutil.copytree(ROOT / "optimum", tmp_path / "optimum")
    done = run("export", "--help", path=(ROOT, tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Prune or quantize") == 1


@pytest.mark.parametrize("missing", ["base", "export.base", "optimum_cli"])
def test_a_changed_optimum_gets_no_command_and_no_error(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, f"optimum.commands.{missing}", None)
    assert module().REGISTER_COMMANDS == []


def test_an_optimum_without_export_gets_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from optimum.commands import optimum_cli

    monkeypatch.setattr(optimum_cli, "OPTIMUM_CLI_ROOT_SUBCOMMANDS", [])
    assert module().REGISTER_COMMANDS == []


def test_a_changed_base_class_stops_no_other_command(monkeypatch: pytest.MonkeyPatch) -> None:
    ((kind, _),) = module().REGISTER_COMMANDS

    def changed(self: Any, *args: Any, **kwargs: Any) -> None:
        raise TypeError("another signature")

    monkeypatch.setattr(kind.__base__, "__init__", changed)

    class Subparsers:
        choices: dict[str, Any] = {}

    kind(Subparsers(), command=kind.COMMAND)  # nothing is raised, and nothing is added
