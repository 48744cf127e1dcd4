"""``lm_eval --model hf`` on an exported folder scores what compress-on-load scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

import lm_calib_plugin  # noqa: F401 - makes our models known
from tests.tiny import saved_model

TASKS = ["calib_demo_grammar", "calib_demo_generate", "calib_demo_prose"]
RECIPES = {
    "pruned": ("calib_pruned", {"method": "sparsegpt", "sparsity": 0.5}, False),
    "blocks": ("calib_pruned", {"method": "shortgpt", "blocks": 1}, True),
    "levels": ("calib_quantized", {"method": "gptq", "bits": 3, "group_size": 16}, True),
    "inputs": ("calib_quantized", {"method": "rtn", "scheme": "W8A8"}, False),
    "ranges": ("calib_quantized", {"method": "smoothquant", "scheme": "W8A8_static"}, False),
    "kernels": (
        "calib_quantized",
        {"method": "rtn", "scheme": "W8A8", "execution": "packed"},
        False,
    ),
}


def evaluated(model: str, arguments: dict[str, Any]) -> dict[str, Any]:
    folder = Path(__file__).parents[2] / "tasks"
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=TASKS,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        limit=3,
        device="cpu",
        bootstrap_iters=0,
    )
    assert found is not None
    return dict(found)


def answers(found: dict[str, Any]) -> dict[str, Any]:
    samples = found["samples"]
    return {task: [row["filtered_resps"] for row in rows] for task, rows in samples.items()}


@pytest.mark.parametrize("name", RECIPES)
def test_the_folder_scores_what_was_scored_on_load(name: str, tmp_path: Path) -> None:
    model, recipe, tied = RECIPES[name]
    base = saved_model(
        tmp_path / "base", "llama_tied" if tied else "llama", max_position_embeddings=512
    )
    data = {"calibration": "random", "nsamples": 10, "seqlen": 16, "progress": False}
    out = tmp_path / "out"
    ours = evaluated(model, {"pretrained": base, **data, **recipe, "export_dir": str(out)})
    told = ours["config"]["compression"]["exported"]
    assert told["folder"] == str(out)
    assert told["check"]["exact"] or name == "kernels"
    theirs = evaluated("hf", {"pretrained": str(out)})
    if name != "kernels":
        # Kernels may move a last digit; what they stand for is what is stored.
        assert answers(ours) == answers(theirs)
        assert ours["results"] == theirs["results"]
    again = evaluated(model, {"pretrained": base, **data, **recipe, "export_dir": str(out)})
    assert again["config"]["compression"]["exported"]["was_there"]


def test_an_export_that_fails_late_does_not_cost_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lm_calib_plugin.errors import CalibError
    from lm_calib_plugin.harness import keeping

    def fail(*_: Any) -> None:
        raise CalibError("the disk is full")

    monkeypatch.setattr(keeping, "export_model", fail)
    base = saved_model(tmp_path / "base", max_position_embeddings=512)
    given = {"pretrained": base, "method": "magnitude", "sparsity": 0.5}
    found = evaluated("calib_pruned", {**given, "export_dir": str(tmp_path / "out")})
    told = found["config"]["compression"]
    assert told["exported"]["error"] == "the disk is full"
    assert "not exported" in told["warnings"][-1]
    assert "lm-calib: error: not exported" in capsys.readouterr().err
    assert "calib_demo_grammar" in found["results"]


def test_another_base_model_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    out, given = tmp_path / "out", {"method": "magnitude", "sparsity": 0.5}
    for name in ("one", "two"):
        saved_model(tmp_path / name, max_position_embeddings=512)
    first = {"pretrained": str(tmp_path / "one"), **given, "export_dir": str(out)}
    evaluated("calib_pruned", first)
    (tmp_path / "two" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="export_dir: .* exists"):
        evaluated("calib_pruned", {**first, "pretrained": str(tmp_path / "two")})
