"""What the README shows is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lm_calib_plugin import registry
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.runtime import RUNTIME_ARGUMENTS
from lm_calib_plugin.schemes import SCHEMES
from tests.tiny import saved_model

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def fences(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_examples_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved_model(tmp_path / "model", max_position_embeddings=512)
    blocks = fences("python")
    assert blocks
    for block in blocks:
        code = block.replace("builtin:smollm2-135m", model).replace(
            'tasks=["calib_demo_grammar"]',
            'tasks=["calib_demo_grammar"], task_manager=manager, device="cpu", bootstrap_iters=0',
        )
        manager = _manager()
        exec(compile(code, "README.md", "exec"), {"manager": manager})
    assert "'sparsity': 0.29" in capsys.readouterr().out


def _manager() -> object:
    from lm_eval.tasks import TaskManager

    folder = Path(__file__).parents[2] / "tasks"
    return TaskManager(include_path=str(folder), include_defaults=False)


def test_the_argument_table_names_every_option_and_no_other() -> None:
    table = README.split("### Arguments")[1].split("### Calibration")[0]
    named = set(re.findall(r"`([a-z0-9_]+)`", table.split("`lm-calib ls options`")[0]))
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    first = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row)}
    known = {*Recipe.model_fields, *RUNTIME_ARGUMENTS, "recipe"}
    assert first <= known
    assert known - {"schema_version", "block_path", "untie"} <= first
    assert set(registry.table("pruning")) | set(registry.table("quantization")) <= named


def test_every_recipe_shown_is_one() -> None:
    found = re.findall(r"pretrained=MODEL,[^\s\"']+", README)
    assert len(found) >= 5
    for text in found:
        given = dict(pair.split("=", 1) for pair in text.split(",")[1:])
        Recipe.from_model_args(given).make_method()


def test_schemes_are_named() -> None:
    row = next(line for line in README.splitlines() if line.startswith("| `scheme`"))
    assert re.findall(r"`([A-Z]\w+)`", row) == list(SCHEMES)


def test_sources_are_named() -> None:
    for name in registry.table("calibration"):
        assert f"`{name}" in README


def test_the_error_shown_is_the_error_given() -> None:
    shown = next(block for block in fences("text") if block.startswith("error:"))
    with pytest.raises(UserError) as caught:
        Recipe(nsample=8)
    assert shown.strip() == f"error: {caught.value}"
