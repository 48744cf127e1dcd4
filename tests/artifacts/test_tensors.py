"""Files of tensors are those of the format, and are written without a second copy of all."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lm_calib_plugin.artifacts import keeping
from lm_calib_plugin.artifacts.shelf import entries, verified
from lm_calib_plugin.artifacts.tensors import KINDS, save_file
from tests.artifacts.test_cache import FAMILIES, alike, run


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {str(dtype): (8 * torch.rand(3, 5, generator=generator)).to(dtype) for dtype in KINDS}
    base = torch.arange(24.0).reshape(4, 6)
    tensors |= {"slice": base[1:3, ::2], "turned": base.T, "same": base, "again": base}
    tensors |= {"number": torch.tensor(2.5), "empty": torch.zeros(0, 3), "\u00e9/x": base[0]}
    save_file(tensors, tmp_path / "file")
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.float()), name


def test_nothing_at_all_is_a_file_too(tmp_path: Path) -> None:
    save_file({}, tmp_path / "file")
    assert load_file(tmp_path / "file") == {}


def test_a_dtype_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x is of the dtype torch\.complex64"):
        save_file({"x": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_one_tensor_at_a_time_comes_to_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a GPU: every move makes a copy."""
    given, name = FAMILIES["gptq"]
    copies: list[weakref.ref[Any]] = []
    most = [0]

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        copies.append(weakref.ref(copy.untyped_storage()))
        most[0] = max(most[0], sum(ref() is not None for ref in copies))
        return copy

    original = keeping.check_room

    def begins(*given: Any) -> None:
        # The writing comes next.
        monkeypatch.setattr(torch.Tensor, "cpu", moved)
        original(*given)

    monkeypatch.setattr(keeping, "check_room", begins)
    first = run(tmp_path, given, name)
    monkeypatch.undo()
    assert first[1].cache["artifact"]
    assert len(copies) > 21
    assert most[0] <= 2  # the next one is made before the last one goes
    (entry,) = entries(tmp_path)
    assert verified(entry) == ""
    alike(run(tmp_path, given, name), first)
