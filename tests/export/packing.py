"""Folders of quantized models written with few means, and what the loader makes of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lm_calib_plugin import CalibrationSet, Recipe, Runtime, compress
from lm_calib_plugin.engine.activations import quantizers
from lm_calib_plugin.export.quantized import QuantizedLayer, layer_tensors, quantization_config
from tests.tiny import make_model, random_ids

IDS = torch.stack(random_ids([20, 20], 5))
# Wide enough for groups of 32.
WIDE = {"hidden_size": 64, "intermediate_size": 96}


def calibration() -> CalibrationSet:
    return CalibrationSet.of(random_ids([16] * 4), seqlen=16)


@dataclass
class Folder:
    """A compressed model in memory, and the folder it was written to."""

    path: Path
    model: Any
    layers: list[QuantizedLayer]
    settings: dict[str, Any]


def plain_model(path: Path, name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model as transformers loads it: a cast would change rotary embeddings, too."""
    make_model(name, **changes).save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def written(path: Path, model: Any, layers: list[QuantizedLayer], **options: Any) -> Folder:
    """Write a model, some of whose weights are replaced."""
    known = {layer.name for layer in layers}
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    state = dict(model.state_dict())
    for layer in layers:
        del state[f"{layer.name}.weight"]
        state |= {f"{layer.name}.{n}": t for n, t in layer_tensors(layer).items()}
    settings = quantization_config(layers, [n for n in linears if n not in known])
    model.save_pretrained(path, state_dict=state, **options)
    configure(path, settings)
    return Folder(path, model, layers, settings)


def configure(path: Path, settings: dict[str, Any]) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


def exported(
    tmp_path: Path,
    name: str = "llama",
    dtype: torch.dtype = torch.float32,
    changes: dict[str, Any] | None = None,
    save: dict[str, Any] | None = None,
    **recipe: Any,
) -> Folder:
    """Compress a tiny model by a recipe and write it."""
    model = plain_model(tmp_path / "base", name, dtype, **(changes or {}))
    runtime = Runtime(report_dir=str(tmp_path / "reports"), progress=False)
    report = compress(model, None, Recipe(method="rtn", **recipe), runtime, calibration())
    inputs = quantizers(model)
    layers = [
        QuantizedLayer(
            row.name,
            model.get_submodule(row.name).weight.detach(),
            report.grids.get(row.name),
            inputs.get(row.name),
        )
        for row in report.layers
        if row.name in report.grids or row.name in inputs
    ]
    return written(tmp_path / "out", model, layers, **(save or {}))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS, use_cache=False).logits
    return found


def loaded(path: Path, **options: Any) -> Any:
    """Load with plain transformers; nothing may be missing or left over."""
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not {kind: keys for kind, keys in info.items() if keys}
    return model.eval()


def gap(folder: Folder, again: Any) -> float:
    """Relative difference of the logits, after a look at every tensor."""
    found, wanted = logits(again), logits(folder.model)
    theirs = again.state_dict()
    for name, tensor in folder.model.state_dict().items():
        assert theirs[name].dtype == tensor.dtype, name
        assert torch.equal(theirs[name], tensor), name
    if torch.equal(found, wanted):
        return 0.0
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())
