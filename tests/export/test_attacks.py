"""Folders and archives that were damaged or made to do harm: each has its clear message."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lm_calib_plugin import cli
from lm_calib_plugin.errors import CalibError, UserError
from lm_calib_plugin.export import file_list
from lm_calib_plugin.export.bitmask import ARCHIVE, pack_folder, unpack_folder
from lm_calib_plugin.export.options import CALIB_CONFIG, FILES, RECIPE, REPORT
from lm_calib_plugin.export.records import INDEX, read_summary, verify_folder
from tests.export.folders import contents, forge, make_folder, relist
from tests.export.test_records import BAD_NAMES

SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "m")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "m", shards=2)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    pack_folder(make_folder(tmp_path / "packed" / "m"), tmp_path / "packed" / "p")
    return tmp_path / "packed" / "p"


def refused(folder: Path, *words: str) -> None:
    """Verification and the command refuse the folder and name what is wrong."""
    with pytest.raises(CalibError) as error:
        verify_folder(folder, progress=False)
    for word in words:
        assert word in str(error.value), str(error.value)


def not_unpacked(archive: Path, *words: str) -> None:
    """Nothing is written for the archive, and what is wrong is named."""
    beside = sorted(path.name for path in archive.parent.iterdir())
    with pytest.raises(CalibError) as error:
        unpack_folder(archive, archive.parent / "o", progress=False)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert sorted(path.name for path in archive.parent.iterdir()) == beside


# --- damage ------------------------------------------------------------------------------------


def test_every_byte_of_every_small_file_counts(folder: Path, archive: Path):
    def unpack(place: Path) -> Any:
        return unpack_folder(place, place.parent / "o")

    for place, check in ((folder, verify_folder), (archive, unpack)):
        for path in [p for p in place.rglob("*") if p.is_file()]:
            if path == folder / "README.md":
                continue  # people write on it
            data = path.read_bytes()
            # Every byte of a file of a few hundred, and 60 of each larger one.
            places = range(len(data))
            for where in places if len(data) < 400 else random.Random(1).sample(places, 60):
                path.write_bytes(data[:where] + bytes([data[where] ^ 0x21]) + data[where + 1 :])
                with pytest.raises(CalibError) as error:
                    check(place)
                assert str(path) in str(error.value)
            path.write_bytes(data)
    assert not (archive.parent / "o").exists()


def test_a_card_may_be_edited(folder: Path, tmp_path: Path):
    (folder / "README.md").write_text("mine")
    assert verify_folder(folder).notes == ("README.md was edited",)
    pack_folder(folder, tmp_path / "packed")
    unpack_folder(tmp_path / "packed", tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == "mine"
    assert verify_folder(tmp_path / "again").notes == ("README.md was edited",)


@pytest.mark.parametrize("size", [0, 1, 7, 100, -1])
def test_a_cut_file_is_named_with_its_size(sharded: Path, size: int):
    data = (sharded / SHARD).read_bytes()
    (sharded / SHARD).write_bytes(data[:size])
    refused(sharded, SHARD, f"expected {len(data)} bytes, found {len(data[:size])}", "again")


@pytest.mark.parametrize("name", [FILES, "config.json", "model.safetensors", RECIPE])
def test_a_missing_file_is_named(folder: Path, name: str):
    (folder / name).unlink()
    refused(folder, name)


def test_swapped_files_are_noticed(sharded: Path):
    one, other = sharded / SHARD, sharded / SHARD.replace("00001", "00002", 1)
    assert one.stat().st_size == other.stat().st_size
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)
    refused(sharded, SHARD, "expected sha256", "too)")


@pytest.mark.parametrize("cut", [0, 1, 50, -1, -2])
def test_a_cut_list_is_noticed(folder: Path, cut: int):
    (folder / FILES).write_bytes((folder / FILES).read_bytes()[:cut])
    refused(folder, FILES, "damaged")


def test_a_file_that_can_not_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch):
    real = Path.open

    def broken(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "config.json":
            raise OSError(5, "Input/output error")
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", broken)
    refused(folder, "config.json", "cannot be read (Input/output error)")


# --- more than there should be -----------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "adapter_config.json",
        "adapter_model.safetensors",
        "model-00002-of-00002.safetensors",
        "pytorch_model.bin",
        "modeling_llama.py",
        "chat_template.jinja",
        "Model.SafeTensors",
        "tokenizer.model",
        "calibration/more.json",
        "sub/README.md",
        ".hidden.json",
    ],
)
def test_a_file_that_might_be_loaded_must_be_in_the_list(folder: Path, name: str):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    refused(folder, name, "does not know it", "move it out")


@pytest.mark.parametrize("kind", ["file", "folder", "added", "broken", "list"])
def test_links_are_refused(folder: Path, tmp_path: Path, kind: str):
    elsewhere = tmp_path / "elsewhere"
    if kind == "file":
        shutil.move(folder / "config.json", elsewhere)
        (folder / "config.json").symlink_to(elsewhere)
    elif kind == "folder":
        shutil.move(folder / "calibration", elsewhere)
        (folder / "calibration").symlink_to(elsewhere)
    elif kind == "added":
        (folder / "more").symlink_to(tmp_path)
    elif kind == "broken":
        (folder / "config.json").unlink()
        (folder / "config.json").symlink_to(tmp_path / "nothing")
    else:
        shutil.move(folder / FILES, elsewhere)
        (folder / FILES).symlink_to(elsewhere)
    words = {"added": "does not know it", "folder": "calibration"}.get(kind, "is a link")
    refused(folder, words)


def test_what_is_no_plain_file_is_refused_and_not_waited_for(folder: Path):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    refused(folder, "config.json", "expected a plain file")


# --- a list that was forged, with a digest that fits -------------------------------------------


@pytest.mark.parametrize("name", [*BAD_NAMES[:-3], FILES, "CALIB_FILES.json", "x.bin"], ids=repr)
def test_names_of_a_forged_list_lead_nowhere(
    folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    row = {"name": name, "bytes": 1, "sha256": "0" * 64}
    rows = json.loads((folder / FILES).read_text())["files"]
    forge(folder, files=[*rows, row])
    opened = []
    monkeypatch.setattr(file_list, "_digests", lambda *a, **k: opened.append(a))
    refused(folder, FILES, "do not use this folder")
    assert not opened


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"files": {}}, "expected a list of files"),
        ({"files": [5]}, "expected name, bytes and sha256"),
        ({"files": [{"name": "a", "bytes": -1, "sha256": "0" * 64}]}, "a size and a digest"),
        ({"files": [{"name": "a", "bytes": True, "sha256": "0" * 64}]}, "a size and a digest"),
        ({"files": [{"name": "a", "bytes": 1.5, "sha256": "0" * 64}]}, "a size and a digest"),
        ({"files": [{"name": "a", "bytes": 1, "sha256": "F" * 64}]}, "a sha256 of a"),
        ({"files": [{"name": "a", "bytes": 1, "sha256": "0" * 64}] * 2}, "found a twice"),
        ({"facts": []}, "expected facts by name"),
        ({"format": "something else"}, "is not the list of an exported model"),
        ({"format_version": "1"}, "is not the list of an exported model"),
        ({"format_version": 2}, "pip install --upgrade"),
    ],
)
def test_values_of_a_forged_list_are_judged(folder: Path, changes: dict[str, Any], word: str):
    forge(folder, **changes)
    refused(folder, FILES, word)


def test_names_that_differ_in_case_alone_stand_twice(folder: Path):
    rows = json.loads((folder / FILES).read_text())["files"]
    forge(folder, files=[*rows, {**rows[0], "name": rows[0]["name"].lower()}])
    refused(folder, "twice")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"digest": NaN}',
        b'{"a": 1e999}',
        b"9" * 10_000,
        b'\xef\xbb\xbf{"a": 1}',
    ],
    ids=range(9),
)
def test_a_list_that_is_no_record_is_refused(folder: Path, data: bytes):
    (folder / FILES).write_bytes(data)
    refused(folder, FILES)


def test_a_list_without_end_is_not_read(folder: Path):
    with (folder / FILES).open("r+b") as stream:
        stream.truncate(2**40)  # takes no room on the disk
    refused(folder, FILES, "at most")


# --- records that the list vouches for ---------------------------------------------------------


@pytest.mark.parametrize("place", ["/etc/passwd", "../m/model.safetensors", "sub/x.safetensors"])
def test_an_index_names_files_of_the_folder_alone(sharded: Path, place: str):
    content = json.loads((sharded / INDEX).read_text())
    content["weight_map"]["1.half"] = place
    (sharded / INDEX).write_text(json.dumps(content))
    relist(sharded)
    refused(sharded, INDEX, place)


def change_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        change(content)
        (folder / INDEX).write_text(json.dumps(content))

    return apply


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (change_index(lambda c: c.pop("weight_map")), "expected a weight_map"),
        (change_index(lambda c: c["weight_map"].pop("1.half")), "'1.half' only in the file"),
        (change_index(lambda c: c["weight_map"].update(x=SHARD)), "'x' only in the index"),
        (lambda f: (f / INDEX).write_text("[]"), "expected a JSON object"),
        (lambda f: (f / INDEX).unlink(), "expected this file of weights alone"),
        (lambda f: shutil.copy(f / SHARD, f / "model.safetensors"), "found none for"),
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / SHARD).write_bytes(b"x" * 100), "not the header of a safetensors file"),
    ],
    ids=range(8),
)
def test_weights_that_do_not_fit_their_index(sharded: Path, change: Any, word: str):
    change(sharded)
    relist(sharded)
    refused(sharded, word)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (REPORT, "[1]"),
        (REPORT, "{" * 10),
        (CALIB_CONFIG, '{"a":' * 100_000),
        (RECIPE, "[a, b]"),
        (RECIPE, "a: !!python/object/apply:os.system ['true']"),
        (RECIPE, "a: &a [x]\nb: [*a, *a]\n" + "\n".join(f"c{i}: *a" for i in range(40))),
        (RECIPE, "[" * 50_000),
        (RECIPE, "- " * 50_000),
        (RECIPE, "a: 1\na: 2\n"),
        (RECIPE, "\x00"),
    ],
    ids=range(10),
)
def test_records_that_can_not_be_read(folder: Path, name: str, text: str):
    (folder / name).write_text(text)
    relist(folder)
    with pytest.raises(CalibError, match=f"{name}: damaged"):
        read_summary(folder)


# --- archives ----------------------------------------------------------------------------------

MASKED = "model.bitmask.safetensors"


def rewrite(archive: Path, change: Callable[[dict[str, Any]], Any], data: bytes = b"") -> None:
    """Change the header of the packed weights, and make all digests of the archive fit again."""
    file = archive / MASKED
    whole = file.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + whole[8 + length :] + data)
    relist(archive, ARCHIVE.file)


def inner(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    """Change the header of the original file, which stands inside that of the packed one."""

    def apply(header: dict[str, Any]) -> None:
        content = json.loads(header["__metadata__"]["header"])
        change(content)
        header["__metadata__"]["header"] = json.dumps(content)

    return apply


def grown(content: dict[str, Any]) -> None:
    """A tensor of a terabyte whose mask is a few bytes long."""
    row = content["half"]
    size = 2**40 - row["data_offsets"][1] + row["data_offsets"][0]
    for other in content.values():
        if other.get("data_offsets", [0])[0] >= row["data_offsets"][1]:
            other["data_offsets"] = [place + size for place in other["data_offsets"]]
    row["shape"], row["data_offsets"][1] = [2**39], row["data_offsets"][0] + 2**40


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda h: h.pop("__metadata__"), "is no file of bit masks"),
        (lambda h: h["__metadata__"].update(format_version="2"), "pip install --upgrade"),
        (lambda h: h["__metadata__"].update(header="[]"), "do not fit"),
        (lambda h: h["__metadata__"].update(header="{}"), "other tensors"),
        (inner(grown), "other tensors than it says"),
        (inner(lambda c: c["half"].update(dtype="I16")), "is not kept as a mask"),
        (inner(lambda c: c["half"].update(shape=[2**62, 2**62])), "do not fit shape"),
        (inner(lambda c: c.pop("half")), "damaged"),
        (lambda h: h.update(more={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}), "other"),
    ],
    ids=range(9),
)
def test_sizes_that_do_not_fit_are_refused_before_there_is_room(
    archive: Path, change: Any, word: str
):
    rewrite(archive, change)
    not_unpacked(archive, MASKED, word)


@pytest.mark.parametrize("bits", ["more", "fewer", "beyond", "moved"])
def test_a_mask_has_as_many_bits_as_there_are_values(archive: Path, bits: str):
    file = archive / MASKED
    whole = bytearray(file.read_bytes())
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    original = json.loads(header["__metadata__"]["header"])
    original.pop("__metadata__")
    place = sorted(original, key=lambda n: original[n]["data_offsets"]).index("odd")  # 35 elements
    begin, end = (8 + length + at for at in header[f"{place}.mask"]["data_offsets"])
    if bits == "more":
        whole[begin:end] = b"\xff" * (end - begin - 1) + b"\x07"
    elif bits == "fewer":
        whole[begin:end] = bytes(end - begin)
    elif bits == "beyond":
        whole[end - 1] |= 0x80
    else:
        lowest = whole[begin] & -whole[begin]
        free = ~whole[begin] & 0xFF
        whole[begin] ^= lowest | (free & -free)
    file.write_bytes(bytes(whole))
    relist(archive, ARCHIVE.file)
    word = "does not give back what was packed" if bits == "moved" else "bits set in the mask"
    not_unpacked(archive, word)


def test_a_mask_of_another_size_than_was_packed_gets_no_room(archive: Path):
    """A whole archive of other weights, smuggled in: the list of the folder does not know them."""
    other = archive.parent / "other"
    other.mkdir()
    weights = torch.zeros(4096, 4096, dtype=torch.float64)
    source = make_folder(other / "m")
    save_file({"w": weights}, source / "model.safetensors")
    relist(source)
    pack_folder(source, other / "p")
    assert (other / "p" / MASKED).stat().st_size < weights.nbytes / 50
    shutil.copy(other / "p" / MASKED, archive / MASKED)
    relist(archive, ARCHIVE.file)
    not_unpacked(archive, MASKED, "expected a file of", "inside")


@pytest.mark.parametrize("name", ["../../evil.json", "/tmp/evil", "a\\b", "NUL"])
def test_names_of_an_archive_lead_nowhere(archive: Path, name: str):
    for file in (ARCHIVE.file, FILES):
        before = (archive / file).read_bytes()
        rows = json.loads(before)["files"]
        forge(archive, file, files=[*rows, {"name": name, "bytes": 1, "sha256": "0" * 64}])
        if file == FILES:
            relist(archive, ARCHIVE.file)
        not_unpacked(archive, file, "do not use this folder")
        (archive / file).write_bytes(before)


def test_an_archive_without_or_with_other_files(archive: Path):
    (archive / "more.json").write_text("{}")
    not_unpacked(archive, "more.json", "does not know it")
    relist(archive, ARCHIVE.file)
    not_unpacked(archive, "more.json", "found another file")
    (archive / "more.json").unlink()
    (archive / RECIPE).unlink()
    relist(archive, ARCHIVE.file)
    not_unpacked(archive, RECIPE, "found none")
    (archive / FILES).unlink()
    relist(archive, ARCHIVE.file)
    not_unpacked(archive, FILES, "found none")


# --- the commands ------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out, said.err


def test_inspect_says_what_it_is_and_whether_it_is_whole(
    folder: Path, archive: Path, capsys: pytest.CaptureFixture[str]
):
    code, out, _ = run(capsys, "inspect", str(folder))
    assert code == 0
    for word in ("org/base", "wanda", "file:a.jsonl", "dense", "k" * 64, "yes, every byte"):
        assert word in out
    code, out, _ = run(capsys, "inspect", "--json", str(archive))
    assert code == 0
    found = json.loads(out)
    assert (found["kind"], found["whole"]) == ("archive", True)
    assert set(found["files"]) | {ARCHIVE.file} == set(contents(archive))
    (folder / "model.safetensors").write_bytes(b"x")
    code, out, _ = run(capsys, "inspect", str(folder))
    assert code == 1
    assert "no: " in out
    assert "model.safetensors: damaged" in out
    assert run(capsys, "inspect", "--json", str(folder))[0] == 1
    code, out, _ = run(capsys, "inspect", "--no-verify", str(folder))
    assert code == 0
    assert "not looked at" in out


def test_inspect_shows_nothing_that_steers_a_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    forge(folder, facts={"base_model": "a\x1b[2Jb\nwhole  yes", "check": 5, "format": []})
    code, out, _ = run(capsys, "inspect", str(folder))
    assert code == 0
    assert "\x1b" not in out
    assert sum(line.startswith("whole") for line in out.splitlines()) == 1


@pytest.mark.parametrize(
    "report",
    [{}, {"recipe": 5, "achieved": [], "layers": {}, "error": {"calibration": "x"}, "versions": 1}],
)
def test_inspect_survives_odd_reports(
    folder: Path, report: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    (folder / REPORT).write_text(json.dumps(report))
    (folder / "calibration.json").write_text('{"sources": [1, {"source": []}]}')
    relist(folder)
    assert run(capsys, "inspect", str(folder))[0] == 0


def test_pack_and_unpack_say_what_they_did(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    code, out, _ = run(capsys, "pack", str(folder), str(tmp_path / "p"))
    assert code == 0
    assert "unpack it before use" in out
    code, out, _ = run(capsys, "unpack", str(tmp_path / "p"), str(tmp_path / "o"))
    assert code == 0
    assert "verified" in out
    assert contents(tmp_path / "o") == contents(folder)
    code, out, err = run(capsys, "unpack", str(tmp_path / "p"), str(tmp_path / "o"))
    assert code == 2
    assert err.startswith("error: out: ")
    code, out, err = run(capsys, "unpack", str(folder), str(tmp_path / "q"))
    assert code == 2
    assert "lm-calib pack makes one" in err
    (tmp_path / "p" / RECIPE).write_text("x")
    code, out, err = run(capsys, "unpack", str(tmp_path / "p"), str(tmp_path / "q"))
    assert code == 1
    assert f"{RECIPE}: damaged" in err


def test_the_help_says_that_archives_are_for_disks(capsys: pytest.CaptureFixture[str]):
    code, out, _ = run(capsys, "pack", "--help")
    assert code == 0
    assert "not for speed" in " ".join(out.split())


def test_what_is_no_exported_folder_is_the_users_error(tmp_path: Path):
    with pytest.raises(UserError):
        verify_folder(tmp_path)
