"""Whole models: what plain transformers loads and computes is what was evaluated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lm_calib_plugin.export.quantized import QuantizedLayer, flattened_inputs, module_refusal
from lm_calib_plugin.quantization.grids import GridSpec
from tests.export.packing import (
    IDS,
    WIDE,
    Folder,
    configure,
    exported,
    gap,
    loaded,
    logits,
    plain_model,
    written,
)
from tests.tiny import make_model

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
WEIGHTS: dict[str, dict[str, Any]] = {
    "W4A16": {"scheme": "W4A16", "group_size": 8},
    "W3A16": {"scheme": "W3A16", "group_size": 16},
    "W7": {"bits": 7, "group_size": -1},
    "W8A16": {"scheme": "W8A16"},
}
INPUTS: dict[str, dict[str, Any]] = {
    "W8A8": {"scheme": "W8A8"},
    "W8A8_static": {"scheme": "W8A8_static"},
    "W4A8": {"scheme": "W4A8", "group_size": 16},
    "W4A4": {"scheme": "W4A4"},
    "FP8": {"scheme": "FP8"},
    "FP8_static": {"scheme": "FP8_static"},
    "FP8 groups": {"scheme": "FP8", "group_size": 16},
    "A8": {"bits": 16, "act_bits": 8},
    "A8 static": {"bits": 16, "act_bits": 8, "act_dynamic": False},
}
# Relative differences of logits where the loader rounds inputs in the dtype of the model.
ROUNDING = {"W4A4": 0.25}


@pytest.mark.parametrize("name", [*WEIGHTS, *INPUTS])
def test_float32_models_come_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    folder = exported(tmp_path, changes=WIDE, **(WEIGHTS | INPUTS)[name])
    assert gap(folder, loaded(folder.path)) == 0


@pytest.mark.parametrize(("name", "dtype"), [*((name, BF16) for name in WEIGHTS), ("W8A16", F16)])
def test_weights_of_short_dtypes_come_back_bit_by_bit(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = exported(tmp_path, dtype=dtype, changes=WIDE, **WEIGHTS[name])
    assert gap(folder, loaded(folder.path)) == 0


def test_mxfp4_models_come_back_bit_by_bit(tmp_path: Path) -> None:
    folder = exported(tmp_path, dtype=BF16, changes=WIDE, scheme="MXFP4")
    assert gap(folder, loaded(folder.path)) == 0


@pytest.mark.parametrize(("name", "dtype"), [*((name, BF16) for name in INPUTS), ("W8A8", F16)])
def test_inputs_of_short_dtypes_differ_by_a_rounding(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = exported(tmp_path, dtype=dtype, changes=WIDE, **INPUTS[name])
    assert gap(folder, loaded(folder.path)) < ROUNDING.get(name, 0.06)


ARCHITECTURES = [
    (name, kind)
    for name in ("llama_tied", "qwen2", "gemma2", "phi3", "gpt_neox", "bloom", "opt", "falcon")
    for kind in ("W4A16", "W8A8")
    if (name, kind) not in {("opt", "W8A8"), ("falcon", "W4A16")}
] + [("opt", "W8A8_static")]


@pytest.mark.parametrize(("name", "kind"), ARCHITECTURES)
def test_architectures_come_back_bit_by_bit(name: str, kind: str, tmp_path: Path) -> None:
    folder = exported(tmp_path, name, **(WEIGHTS | INPUTS)[kind])
    assert gap(folder, loaded(folder.path)) == 0


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_dense_experts_stay_beside_quantized_attention(name: str, tmp_path: Path) -> None:
    recipe = {**WEIGHTS["W4A16"], "ignore": ["*experts*"]}
    folder = exported(tmp_path, name, save={"save_original_format": False}, **recipe)
    assert gap(folder, loaded(folder.path)) == 0


def test_layers_of_several_kinds_and_an_untied_head(tmp_path: Path) -> None:
    folder = exported(
        tmp_path,
        "llama_tied",
        bits=4,
        group_size=8,
        overrides={"*down_proj": {"bits": 8, "group_size": -1}, "model.layers.1.*": {"bits": 3}},
        targets=["*proj", "lm_head"],
        untie=True,
    )
    assert len(folder.settings["config_groups"]) == 3
    assert gap(folder, loaded(folder.path)) == 0
    assert "lm_head.weight_packed" in load_file(folder.path / "model.safetensors")


def test_formats_can_be_mixed(tmp_path: Path) -> None:
    model, layers = plain_model(tmp_path / "base", "llama"), []
    for name, spec in (
        ("model.layers.0.mlp.up_proj", GridSpec("int", 4, 8)),
        ("model.layers.1.mlp.up_proj", GridSpec("fp8", 8, -1)),
    ):
        weight = model.get_submodule(name).weight
        grid = spec.fit(weight.data)
        weight.data = grid.round(weight.data) + 0
        layers.append(QuantizedLayer(name, weight.detach(), grid, None))
    folder = written(tmp_path / "out", model, layers)
    assert folder.settings["format"] == "mixed-precision"
    assert gap(folder, loaded(folder.path)) == 0


PLAIN = """
import sys
# A hook of the installed package may have run at startup.
known = [name for name in sys.modules if name.split(".")[0] == "lm_calib_plugin"]
sys.modules |= dict.fromkeys([*known, "lm_calib_plugin"])
import torch
from transformers import AutoModelForCausalLM
folder, expected = sys.argv[1:]
expected = torch.load(expected)
model = AutoModelForCausalLM.from_pretrained(folder).eval()
with torch.no_grad():
    assert torch.equal(model(expected["ids"], use_cache=False).logits, expected["logits"])
state = model.state_dict()
assert all(torch.equal(state[name], tensor) for name, tensor in expected["state"].items())
"""


def test_a_process_without_this_package_computes_the_same(tmp_path: Path) -> None:
    folder = exported(tmp_path, "qwen2", **INPUTS["W8A8"])
    expected = {"ids": IDS, "logits": logits(folder.model), "state": folder.model.state_dict()}
    torch.save(expected, tmp_path / "expected.pt")
    command = [sys.executable, "-c", PLAIN, str(folder.path), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


# --- what is refused does fail: when one of these passes, a refusal can go ----------------------


def test_inputs_without_sequences_share_a_scale(tmp_path: Path) -> None:
    folder = exported(tmp_path, "opt", **INPUTS["W8A8"])
    assert flattened_inputs(folder.model, [layer.name for layer in folder.layers])
    assert gap(folder, loaded(folder.path)) > 1e-4


def test_packed_layers_of_other_classes_do_not_load(tmp_path: Path) -> None:
    folder = exported(tmp_path, "falcon", **WEIGHTS["W4A16"])
    assert module_refusal(make_model("falcon").get_submodule(folder.layers[0].name))
    with pytest.raises(AttributeError, match="'FalconLinear' object has no attribute 'weight'"):
        loaded(folder.path)


def test_dense_experts_under_their_published_names_do_not_load(tmp_path: Path) -> None:
    folder = exported(tmp_path, "mixtral", **WEIGHTS["W4A16"], ignore=["*experts*"])
    with pytest.raises((RuntimeError, AssertionError)):
        loaded(folder.path)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_mxfp4_models_of_other_dtypes_do_not_run(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = exported(tmp_path, dtype=dtype, changes=WIDE, scheme="MXFP4")
    with pytest.raises(RuntimeError, match="same dtype"):
        logits(loaded(folder.path))


def test_zero_points_do_not_load(tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    folder: Folder = exported(tmp_path, bits=4, group_size=8)
    scheme = folder.settings["config_groups"]["group_0"]
    scheme["weights"]["symmetric"] = False
    configure(folder.path, folder.settings)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    state = load_file(folder.path / "model.safetensors")
    for layer in folder.layers:
        grid: Any = GridSpec("int", 4, 8, False).fit(layer.weight)
        # The format counts levels from -8.
        given = {"weight_zero_point": (grid.zero - 8).to(torch.int8), "weight_scale": grid.scale}
        given["weight"] = grid.round(layer.weight)
        made = compressor.compress(given, QuantizationScheme.model_validate(scheme))
        state |= {f"{layer.name}.{name}": tensor for name, tensor in made.items()}
    save_file(state, folder.path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="mismatch"):
        loaded(folder.path)
