"""Kernels become machine code for CUDA devices, none of which is needed for that."""

from __future__ import annotations

from typing import Any

import pytest

TILES = {"SIZE": 128, "TILE": 32}
RUNS: list[tuple[str, dict[str, Any]]] = [
    ("_remove", {}),
    ("_remove_n_of_m", {"COUNT": 2, "GROUP": 4, "HOLD": 4}),
    ("_round_integers", {"MASKED": True}),
]
TYPES = {"keep": "*i8", "dead": "*i8", "groups": "*i32", "lowest": "fp32", "highest": "fp32"}


@pytest.mark.parametrize(("name", "constants"), RUNS, ids=str)
def test_kernel_compiles_for_a_device(name: str, constants: dict[str, Any]) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lm_calib_plugin.kernels import compiled

    kernel = getattr(compiled, name)
    constants = {**TILES, **constants}
    types = {**TYPES, **dict.fromkeys(("height", "stride", "width"), "i32")}
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "*fp32")
        for argument in kernel.arg_names
    }
    places = {(kernel.arg_names.index(each),): value for each, value in constants.items()}
    source = ASTSource(kernel, signature, places)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    # The tile of errors stays in registers.
    assert "st.local" not in made.asm["ptx"]
    assert len(made.asm["cubin"]) > 0
