"""Small exported folders, made without a model: what their readers have to judge."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lm_calib_plugin.export.options import CALIBRATION, FILES, RECIPE, REPORT
from lm_calib_plugin.export.records import INDEX, calibration_record, write_files_record
from lm_calib_plugin.storage import record_text

FACTS = {"key": "k" * 64, "base_model": "org/base", "format": "dense", "check": None}


def tensors(seed: int = 0, zeros: float = 0.5) -> dict[str, torch.Tensor]:
    """Tensors of every kind that a model may have, matrices with zeros among them."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        made = torch.randn(shape, generator=generator)
        made[torch.rand(shape, generator=generator) < zeros] = 0
        return made

    odd = random(5, 7)
    odd[0, :3] = torch.tensor([-0.0, float("nan"), float("inf")])
    return {
        "half": random(33, 65).half(),
        "brain": random(3, 9, 4).bfloat16(),
        "odd": odd,
        "double": random(2, 3).double(),
        "nothing": torch.zeros(4, 8),
        "full": torch.ones(4, 8),
        "empty": torch.zeros(0, 8),
        "norm": torch.zeros(6),
        "scalar": torch.tensor(3.0),
        "whole": torch.zeros(8, 8, dtype=torch.int64),
    }


def make_folder(folder: Path, *, shards: int = 1, zeros: float = 0.5, **config: Any) -> Path:
    """A folder with every file that an export has."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (folder / RECIPE).write_text("method: wanda\nsparsity: 0.5\n")
    report = {"recipe": {"method": "wanda"}, "achieved": {"sparsity": 0.5}, "layers": 2}
    (folder / REPORT).write_text(json.dumps(report))
    (folder / CALIBRATION).write_text(json.dumps(calibration_record(drawn())))
    (folder / "README.md").write_text("# a card\n")
    (folder / "calibration").mkdir()
    (folder / "calibration" / "preview.txt").write_text("[0] text\n")
    if shards == 1:
        save_file(tensors(zeros=zeros), folder / "model.safetensors", {"format": "pt"})
    else:
        places = {}
        for number in range(1, shards + 1):
            name = f"model-{number:05d}-of-{shards:05d}.safetensors"
            own = {f"{number}.{k}": v for k, v in tensors(number, zeros).items()}
            save_file(own, folder / name, {"format": "pt"})
            places |= dict.fromkeys(own, name)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    write_files_record(folder, FACTS)
    return folder


def drawn() -> Any:
    from lm_calib_plugin.calibration import CalibrationSet

    sources = [{"source": "file:/home/someone/my texts/a.jsonl?column=text", "rows": [0, 1]}]
    return CalibrationSet.of([[3, 4, 5], [6, 7]], seqlen=3, tokenizer="t", sources=sources)


def forge(folder: Path, name: str = FILES, **changes: Any) -> None:
    """Rewrite a list with a digest that fits again, as whoever means harm would."""
    file = folder / name
    content = json.loads(file.read_text())
    content.pop("digest")
    file.write_text(record_text(content | changes))


def relist(folder: Path, name: str = FILES) -> None:
    """Forge the list so that it names all files that are there, as they are."""
    rows = [
        {
            "name": path.relative_to(folder).as_posix(),
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != name
    ]
    forge(folder, name, files=rows)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
