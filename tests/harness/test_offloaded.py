"""``parallelize=True`` with little memory: weights on the CPU and on a disk, the same results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from accelerate import cpu_offload
from transformers import AutoModelForCausalLM

from lm_calib_plugin.engine import is_offloaded
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.harness import Calib
from tests.harness.test_models import COMMON, evaluate, task  # noqa: F401
from tests.tiny import make_model, make_tokenizer, saved_model

SIZE = sum(p.numel() * p.element_size() for p in make_model().parameters())


def offloaded(folder: str, tmp_path: Path, **more: Any) -> dict[str, Any]:
    """Return arguments that leave two of three blocks on the disk."""
    return {
        "pretrained": folder,
        "parallelize": True,
        "max_cpu_memory": int(0.7 * SIZE),
        "offload_folder": str(tmp_path / "offload"),
        **COMMON,
        **more,
    }


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "wanda", "sparsity": 0.5},
        {"method": "gptq", "bits": 4, "group_size": 16, "act_bits": 8, "calibration": "self"},
    ],
    ids=["wanda", "gptq on text of its own"],
)
def test_evaluation_is_that_of_the_model_in_memory(
    task: Path,  # noqa: F811
    tmp_path: Path,
    recipe: dict[str, Any],
) -> None:
    folder = saved_model(tmp_path / "model")
    plain = evaluate(task, "calib", {"pretrained": folder, **COMMON, **recipe})
    model_args = offloaded(folder, tmp_path, **recipe)
    found = evaluate(task, "calib", model_args)
    ours, theirs = (r["config"]["compression"] for r in (found, plain))
    assert set(ours["residence"]["weights"]) == {"cpu", "disk"}
    assert "residence" not in theirs
    for name in ("key", "weights_digest", "model_digest", "achieved", "error"):
        assert ours[name] == theirs[name]
    assert found["results"] == plain["results"]


def test_a_model_in_memory_may_be_offloaded(task: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = saved_model(tmp_path / "model")
    recipe = {"tokenizer": make_tokenizer(), "method": "wanda", "sparsity": 0.5, **COMMON}
    model = cpu_offload(AutoModelForCausalLM.from_pretrained(folder))
    found = evaluate(task, "calib", {"pretrained": model, **recipe})
    assert is_offloaded(model)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    plain = evaluate(task, "calib", {"pretrained": whole, **recipe})
    assert found["results"] == plain["results"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"cache": True}, "cache: a cache of compressed models needs the whole model"),
        ({"execution": "packed", "method": "rtn", "bits": 8, "sparsity": None}, "execution: "),
        ({"method": "shortgpt", "sparsity": None, "blocks": 1}, "method: `shortgpt` needs"),
        ({"export_dir": "out"}, "export: an export needs the whole model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_needs_the_whole_model_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], said: str
) -> None:
    folder = saved_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lm_calib_plugin.compression._identify", None)
    fields = {"method": "wanda", "sparsity": 0.5} | more
    given = {name: value for name, value in fields.items() if value is not None}
    with pytest.raises(UserError, match=re.escape(said)):
        Calib(device="cpu", **offloaded(folder, tmp_path, **given))
