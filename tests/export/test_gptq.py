"""Folders in the GPTQ checkpoint format: bit by bit, and loaded where gptqmodel is at hand."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lm_calib_plugin as lm_calib
from lm_calib_plugin.errors import CalibError, UserError
from lm_calib_plugin.export import gptq, gptq_check
from lm_calib_plugin.export.folder import ExportResult, export_model
from lm_calib_plugin.export.formats import check_export, check_model
from lm_calib_plugin.export.options import ExportOptions
from lm_calib_plugin.export.quantized import QuantizedLayer
from lm_calib_plugin.quantization.grids import GridSpec
from tests.tiny import in_dtype, make_model, make_tokenizer

# An interpreter of an environment with gptqmodel and optimum, which this package needs not be in.
PYTHON = "LM_CALIB_GPTQ_PYTHON"
WIDE = {"hidden_size": 64, "intermediate_size": 128}
RTN = {"method": "rtn", "bits": 4, "group_size": 32}


def bits_of(words: Tensor, bits: int, count: int) -> list[int]:
    """Read a stream of values as one large number."""
    number = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [(number >> (bits * i)) & (2**bits - 1) for i in range(count)]


@pytest.mark.parametrize("bits", gptq.BITS)
def test_words_are_a_stream_of_bits_for_each_column(bits: int) -> None:
    values = torch.randint(2**bits, (96, 5), generator=torch.Generator().manual_seed(bits))
    values[:32, 0] = 2**bits - 1
    words = gptq.pack(values, bits)
    assert words.dtype == torch.int32
    assert words.shape == (96 * bits // 32, 5)
    for column in range(5):
        assert bits_of(words[:, column], bits, 96) == values[:, column].tolist()
    assert torch.equal(gptq.unpack(words, bits), values)


def quantized(
    bits: int, symmetric: bool, dtype: torch.dtype, group_size: int = 32
) -> QuantizedLayer:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(64, 96, generator=generator) * 0.05
    weight[3] = weight[3].abs()  # a zero point of 0
    weight[4] = 0
    grid = GridSpec("int", bits, group_size, symmetric).fit(weight, dtype)
    return QuantizedLayer("model.layers.0.fc", grid.round(weight).to(dtype), grid, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", gptq.BITS)
def test_stored_tensors_are_the_weights_by_the_formula_of_the_format(
    bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    layer = quantized(bits, symmetric, dtype)
    tensors = gptq.layer_tensors(layer)
    settings = gptq.quantization_config([layer], [])
    assert settings["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    assert {n: t.dtype for n, t in tensors.items()} == {
        "qweight": torch.int32,
        "qzeros": torch.int32,
        "scales": torch.float16,
        "g_idx": torch.int32,
    }
    groups = tensors["g_idx"].tolist()
    assert groups == [i // 32 for i in range(96)]
    zeros = [bits_of(row, bits, 64) for row in tensors["qzeros"]]
    less = 1 if symmetric else 0
    for out in (0, 3, 4, 63):
        levels = bits_of(tensors["qweight"][:, out], bits, 96)
        found = [
            float(tensors["scales"][g, out]) * (level - zeros[g][out] - less)
            for level, g in zip(levels, groups, strict=True)
        ]
        assert torch.equal(torch.tensor(found).to(dtype), layer.weight[out])
    assert torch.equal(gptq.unpacked(tensors, settings).to(dtype), layer.weight)


def test_what_would_be_rounded_is_not_stored() -> None:
    layer = quantized(4, True, torch.float32)
    with pytest.raises(CalibError, match="a scale is no float16 number"):
        gptq.layer_tensors(layer)
    layer = quantized(4, True, torch.float16)
    layer.weight[0, 0] += 1
    with pytest.raises(CalibError, match="a weight is not on its grid"):
        gptq.layer_tensors(layer)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"method": "wanda", "sparsity": 0.5}, "gptq holds quantized weights"),
        ({"method": "rtn", "scheme": "W8A8"}, "weights alone.*act_bits=16"),
        ({**RTN, "bits": 5}, "2, 3, 4 or 8 bits, not 5.*export_format=dense"),
        ({**RTN, "group_size": 16}, "a group_size of -1, 32, 64.*not 16"),
        ({**RTN, "bits": "auto:4.5"}, "the same levels, and bits=auto:4.5"),
        ({**RTN, "symmetric": False, "group_size": -1}, "without their zero points"),
        ({"method": "hqq", "bits": 4, "group_size": 32}, "zero points between levels"),
        ({"method": "rtn", "scheme": "FP8"}, "gptq: "),
        ({"method": "rtn", "scheme": "NVFP4"}, "gptq: "),
    ],
    ids=str,
)
def test_what_it_can_not_hold_is_said_before_anything_is_loaded(
    recipe: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_export(lm_calib.Recipe(**recipe), "gptq")


HEAD = {**RTN, "targets": "lm_head+mlp.*", "untie": True}


@pytest.mark.parametrize(
    ("architecture", "changes", "recipe", "message"),
    [
        ("llama", WIDE, RTN, "model is float32 .dtype=float16."),
        ("llama", {**WIDE, "intermediate_size": 80}, RTN, "gate_proj.*multiples of 32.* is 80"),
        ("gpt2", {"n_embd": 64, "n_inner": 128}, RTN, "this is Conv1D"),
        ("llama_tied", {**WIDE, "vocab_size": 96}, HEAD, "lm_head: .*blocks only"),
        ("llama", WIDE, {**RTN, "overrides": {"*up_proj": {"bits": 8}}}, "this one has others"),
    ],
    ids=["float32", "width", "conv", "head", "mixed"],
)
def test_layers_that_it_can_not_hold_are_named_before_the_work(
    architecture: str, changes: dict[str, Any], recipe: dict[str, Any], message: str
) -> None:
    model = make_model(architecture, **changes)
    if "float32" not in message:
        in_dtype(model, torch.float16)
    with pytest.raises(UserError, match=message):
        check_model(model, lm_calib.Recipe(**recipe), "gptq")


def test_auto_never_takes_it() -> None:
    assert check_export(lm_calib.Recipe(**RTN), "auto") == "compressed-tensors"
    assert check_export(lm_calib.Recipe(**RTN), "gptq") == "gptq"


def export(folder: Path, architecture: str = "llama", **recipe: Any) -> tuple[Any, ExportResult]:
    model = in_dtype(make_model(architecture, **WIDE), torch.float16)
    made = lm_calib.Recipe(**{**RTN, **recipe})
    report = lm_calib.compress(model, make_tokenizer(), made, lm_calib.Runtime(progress=False))
    options = ExportOptions(format="gptq")
    return model, export_model(model, make_tokenizer(), made, report, folder, options)


def test_layers_left_out_are_told_to_every_reader(tmp_path: Path) -> None:
    _, done = export(tmp_path / "one", ignore="*.1.mlp.down_proj")
    assert done.format == "gptq"
    settings = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    (names,) = settings["modules_in_block_to_quantize"]
    assert len(names) == 20  # of 21: by full names, since blocks differ
    assert "model.layers.1.mlp.down_proj" not in names
    assert settings["dynamic"] == {r"-:^model\.layers\.1\.mlp\.down_proj$": {}}
    export(tmp_path / "all", ignore="*down_proj")
    settings = json.loads((tmp_path / "all" / "config.json").read_text())["quantization_config"]
    assert settings["modules_in_block_to_quantize"][0] == [
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        "mlp.gate_proj",
        "mlp.up_proj",
    ]
    assert settings["dynamic"] == {r"-:^model\.layers\.\d+\.mlp\.down_proj$": {}}
    assert settings["group_size"] == 32
    assert settings["block_name_to_quantize"] == "model.layers"


def test_scales_of_whole_rows_of_several_widths_have_no_group_size() -> None:
    wide = quantized(4, True, torch.float16, group_size=-1)
    narrow = QuantizedLayer(
        "model.layers.0.out",
        wide.weight[:, :64],
        GridSpec(group_size=-1).fit(torch.ones(64, 64)),
        None,
    )
    assert gptq.quantization_config([wide, narrow], [])["group_size"] == -1
    assert gptq.quantization_config([narrow], [])["group_size"] == 64


def test_without_gptqmodel_the_files_are_compared_and_the_card_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq_check, "find_spec", lambda _: None)
    model, done = export(tmp_path / "out", "llama_tied", symmetric=False, bits=3)
    expected = len(model.state_dict()) - 1  # the head is the table of embeddings
    why = "gptqmodel and optimum not installed"
    assert done.check == {"tensors": expected, "loaded": False, "why": why}
    assert f"not loaded back ({why}): {expected} tensors equal on disk" in done.line()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"was not loaded back when it was written ({why})" in card
    assert "With transformers and optimum and gptqmodel alone" in card
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert not any(name.endswith("proj.weight") for name in state)


@pytest.mark.parametrize("name", ["qweight", "qzeros", "scales", "g_idx", "norm.weight", None])
def test_a_damaged_file_never_gets_its_name(
    name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_calib_plugin.export import folder as writer

    def spoil(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        if name is None:
            del state["model.norm.weight"]
        else:
            tensor = state[next(key for key in state if key.endswith(name))]
            tensor.view(-1)[7] += 1
        save_file(state, folder / "model.safetensors")

    monkeypatch.setattr(writer, "for_older_readers", spoil)
    with pytest.raises(CalibError, match="Nothing was kept"):
        export(tmp_path / "out")
    assert not list(tmp_path.iterdir())


class Kernel(nn.Linear):
    """Stands for a layer of gptqmodel."""

    def dequantize_weight(self) -> Tensor:
        return self.weight.t()


def test_weights_of_the_loader_are_counted_where_rounded_and_refused_where_others() -> None:
    weight = torch.full((32, 32), 0.3, dtype=torch.float16)
    again = nn.Sequential(Kernel(32, 32, bias=False).half())
    layers = [QuantizedLayer("0", weight, None, None)]
    again[0].weight.data = weight.clone()
    assert gptq_check._rounded_otherwise(again, layers) == 0
    again[0].weight.data[3, 5:7] = torch.tensor(0.3).half() + 2**-12
    assert gptq_check._rounded_otherwise(again, layers) == 2
    again[0].weight.data[3, 5] += 2**-11
    with pytest.raises(CalibError, match="0 has other weights in Kernel"):
        gptq_check._rounded_otherwise(again, layers)


LOAD = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for folder, known in zip(sys.argv[1::2], sys.argv[2::2]):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not [k for k, v in info.items() if v], info
    known = load_file(known)
    packed = {n: m for n, m in model.named_modules() if hasattr(m, "qweight")}
    assert packed.keys() == {n for n in known if n not in ("ids", "logits")}, packed.keys()
    for name, module in packed.items():
        assert torch.equal(type(module).dequantize_weight(module).t(), known[name]), name
    with torch.no_grad():
        logits = model(known["ids"], use_cache=False).logits.float()
    gap = float((logits - known["logits"]).norm() / known["logits"].norm())
    assert gap < 0.02, (folder, gap)
"""


@pytest.mark.skipif(not os.environ.get(PYTHON), reason=f"{PYTHON} names no Python with gptqmodel")
def test_gptqmodel_loads_the_very_weights(tmp_path: Path) -> None:
    arguments = []
    for name, architecture, recipe in (
        ("symmetric", "llama", {"ignore": "*.1.mlp.down_proj"}),
        ("asymmetric", "llama_tied", {"bits": 3, "symmetric": False}),
        ("biased", "qwen2", {"group_size": -1}),
    ):
        model, _ = export(tmp_path / name, architecture, **recipe)
        names = {n.rpartition(".")[0] for n in load_file(tmp_path / name / "model.safetensors")}
        known = {
            n: m.weight.detach().contiguous()
            for n, m in model.named_modules()
            if n in names and type(m) is nn.Linear and "proj" in n
        }
        if name == "symmetric":
            del known["model.layers.1.mlp.down_proj"]
        ids = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits.float().contiguous()
        file = tmp_path / f"{name}.safetensors"
        save_file({**known, "ids": ids, "logits": logits}, file)
        arguments += [str(tmp_path / name), str(file)]
    command = [os.environ[PYTHON], "-c", LOAD, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
