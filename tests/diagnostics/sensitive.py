"""What the tests of sensitivity share: a text, a judge, recipes, and models compared bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lm_calib_plugin.calibration import CalibrationSet
from lm_calib_plugin.diagnostics.sensitivity import Judge
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.runtime import Runtime
from tests.tiny import make_model, random_ids

QUIET = Runtime(progress=False)
RTN = Recipe(method="rtn", bits=3, group_size=8)


def judge(sequences: int = 6) -> Judge:
    return Judge(random_ids([24, 9, 17, 24, 12, 30][:sequences]))


def text_file(folder: Path) -> str:
    """Return the expression of a file with enough documents for every fold."""
    file = folder / "text.jsonl"
    texts = (" ".join(f"w{(i * k) % 39}" for k in range(24)) for i in range(200))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return f"file:{file}"


def calibration() -> CalibrationSet:
    return CalibrationSet.of(random_ids([16] * 6, seed=5), seqlen=16)


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one: Any, other: Any) -> None:
    """Two models, or states of models, are equal bit by bit."""
    first = one if isinstance(one, dict) else one.state_dict()
    second = other if isinstance(other, dict) else other.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def trained(name: str = "llama") -> tuple[Any, list[torch.Tensor]]:
    """Return a model that has learned to count, and what it learned: there is something to lose."""
    model = make_model(name)
    ids = [torch.arange(3, 35) + 4 * shift for shift in range(12)]
    batch = torch.stack(ids) % 97
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    with torch.enable_grad():
        for _ in range(60):
            optimizer.zero_grad()
            model(batch, labels=batch).loss.backward()
            optimizer.step()
    return model, list(batch)
