"""What this room may import, read from the source text."""

from __future__ import annotations

import ast
from pathlib import Path

import lm_calib_plugin.calibration as room

FILES = sorted(Path(room.__file__).parent.rglob("*.py"))
NEVER = {"pickle", "dill", "marshal", "shelve"}


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def test_imports_stay_in_bounds():
    assert len(FILES) > 15
    for file in FILES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        inside = {name.split(".")[0] for name in imported(tree)}
        top = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
        at_top = {name.split(".")[0] for name in imported(top)}
        assert not inside & NEVER, file.name
        assert not at_top & {"datasets", "lm_eval", "pyarrow", "huggingface_hub"}, file.name
        assert "lm_eval" not in inside or file.name == "tasks.py", file.name


def test_no_code_from_data_and_no_global_random_state():
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load", "torch.manual_seed"), file.name
                assert not called.startswith(("random.shuffle", "random.random", "random.seed"))
