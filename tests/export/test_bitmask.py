"""Archives: what comes out is what went in, bit by bit."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lm_calib_plugin.errors import CalibError, UserError
from lm_calib_plugin.export import mask_file
from lm_calib_plugin.export.bitmask import ARCHIVE, pack_folder, unpack_folder
from lm_calib_plugin.export.headers import parse_header, read_header
from lm_calib_plugin.export.options import FILES
from lm_calib_plugin.export.records import verify_folder
from tests.export.folders import contents, make_folder, relist, tensors


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_comes_back_byte_for_byte(tmp_path: Path, shards: int):
    folder = make_folder(tmp_path / "m", shards=shards)
    before = contents(folder)
    sizes = pack_folder(folder, tmp_path / "p")
    record = unpack_folder(tmp_path / "p", tmp_path / "o")
    assert contents(folder) == before
    assert contents(tmp_path / "o") == before
    assert record.folder == tmp_path / "o"
    assert record.files == verify_folder(folder).files
    assert sizes.folder == record.bytes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "o", "p"]


def test_the_mask_is_what_it_is_said_to_be(tmp_path: Path):
    """Read by safetensors and numpy alone."""
    folder = make_folder(tmp_path / "m")
    pack_folder(folder, tmp_path / "p")
    packed = load_file(tmp_path / "p" / "model.bitmask.safetensors")
    dense = load_file(folder / "model.safetensors")
    stored = list(read_header(folder / "model.safetensors").tensors)
    masked = set()
    for place, name in enumerate(stored):
        if str(place) in packed:
            got, want = packed[str(place)], dense[name]
            assert got.dtype == want.dtype
            assert torch.equal(got.nan_to_num(), want.nan_to_num())
            continue
        masked.add(name)
        flat = dense[name].flatten()
        bits = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
        expected = [0] * -(-len(flat) // 8)
        for i, value in enumerate(bits.tolist()):
            expected[i // 8] |= int(value != 0) << (i % 8)
        assert packed[f"{place}.mask"].tolist() == expected
        values = packed[f"{place}.values"]
        assert torch.equal(values.view(bits.dtype), bits[bits != 0])
    assert masked == {"half", "brain", "odd", "nothing", "double"}


def test_the_size_is_what_is_promised(tmp_path: Path):
    """Half of half precision: 9/16; a matrix with fewer than one zero in 16 stays as it is."""
    for share, ratio in ((0.5, 9 / 16), (1 / 16, 1.0), (1 / 32, 1.0), (0.75, 5 / 16)):
        weight = torch.ones(1024, 256, dtype=torch.float16)
        weight.view(-1)[: round(weight.numel() * share)] = 0
        file = tmp_path / "w.safetensors"
        save_file({"w": weight}, file)
        plan = mask_file.plan(file, read_header(file))
        got = sum(row.bytes for row in plan.packed.tensors.values())
        assert got == ratio * weight.nbytes


@given(
    st.integers(0, 70),
    st.floats(0, 1),
    st.sampled_from(["F16", "BF16", "F32", "F64"]),
    st.integers(0, 2**32 - 1),
)
def test_every_bit_pattern_comes_back(
    tmp_path_factory: pytest.TempPathFactory, rows: int, share: float, dtype: str, seed: int
):
    width = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}[dtype]
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, rows * 3 * width, dtype=np.uint8).reshape(-1, width)
    data[random.random(len(data)) < share] = 0
    header = {"w": {"dtype": dtype, "shape": [rows, 3], "data_offsets": [0, data.size]}}
    raw = json.dumps(header).encode()
    folder = tmp_path_factory.mktemp("bits")
    file, packed = folder / "w.safetensors", folder / "p.safetensors"
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data.tobytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_file, "PIECE", 16)
        mask_file.write(file, mask_file.plan(file, read_header(file)), packed)
        with (folder / "o").open("wb") as stream:
            mask_file.unpack(packed, mask_file.read_plan(packed), stream)
    assert (folder / "o").read_bytes() == file.read_bytes()


def test_what_saves_nothing_is_not_packed(tmp_path: Path):
    folder = make_folder(tmp_path / "m", zeros=0.0)
    full = {"w": torch.ones(64, 64), "b": torch.zeros(64)}
    save_file(full, folder / "model.safetensors")
    relist(folder)
    with pytest.raises(UserError, match="no matrix with enough zeros"):
        pack_folder(folder, tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_quantized_folders_are_packed_already(tmp_path: Path):
    folder = make_folder(tmp_path / "m", quantization_config={"quant_method": "x"})
    with pytest.raises(UserError, match="quantized weights, which are packed already"):
        pack_folder(folder, tmp_path / "p")


def test_a_damaged_folder_is_not_packed(tmp_path: Path):
    folder = make_folder(tmp_path / "m")
    (folder / "config.json").write_text("{}\n")
    with pytest.raises(CalibError, match=r"config.json: damaged"):
        pack_folder(folder, tmp_path / "p")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_nothing_is_replaced(tmp_path: Path):
    folder = make_folder(tmp_path / "m")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="archive: .* exists"):
        pack_folder(folder, tmp_path / "there")
    with pytest.raises(UserError, match="archive: .* is inside"):
        pack_folder(folder, folder / "p")
    pack_folder(folder, tmp_path / "p")
    with pytest.raises(UserError, match="out: .* exists"):
        unpack_folder(tmp_path / "p", tmp_path / "there")


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = make_folder(tmp_path / "m")
    pack_folder(folder, tmp_path / "p")

    def stop(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(mask_file, "unpack", stop)
    with pytest.raises(OSError, match="disk full"):
        unpack_folder(tmp_path / "p", tmp_path / "o")
    with pytest.raises(OSError, match="disk full"):
        pack_folder(folder, tmp_path / "q")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "p"]


def test_an_archive_is_no_exported_folder_and_the_other_way_round(tmp_path: Path):
    folder = make_folder(tmp_path / "m")
    with pytest.raises(UserError, match=f"holds no {ARCHIVE.file}"):
        unpack_folder(folder, tmp_path / "o")
    pack_folder(folder, tmp_path / "p")
    with pytest.raises(CalibError, match=r"model.safetensors: damaged: expected a file"):
        verify_folder(tmp_path / "p")


def test_a_header_is_read_as_safetensors_reads_it(tmp_path: Path):
    file = tmp_path / "w.safetensors"
    save_file(tensors(), file, {"format": "pt"})
    header = read_header(file)
    loaded = load_file(file)
    assert header.metadata == {"format": "pt"}
    assert header.file_bytes == file.stat().st_size
    assert {n: r.shape for n, r in header.tensors.items()} == {
        n: tuple(t.shape) for n, t in loaded.items()
    }
    data = file.read_bytes()[header.start :]
    for name, row in header.tensors.items():
        view = loaded[name].contiguous().flatten().view(torch.uint8)
        assert data[row.begin : row.end] == view.numpy().tobytes()


W = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected tensors by name"),
        ({"w": 5}, "expected dtype, shape and data_offsets"),
        ({"w": {**W, "more": 1}}, "expected dtype, shape and data_offsets"),
        ({"w": {**W, "shape": [3]}}, "do not fit shape"),
        ({"w": {**W, "shape": [-2]}}, "plain numbers"),
        ({"w": {**W, "shape": [True, 2]}}, "plain numbers"),
        ({"w": {**W, "shape": [2**70]}}, "plain numbers"),
        ({"w": {**W, "data_offsets": [8, 0]}}, "do not fit shape"),
        ({"w": {**W, "data_offsets": [4, 12]}}, "overlap, or leave a gap"),
        ({"w": W, "v": W}, "overlap, or leave a gap"),
        ({"w": W, "__metadata__": {"a": 1}}, "texts as metadata"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(content: Any, message: str):
    with pytest.raises(ValueError, match=message):
        parse_header(json.dumps(content).encode())


@pytest.mark.parametrize("raw", [b'{"w": {}, "w": {}}', b"[" * 100_000, b"\xff", b"", b"nothing"])
def test_what_is_no_json_is_no_header(raw: bytes):
    with pytest.raises(ValueError):
        parse_header(raw)


def test_an_archive_holds_nothing_but_what_its_folder_held(tmp_path: Path):
    pack_folder(make_folder(tmp_path / "m", shards=2), tmp_path / "p")
    before = {name for name in contents(tmp_path / "m") if not name.endswith(".safetensors")}
    shards = {f"model-0000{n}-of-00002.bitmask.safetensors" for n in (1, 2)}
    assert set(contents(tmp_path / "p")) == before | shards | {ARCHIVE.file}
    assert (tmp_path / "p" / FILES).read_bytes() == (tmp_path / "m" / FILES).read_bytes()
