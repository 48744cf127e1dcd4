"""Sweeps of both paths against a loop in float64; kernels run in the interpreter of triton."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from lm_calib_plugin import kernels
from tests.kernels.checks import cases, loop, near, problem


@pytest.mark.parametrize("name", cases())
def test_torch_path_is_the_loop(name: str) -> None:
    cases()[name]("cpu", False)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    """What the kernels were found to do, in a process of their own."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.checks"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", cases())
def test_kernel_is_the_loop(name: str, interpreted: dict[str, str | None]) -> None:
    assert interpreted[name] is None


def test_any_rounding_in_the_torch_path() -> None:
    block, upper = problem(70, 6, seed=5)
    wanted = loop(block, upper, lambda i, now: now[i].mul(4).floor().div(4))
    errors = kernels.round_with(block, upper, lambda i, column: column.mul(4).floor().div(4))
    near(block, wanted[0])
    near(errors, wanted[1])


def test_no_kernel_on_a_cpu() -> None:
    assert not kernels.compiled_on(torch.zeros(2))
