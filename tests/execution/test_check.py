"""Schemes and devices before any work: what is given, what runs packed, what to type."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.execution import Activation, Device, available, check_execution
from lm_calib_plugin.execution.fuse import Fused

HOPPER, AMPERE, TURING = (Device("cuda", c) for c in ((9, 0), (8, 0), (7, 5)))
VNNI, OLD = Device("cpu", None, True), Device("cpu", None, False)
BF16 = torch.bfloat16
FP8: dict[str, Any] = {"number": "fp8", "bits": 8, "activation": Activation("fp8")}
W8A8: dict[str, Any] = {"number": "int", "bits": 8, "activation": Activation()}
W4A16: dict[str, Any] = {"number": "int", "bits": 4, "group_size": 128}
TWO_FOUR: dict[str, Any] = {"number": None, "pattern": "2:4"}


@pytest.mark.parametrize(
    ("device", "scheme", "kernel"),
    [
        (HOPPER, FP8, "fp8"),
        (HOPPER, W8A8, "int8"),
        (HOPPER, W4A16, "int4"),
        (HOPPER, TWO_FOUR, "2:4"),
        (AMPERE, W8A8, "int8"),
        (TURING, W8A8, "int8"),
        (VNNI, W8A8, "int8_cpu"),
        (VNNI, W4A16, "int4"),
    ],
)
def test_who_serves_what(device: Device, scheme: dict[str, Any], kernel: str) -> None:
    assert check_execution(**scheme, device=device, dtype=BF16) == [kernel]


@pytest.mark.parametrize(
    ("device", "scheme", "words"),
    [
        (AMPERE, FP8, ("capability 8.0", "8.9 or newer (H100", "scheme=W8A8", "pattern=2:4")),
        (VNNI, FP8, ("8.9 or newer", "scheme=W8A8")),
        (TURING, W4A16, ("capability 7.5", "scheme=W8A8")),
        (OLD, W8A8, ("without AVX-512 VNNI", "scheme=W4A16")),
        (Device("rocm"), W8A8, ("on a rocm", "no scheme runs packed here")),
        (Device("mps"), W8A8, ("no scheme runs packed here",)),
        (HOPPER, {"number": "nvfp4", "bits": 4, "group_size": 16}, ("simulated only",)),
        (HOPPER, {"number": "mxfp4", "bits": 4, "group_size": 32}, ("simulated only",)),
        (HOPPER, {**W4A16, "bits": 3}, ("int3", "4-bit integer weights only")),
        (HOPPER, {**W4A16, "bits": 8}, ("int8", "4-bit integer weights only")),
        (HOPPER, {"number": None, "pattern": "4:8"}, ("pattern=2:4",)),
    ],
)
def test_errors_teach(device: Device, scheme: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        check_execution(**scheme, device=device, dtype=BF16)
    for word in ("execution: got packed", "execution=simulated", *words):
        assert word in str(caught.value)


def test_the_name_that_was_typed_is_shown() -> None:
    with pytest.raises(UserError, match="packed with scheme=FP8 on a CUDA device"):
        check_execution(**FP8, device=AMPERE, dtype=BF16, name="scheme=FP8")


def test_what_runs_here() -> None:
    assert "scheme=FP8" in available(HOPPER, BF16)
    assert "scheme=FP8" not in available(AMPERE, BF16)
    assert "scheme=FP8 with dtype=bfloat16" in available(HOPPER, torch.float32)
    assert available(Device("mps"), BF16) == []
    assert available("cpu", torch.float32)[-1] == "scheme=W4A16 with dtype=bfloat16"


def test_activations_and_devices() -> None:
    assert Activation(bits=8).reach == 127.5
    assert Activation("fp8").reach == 448
    for wrong in ({"dynamic": False}, {"dynamic": True, "scale": 1.0}):
        with pytest.raises(ValueError, match="static activation has a scale"):
            Activation(**wrong)  # type: ignore[arg-type]
    assert Device.of("cpu").kind == "cpu"
    assert Device.of("meta") == Device("meta")


def test_steps_that_cannot_be_fused_run_as_they_are() -> None:
    def plain(x: Any) -> Any:
        return x.value + 1

    fused: Any = Fused(plain)

    def cannot(x: Any) -> Any:
        raise RuntimeError("no compiler\nat all")

    fused.__dict__["compiled"] = cannot
    on_gpu = SimpleNamespace(device=torch.device("cuda"), value=1)
    assert fused(on_gpu) == 2
    assert fused.failure == "RuntimeError: no compiler"
    on_cpu = SimpleNamespace(device=torch.device("cpu"), value=2)
    assert fused(on_cpu) == 3
