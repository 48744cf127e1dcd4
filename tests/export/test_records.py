"""Lists of files, records beside the weights, and paths that stay at home."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from pathlib import Path

import pytest

from lm_calib_plugin.calibration import set_folder
from lm_calib_plugin.errors import CalibError, UserError
from lm_calib_plugin.export import names
from lm_calib_plugin.export.options import CALIBRATION, FILES, RECIPE
from lm_calib_plugin.export.published import publishable, without_folders, without_secrets
from lm_calib_plugin.export.records import (
    calibration_record,
    read_files_record,
    read_summary,
    verify_folder,
    write_files_record,
)
from tests.export.folders import FACTS, contents, drawn, make_folder


@pytest.mark.parametrize("shards", [1, 3])
def test_a_whole_folder_is_found_whole(tmp_path: Path, shards: int):
    folder = make_folder(tmp_path / "m", shards=shards)
    record = verify_folder(folder)
    there = contents(folder)
    del there[FILES]
    assert {n: (r.bytes, r.sha256) for n, r in record.files.items()} == {
        n: (len(data), hashlib.sha256(data).hexdigest()) for n, data in there.items()
    }
    assert record.facts == FACTS
    assert record.notes == ()
    assert record.bytes == sum(map(len, there.values()))
    assert read_files_record(folder) == record


def test_equal_folders_have_equal_lists(tmp_path: Path):
    one, other = make_folder(tmp_path / "a"), make_folder(tmp_path / "b" / "c")
    assert (one / FILES).read_bytes() == (other / FILES).read_bytes()


def test_a_list_is_replaced_and_never_names_itself(tmp_path: Path):
    folder = make_folder(tmp_path / "m")
    (folder / "more.txt").write_text("x")
    write_files_record(folder, {"key": "other"})
    record = verify_folder(folder)
    assert record.facts == {"key": "other"}
    assert "more.txt" in record.files
    assert FILES not in record.files


def test_what_the_hub_puts_beside_is_noted(tmp_path: Path):
    folder = make_folder(tmp_path / "m")
    (folder / ".gitattributes").write_text("x")
    (folder / "picture.PNG").write_text("x")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "model.safetensors.metadata").write_text("x")
    record = verify_folder(folder)
    assert record.notes == (
        f".gitattributes is not in {FILES}",
        f"picture.PNG is not in {FILES}",
    )


@pytest.mark.parametrize("inside", ["", "inner", "in/ner"])
def test_links_of_the_cache_of_the_hub_are_followed(tmp_path: Path, inside: str):
    made = make_folder(tmp_path / "made")
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc" / inside
    blobs.mkdir(parents=True)
    for name, data in contents(made).items():
        blob = blobs / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    assert verify_folder(snapshot).files == verify_folder(made).files
    outside = tmp_path / "outside.json"
    outside.write_bytes((snapshot / "config.json").read_bytes())
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(outside)
    with pytest.raises(CalibError, match=r"config.json: is a link"):
        verify_folder(snapshot)


def test_the_summary_reads_no_weights(tmp_path: Path):
    folder = make_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    summary = read_summary(folder)
    assert summary.recipe == {"method": "wanda", "sparsity": 0.5}
    assert summary.report is not None
    assert summary.report["layers"] == 2
    assert summary.calibration is not None
    assert summary.calibration["calib_id"] == drawn().calib_id
    assert summary.config is None


def test_the_summary_checks_what_it_reads(tmp_path: Path):
    folder = make_folder(tmp_path / "m")
    text = (folder / RECIPE).read_text()
    (folder / RECIPE).write_text(text.replace("0.5", "0.6"))
    with pytest.raises(CalibError, match=r"recipe.yaml: damaged: expected sha256 \w+, found \w+"):
        read_summary(folder)


def test_a_calibration_record_is_that_of_the_set_without_tokens(tmp_path: Path):
    made = drawn()
    made.save(tmp_path / "set")
    stored = json.loads((tmp_path / "set" / "calibration.json").read_text())
    record = calibration_record(made)
    for name in ("calib_id", "seqlen", "seed", "nsamples", "tokens", "tokenizer", "vocab_size"):
        assert record[name] == stored[name]
    assert record["sources"] == [{"source": "file:a.jsonl?column=text", "rows": [0, 1]}]
    assert record["licences"] == ["file:a.jsonl?column=text: not known to this program"]
    assert "someone" not in json.dumps(record)


def test_a_calibration_record_is_not_taken_for_a_set(tmp_path: Path):
    folder = make_folder(tmp_path / "m")
    assert (folder / CALIBRATION).exists()
    with pytest.raises(UserError, match="is not the record of a calibration set"):
        set_folder.read_record(folder)


def test_a_folder_that_could_not_be_read_back_is_not_listed(tmp_path: Path):
    folder = make_folder(tmp_path / "m")
    (folder / "link.json").symlink_to(folder / "config.json")
    with pytest.raises(CalibError, match=r"link.json: can not be part of .* it is a link"):
        write_files_record(folder, {})
    (folder / "link.json").unlink()
    (folder / "training.bin").write_bytes(b"x")
    with pytest.raises(CalibError, match=r"training.bin: .* may run code"):
        write_files_record(folder, {})


@pytest.mark.parametrize(
    ("given", "kind"),
    [("missing", "no folder"), ("file", "is a file"), ("empty", "holds no calib_files.json")],
)
def test_what_is_no_exported_folder_is_the_users_error(tmp_path: Path, given: str, kind: str):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=kind) as error:
        verify_folder(tmp_path / given)
    assert "lm-calib export" in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "a/b/c.json", "tokenizer.model", "ü.json", "a b.txt", ".gitattributes"],
)
def test_usual_names_are_taken(name: str):
    assert names.fault(name) is None


BAD_NAMES = [
    "",
    "/etc/passwd",
    "../x",
    "a/../../x",
    "..",
    ".",
    "./x",
    "a//b",
    "a/",
    "~/x",
    "C:/x",
    "c:x",
    "a\\b",
    "\\\\host\\x",
    "a\x00b",
    "a\nb",
    "a:b",
    "con",
    "a/NUL.json",
    "com1.txt",
    "a ",
    "a.",
    "\ud800",
    "x" * 256,
    5,
    None,
    ["a"],
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_other_names_are_not(name: object):
    assert names.fault(name)


@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("file:/home/me/my data.jsonl?column=text", "file:my data.jsonl?column=text"),
        ("file:data/x.txt", "file:x.txt"),
        ("c4?path=/a/b/c.jsonl", "c4?path=c.jsonl"),
        ("set:runs/old*0.25+self*0.75", "set:old*0.25+self*0.75"),
        ("hf:org/name", "hf:org/name"),
        ("hf:/data/sets/name:config", "hf:name:config"),
        ("null:shuffle(file:/a/b.txt)", "null:shuffle(file:b.txt)"),
        ("/home/Some One/x y.json", "x y.json"),
        ("~/models/m", "m"),
        (r"C:\Users\me\x.txt", "x.txt"),
        ("lm-calib export --pretrained ../m --out /o/p", "lm-calib export --pretrained m --out p"),
        ("see https://host.org/a/b, and/or 1/2", "see https://host.org/a/b, and/or 1/2"),
        ("a / b", "a / b"),
        ("self", "self"),
        ("2:4", "2:4"),
        ("", ""),
    ],
)
def test_of_local_paths_the_last_part_is_published(text: str, published: str):
    assert without_folders(text) == published
    assert without_folders({"a": [text, 1, None]}) == {"a": [published, 1, None]}


OPEN = "hf_" + "Ab3" * 11
SECRET = "s3cret value"


@pytest.mark.parametrize(
    "words",
    [
        ["--hf_token", OPEN],
        ["--token", SECRET],
        ["--api-key", SECRET],
        [f"--password={SECRET}"],
        [f"--model_args=pretrained=a/b,token={SECRET},dtype=auto"],
        ["--model_args", f"pretrained=a/b,token={SECRET},dtype=auto"],
        ["--model_args", f"pretrained=a/b,apiKey={SECRET}"],
        ["--hf_hub_log_args", f"token={SECRET},hub_results_org=x"],
        ["--hf_hub_log_args", f"hub_results_org=x,client_secret={SECRET}"],
        ["--wandb_args", f"project=x,WANDB_API_KEY={SECRET},name=y"],
        ["--metadata", f'{{"a": 1, "auth_token": "{SECRET}", "b": [2]}}'],
        ["--metadata", f"{{'a': 1, 'passwd': '{SECRET}'}}"],
        ["--metadata", f'{{"nested": "{OPEN}"}}'],
        ["--model_args", f"base_url=https://user:{SECRET.replace(' ', '')}@host/v1,model=x"],
        ["--model_args", f"base_url=https://host/v1?access_token={SECRET}&v=2,model=x"],
        ["bash", "-c", f"lm_eval --token '{SECRET}' --tasks demo"],
        [OPEN],
    ],
    ids=lambda words: " ".join(words)[:50],
)
def test_secrets_are_taken_out(words: list[str]) -> None:
    words = ["lm_eval", *words, "--tasks", "demo,words", "--limit", "3"]
    for shown in (
        without_secrets(shlex.join(words)),
        shlex.join(without_secrets(words)),
        str(publishable({"command": shlex.join(words), "n": [1, None]})),
    ):
        for part in (OPEN, SECRET, *SECRET.split(), SECRET.replace(" ", "")):
            assert part not in shown
        assert "REDACTED" in shown
    # The line can still be read and typed.
    read = shlex.split(without_secrets(shlex.join(words)))
    assert len(read) == len(words)
    assert read[-4:] == words[-4:]
    assert read == without_secrets(words)


@pytest.mark.parametrize(
    "text",
    ["token={}", "it's --token {}", '{{"token": "{}"', "a `password={}`", "https://me:{}@host\n'"],
)
def test_secrets_are_taken_out_of_any_text(text: str) -> None:
    assert without_secrets(text.format("s3cret")) == text.format("REDACTED").replace("me:", "")


@pytest.mark.parametrize(
    "text",
    [
        "lm_eval --model_args pretrained=a/b,prefix_tokens=5,add_bos_token=True,eos_token=</s>",
        "lm_eval --gen_kwargs max_new_tokens=256 --model_args token=True,use_auth_token=true",
        "lm-calib export out --calibration random --eval-tokens 512 --tokenizer some/name",
        "lm-calib export out --calib-seed 3 --exclude-first-token true --no-keep",
        "lm_eval --tasks monkey --model_args pretrained=a/hf_hub,keyword=x --hf_hub_log_args a=b",
        "1. the word 'token' and a key: 5",
        "https://huggingface.co/a/b",
    ],
)
def test_innocent_names_stay(text: str) -> None:
    assert without_secrets(text) == text


def test_secrets_in_mappings_are_taken_out_and_digests_stay() -> None:
    record = {"key": "k" * 64, "model_digest": "d", "tokens": 120, "bos_token": "<s>", "n": None}
    assert without_secrets(record) == record
    given = {"hf_token": SECRET, "inner": [{"password": SECRET}], OPEN: 1, "token": True}
    redacted = {"hf_token": "REDACTED", "inner": [{"password": "REDACTED"}], "REDACTED": 1}
    assert without_secrets(given) == redacted | {"token": True}
