"""The ``lm-calib`` command, mostly in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from lm_calib_plugin import cli, cli_arguments, listing, registry
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.runtime import Runtime
from lm_calib_plugin.schemes import SCHEMES

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "lm_eval", "datasets")


def lm_calib(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (environment.pop("first_path", ""), str(ROOT))))
    return subprocess.run(
        [sys.executable, "-m", "lm_calib_plugin", *arguments],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def stub(tmp_path: Path) -> str:
    """A folder with an ``lm_eval`` that prints the command line it was given."""
    files = {
        "__init__.py": "",
        "models.py": "",
        "api/__init__.py": "",
        "api/registry.py": "class R(dict):\n    def register(self, n, target): self[n] = target\n"
        "model_registry = R()\n",
        "__main__.py": "import json, sys\nfrom lm_eval.api.registry import model_registry\n"
        "def cli_evaluate():\n"
        "    if 'sparsity=2' in sys.argv:\n"
        "        from lm_calib_plugin import Recipe\n"
        "        Recipe(method='wanda', sparsity=2)\n"
        "    print(json.dumps([sys.argv, sorted(model_registry)]))\n",
    }
    for name, text in files.items():
        file = tmp_path / "lm_eval" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return str(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["--model", "calib_pruned", "--model_args", "a=1,b=2", "--tasks", "x", "y"],
        ["--config", "f.yaml"],
        ["run", "--config=f.yaml", "-L", "5", "--", "--verbatim", ""],
        ["ls", "tasks"],
        ["--model_args", '{"calibration":[{"source":"self"}]}', "--install-completion"],
    ],
)
def test_eval_passes_everything_on(arguments: list[str], stub: str):
    done = lm_calib("eval", *arguments, first_path=stub)
    assert done.returncode == 0, done.stderr
    argv, names = json.loads(done.stdout)
    assert argv == ["lm_eval", *arguments]
    assert names == ["calib", "calib_pruned", "calib_quantized"]


def test_eval_ends_a_users_error_with_one_line(stub: str):
    done = lm_calib("eval", "--model_args", "sparsity=2", first_path=stub)
    assert done.returncode == 2
    assert done.stderr.startswith("error: sparsity: got 2")
    assert done.stderr.count("\n") == 1


def test_eval_reaches_the_real_harness():
    done = lm_calib("eval", "run", "--help")
    assert done.returncode == 0
    assert "--model_args" in done.stdout


LIGHT = [
    ["--help"],
    ["ls", "methods"],
    ["ls", "allocations"],
    ["ls", "scores"],
    ["ls", "refinements"],
    ["ls", "updates"],
    ["ls", "schemes"],
    ["ls", "transforms"],
    ["ls", "grids"],
    ["ls", "roundings"],
    ["ls", "observers"],
    ["ls", "sources"],
    ["ls", "packings"],
    ["ls", "selections"],
    ["ls", "options"],
    ["show", "method=wanda,sparsity=0.5"],
]


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_light_commands_import_nothing_heavy(arguments: list[str]):
    code = "import sys\nfrom lm_calib_plugin.cli import main\n"
    code += f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert not end.code\n"
    code += f"print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("what", "kinds"),
    [
        ("methods", ("pruning", "quantization")),
        ("transforms", ("transform",)),
        ("grids", ("grid",)),
        ("roundings", ("rounding",)),
        ("observers", ("observer",)),
        ("sources", ("calibration",)),
        ("packings", ("packing",)),
        ("selections", ("selection",)),
    ],
)
def test_ls_shows_each_part_with_paper_and_distribution(
    what: str, kinds: tuple[registry.Kind, ...], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        cli.main(["ls", what])
    lines = capsys.readouterr().out.splitlines()
    for kind in kinds:
        for entry in registry.table(kind).values():
            (line,) = [x for x in lines if x.startswith(f"{entry.name} ") and entry.summary in x]
            assert entry.paper in line
            assert entry.distribution in line


def test_ls_schemes_says_what_each_name_stands_for(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(["ls", "schemes"])
    lines = capsys.readouterr().out.splitlines()
    for name, scheme in SCHEMES.items():
        (line,) = [x for x in lines if x.startswith(f"{name} ")]
        assert f"{scheme.bits}-bit {scheme.number}" in line
        assert (f"groups of {scheme.group_size}" in line) == (scheme.group_size != -1)
        assert ("as they are" in line) == (scheme.act_bits is None)
        assert ("calibrated" in line) == (not scheme.act_dynamic)


def test_ls_can_be_asked_for_every_kind_of_part(capsys: pytest.CaptureFixture[str]):
    assert {what.value for what in cli._Listed} == {*listing._KINDS, "schemes", "options"}
    with pytest.raises(SystemExit):
        cli.main(["ls", "--help"])
    shown = capsys.readouterr().out
    assert all(what.value in shown for what in cli._Listed)


def test_ls_sources_shows_the_named_corpora(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(["ls", "sources"])
    lines = capsys.readouterr().out.splitlines()
    for name, row in registry.CORPORA.items():
        (line,) = [x for x in lines if x.startswith(f"{name} ") and row.dataset in x]
        assert row.licence in line
        assert (row.revision or "looked up and recorded when drawn from") in line


def test_ls_names_both_distributions_of_a_claimed_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    kept = registry.table("pruning")["wanda"]
    other = registry.Entry("pruning", "wanda", "other:Wanda", distribution="other-package")
    monkeypatch.setattr(registry, "shadowed", lambda k: [(kept, other)] if k == "pruning" else [])
    with pytest.raises(SystemExit):
        cli.main(["ls", "methods"])
    out = capsys.readouterr().out
    assert "not used: the name belongs to lm-calib-plugin" in out
    assert "other-package" in out


def test_ls_options_explains_every_argument():
    rows = {name: (default, meaning) for name, default, meaning in listing.option_rows()}
    assert list(rows) == [*Recipe.model_fields, *(f.name for f in fields(Runtime))]
    assert rows["nsamples"][0] == "128"
    assert rows["method"][0] == "required"
    assert rows["untie"][0] == "false"
    assert "removed" in rows["sparsity"][1]
    unexplained = {name for name, (_, meaning) in rows.items() if not meaning}
    assert unexplained <= {"schema_version"}


def test_show_prints_a_recipe_that_is_read_back(tmp_path: Path):
    data = "c4*0.25+self?temperature=0.8*0.75"
    given = f"method=wanda,sparsity=0.5,calibration={data},ignore=*mlp*+*q_proj"
    first = lm_calib("show", given)
    assert first.returncode == 0, first.stderr
    assert yaml.safe_load(first.stdout)["sparsity"] == 0.5
    file = tmp_path / "recipe.yaml"
    file.write_text(first.stdout)
    for again in ([str(file)], [f"recipe={file}"], [f"recipe={file}", "sparsity=0.5"]):
        assert lm_calib("show", *again).stdout == first.stdout
    assert Recipe.from_yaml(file) == Recipe(**cli_arguments.recipe_arguments([given]))


def test_show_takes_pairs_in_every_shape():
    expected = {"method": "wanda", "sparsity": "0.5", "targets": "[a,b]"}
    assert cli_arguments.recipe_arguments(["method=wanda,sparsity=0.5,targets=[a,b]"]) == expected
    assert (
        cli_arguments.recipe_arguments(["method=wanda", "sparsity=0.5,", "targets=[a,b]"])
        == expected
    )


def test_show_takes_a_whole_model_args_line(capsys: pytest.CaptureFixture[str]):
    given = "pretrained=org/model,dtype=float16,method=wanda,sparsity=0.5,progress=false"
    assert cli_arguments.recipe_arguments([given]) == {"method": "wanda", "sparsity": "0.5"}
    assert "not checked: pretrained, dtype" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["method=wnada"], "did you mean `wanda`?"),
        (["method=wanda,sparsity=50"], "for 50 % write 0.5"),
        (["method=wanda,sparsity=0.5,nsample=8"], "did you mean `nsamples`?"),
        (["pretrained=m,method=wanda,sparsty=0.5"], "did you mean `sparsity`?"),
        (["method=wanda,dtype=float16,sparsity=0.5"], "unknown argument `dtype`"),
        (["wanda"], "KEY=VALUE,... or a .yaml file"),
        (["missing.yaml"], "no file 'missing.yaml'"),
        (["method=wanda,method=gptq"], "choose one"),
        (["method=wanda,sparsity=0.5,calib_batch_size=0"], "a whole number >= 1"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as end:
        cli.main(["show", *given])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_user_errors_have_no_traceback_in_a_process():
    done = lm_calib("show", "method=wnada")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


def test_main_raises_other_errors_as_they_are(monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(cli, "recipe_arguments", fail)
    with pytest.raises(RuntimeError, match="ours"):
        cli.main(["show", "method=wanda"])
    assert issubclass(UserError, ValueError)
