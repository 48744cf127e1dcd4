"""The start-up bridge, each case in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STARTUP = ROOT / "startup"
NAMES = ["calib", "calib_pruned", "calib_quantized"]
# Whether or not the package is installed here, each case starts with no finder in place and
# then runs the very line of the start-up file.
START = "import sys; sys.meta_path = [f for f in sys.meta_path if type(f).__name__ != '_Finder']\n"
START += (STARTUP / "lm_calib_plugin_autoload.pth").read_text()


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k != "LM_CALIB_NO_AUTOLOAD"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=kept | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def output(code: str, **environment: str) -> str:
    done = run(START + code, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


KNOWN = """
from lm_eval.api.registry import model_registry
print([n for n in model_registry.keys() if n.startswith("calib")])
"""


def test_start_up_files_say_exactly_this():
    pth = (STARTUP / "lm_calib_plugin_autoload.pth").read_text()
    start = (STARTUP / "lm_calib_plugin_autoload.start").read_text()
    assert pth == "import lm_calib_plugin._autoload; lm_calib_plugin._autoload.install()\n"
    assert start == "lm_calib_plugin._autoload:install\n"


def test_names_appear_with_lm_eval_models():
    assert output("import lm_eval.models" + KNOWN) == str(NAMES)


def test_nothing_heavy_is_imported_at_start():
    loaded = output("print([m for m in ('typing', 're', 'importlib.util') if m in sys.modules])")
    plain = run(
        "import sys; print([m for m in ('typing', 're') if m in sys.modules])", PYTHONPATH=""
    )
    assert loaded == plain.stdout.strip()


def test_builtin_models_still_resolve():
    code = "from lm_eval.api.registry import get_model; print(get_model('hf').__name__)"
    assert output(code) == "HFLM"


def test_finder_leaves_and_the_loader_is_untouched():
    code = """
import lm_eval.models, inspect, importlib
from importlib.machinery import SourceFileLoader
import lm_calib_plugin._autoload as bridge
assert not bridge.is_waiting()
loader = lm_eval.models.__spec__.loader
assert type(loader) is SourceFileLoader and "exec_module" not in vars(loader)
assert "MODEL_MAPPING" in inspect.getsource(lm_eval.models)
assert importlib.reload(lm_eval.models) is lm_eval.models
"""
    assert output(code + KNOWN) == str(NAMES)


def test_other_imports_are_not_answered():
    code = "import lm_calib_plugin._autoload as b; f = b._Finder(); print(f.find_spec('lm_eval'))"
    assert output(code) == "None"


def test_install_and_register_can_be_repeated():
    code = """
import lm_calib_plugin._autoload as bridge
bridge.install()
print(sum(type(f).__name__ == "_Finder" for f in sys.meta_path), end=" ")
bridge.register(); bridge.register(); bridge.install()
"""
    assert output(code + KNOWN) == f"1 {NAMES}"


def test_install_after_lm_eval_models_adds_at_once():
    code = """
import lm_eval.models
from lm_eval.api.registry import model_registry
for name in list(model_registry.keys()):
    if name.startswith("calib"):
        del model_registry._objs[name]
lm_calib_plugin._autoload.install()
"""
    assert output(code + KNOWN) == str(NAMES)


def test_register_alone_keeps_the_builtin_models():
    code = """
import lm_calib_plugin
lm_calib_plugin.register()
from lm_eval.api.registry import model_registry
assert "hf" in model_registry
"""
    assert output(code + KNOWN, LM_CALIB_NO_AUTOLOAD="1") == str(NAMES)


@pytest.mark.parametrize(("value", "known"), [("1", []), ("0", NAMES), ("", NAMES)])
def test_opt_out(value: str, known: list[str]):
    assert output("import lm_eval.models" + KNOWN, LM_CALIB_NO_AUTOLOAD=value) == str(known)


def test_inert_when_lm_eval_loads_plugins_itself():
    code = """
import lm_eval.api.registry as registry
registry.load_plugins = lambda: None
import lm_eval.models
"""
    assert output(code + KNOWN) == "[]"


def test_a_registered_name_is_kept():
    code = """
from lm_eval.api.registry import model_registry
model_registry.register("calib", target="somewhere:Else")
import lm_eval.models
print(model_registry._objs["calib"])
"""
    assert output(code) == "somewhere:Else"


def test_a_failure_inside_costs_one_line_and_no_import():
    code = """
import lm_eval.api.registry as registry
def refuse(*args, **kwargs):
    raise RuntimeError("frozen")
import lm_calib_plugin._autoload as bridge
bridge.MODELS = {"calib": None}
bridge._add_names = refuse
import lm_eval.models
from lm_eval.api.registry import get_model
print(get_model("dummy").__name__)
"""
    done = run(START + code)
    assert done.returncode == 0
    assert done.stdout.strip() == "DummyLM"
    assert done.stderr.count("\n") == 1
    assert "RuntimeError: frozen" in done.stderr
    assert "lm-calib eval" in done.stderr


def test_a_loader_that_can_not_be_wrapped_still_loads():
    code = """
from importlib.machinery import SourceFileLoader
class Sealed(SourceFileLoader):
    def __setattr__(self, name, value):
        if name == "exec_module":
            raise AttributeError("sealed")
        super().__setattr__(name, value)
import importlib.util, lm_eval
from pathlib import Path
path = Path(lm_eval.__file__).parent / "models" / "__init__.py"
class First:
    def find_spec(self, name, path_=None, target=None):
        if name == "lm_eval.models":
            return importlib.util.spec_from_loader(name, Sealed(name, str(path)))
sys.meta_path.insert(1, First())
import lm_eval.models
print(len(lm_eval.models.MODEL_MAPPING) > 10)
"""
    done = run(START + code)
    assert (done.returncode, done.stdout.strip()) == (0, "True")
    assert "sealed" in done.stderr


def test_install_itself_never_raises():
    code = "sys.meta_path = None\nlm_calib_plugin._autoload.install()\nprint('alive')"
    assert output(code) == "alive"
