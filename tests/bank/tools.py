"""What the tests of the bank share: text of several kinds, banks of it, plain formulations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lm_calib_plugin import CalibrationSet, Runtime, engine
from lm_calib_plugin.bank import Part, build_bank
from tests.tiny import make_model

QUIET = Runtime(progress=False)
# Kinds of text: ranges of token ids.
KINDS = {"a": (3, 12), "b": (8, 70), "c": (60, 96)}


def text(kind: str, lengths: Sequence[int], seed: int) -> CalibrationSet:
    generator = torch.Generator().manual_seed(seed)
    low, high = KINDS[kind]
    return CalibrationSet.of(
        [torch.randint(low, high, (n,), generator=generator) for n in lengths], seqlen=24
    )


def opened(folder: Path, parts: list[Part], name: str = "llama", **changes: Any) -> tuple:
    """Return a tiny model, its layers, and a bank of the parts."""
    model = make_model(name, **changes)
    blocks = engine.find_blocks(model)
    layers, _ = engine.select_layers(model, blocks, None, ())
    return model, layers, build_bank(model, layers, blocks, parts, folder / "bank", runtime=QUIET)


def inputs_of(model: nn.Module, sequences: Sequence[Tensor]) -> dict[str, Tensor]:
    """Run sequences one by one through the plain model; float64 ``[tokens, in]`` by layer."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        m.register_forward_pre_hook(
            lambda _m, args, n=n: seen.setdefault(n, []).append(
                args[0].double().reshape(-1, args[0].shape[-1])
            )
        )
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear)
    ]
    with torch.no_grad():
        for sequence in sequences:
            model(input_ids=sequence[None])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def output_error(x: Tensor, before: Tensor, after: Tensor) -> float:
    """Return ``||X (W' - W)^T||^2 / ||X W^T||^2`` in float64."""
    before, after = before.double(), after.double()
    return float((x @ (after - before).t()).square().sum() / (x @ before.t()).square().sum())


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
