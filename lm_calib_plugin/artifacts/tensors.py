"""Tensors into a safetensors file, of which one at a time comes into the memory of the host."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# As the format writes dtypes.
KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_file(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors, which may lie on any device, to a new file.

    The library of the format takes all of them in the memory of the host; here, only one is there.

    Raises
    ------
    ValueError
        For a dtype that the format has no name for.
    OSError
        When the file can not be written.
    """
    # Wide elements first: every tensor begins at a multiple of its own width.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    rows: dict[str, Any] = {}
    begin = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in KINDS:
            raise ValueError(f"{name} is of the dtype {tensor.dtype}")
        end = begin + tensor.numel() * tensor.element_size()
        rows[name] = {
            "dtype": KINDS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    header = json.dumps(rows, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name in order:
            content = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(content.view(torch.uint8).numpy().data)
