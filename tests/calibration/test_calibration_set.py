from __future__ import annotations

import hashlib
import json

import pytest
import torch
from conftest import word_tokenizer
from safetensors.torch import load_file, save

from lm_calib_plugin import storage
from lm_calib_plugin.calibration import CalibrationSet, set_folder, tokenizer_digest, tokens
from lm_calib_plugin.errors import CalibError, UserError
from lm_calib_plugin.storage import record_text


@pytest.fixture
def drawn():
    return CalibrationSet.of(
        [[3, 4, 5], [6, 7]],
        seqlen=3,
        seed=9,
        tokenizer="t",
        sources=[{"source": "x", "nsequences": 2, "indices": [1, 2], "rows": [0, 1]}],
    )


def test_shape_and_counts(drawn):
    assert drawn.nsamples == 2
    assert drawn.tokens == 5
    assert all(ids.dtype == torch.int64 and ids.dim() == 1 for ids in drawn.sequences)


def test_summary_leaves_long_lists_out(drawn):
    assert drawn.summary() == {
        "calib_id": drawn.calib_id,
        "sources": [{"source": "x", "nsequences": 2}],
        "nsamples": 2,
        "seqlen": 3,
        "tokens": 5,
    }


def test_equal_ids_have_an_equal_name(drawn):
    def named(ids, **other):
        return CalibrationSet.of(ids, **{"seqlen": 3, "tokenizer": "t", **other}).calib_id

    assert named([[3, 4, 5], [6, 7]], seqlen=50, seed=1) == drawn.calib_id
    assert named([[3, 4, 5], [6, 8]]) != drawn.calib_id
    assert named([[3, 4], [5, 6, 7]]) != drawn.calib_id
    assert named([[6, 7], [3, 4, 5]]) != drawn.calib_id
    assert named([[3, 4, 5], [6, 7]], tokenizer="u") != drawn.calib_id


@pytest.mark.parametrize("bad", [[[]], [[1, 2, 3, 4]], [[[1]]]])
def test_wrong_shapes_are_refused(bad):
    with pytest.raises(ValueError, match="sequence 0 has shape"):
        CalibrationSet.of(bad, seqlen=3)


FILES = {"calibration.json", "tokens.safetensors", "preview.txt", "README.md"}


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_save_and_load(drawn, tmp_path):
    drawn.save(tmp_path / "sub" / "set")
    again = CalibrationSet.load(tmp_path / "sub" / "set")
    assert again.calib_id == drawn.calib_id
    assert again.summary() == drawn.summary()
    assert (again.seed, again.seqlen, again.sources) == (9, 3, drawn.sources)
    assert all(torch.equal(a, b) for a, b in zip(again.sequences, drawn.sequences, strict=True))
    assert all(ids.dtype == torch.int64 for ids in again.sequences)
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["set"]
    assert set(snapshot(tmp_path / "sub" / "set")) == FILES


def test_same_arguments_same_bytes(drawn, tmp_path):
    costly = drawn.sources[0] | {"generation": {"seconds": 1.5, "tokens_per_second": 7, "kept": 2}}
    for number, seconds in enumerate((1.5, 2.5)):
        costly["generation"]["seconds"] = seconds
        made = CalibrationSet.of(drawn.sequences, seqlen=3, tokenizer="t", sources=[costly])
        made.save(tmp_path / str(number), vocab_size=9, factors={"nsamples": 2})
    assert snapshot(tmp_path / "0") == snapshot(tmp_path / "1")
    record = json.loads((tmp_path / "0" / "calibration.json").read_text())
    assert record["sources"][0]["generation"] == {"kept": 2}
    assert (record["vocab_size"], record["factors"]) == (9, {"nsamples": 2})


def test_files_can_be_read_by_others(drawn, tmp_path):
    """By the formats' own libraries, knowing nothing of this package."""
    drawn.save(tmp_path / "set", vocab_size=9)
    tensors = load_file(tmp_path / "set" / "tokens.safetensors")
    assert tensors["ids"].dtype == torch.int32
    assert tensors["ids"].tolist() == [3, 4, 5, 6, 7]
    assert tensors["offsets"].tolist() == [0, 3, 5]
    assert "weights" not in tensors
    record = json.loads((tmp_path / "set" / "calibration.json").read_text())
    for name, sha256 in record["files"].items():
        assert hashlib.sha256((tmp_path / "set" / name).read_bytes()).hexdigest() == sha256
    CalibrationSet.of([[1 << 31]], seqlen=1).save(tmp_path / "wide")
    assert load_file(tmp_path / "wide" / "tokens.safetensors")["ids"].dtype == torch.int64
    assert CalibrationSet.load(tmp_path / "wide").sequences[0].tolist() == [1 << 31]


def test_weights_are_kept(tmp_path):
    made = CalibrationSet.of([[1], [2], [3]], seqlen=1, weights=[0.1, 2, 1 / 3])
    made.save(tmp_path / "set")
    again = CalibrationSet.load(tmp_path / "set")
    assert again.weights == (0.1, 2, 1 / 3)
    assert again.calib_id == made.calib_id


def test_preview_shows_every_sequence(tmp_path):
    tokenizer = word_tokenizer()
    ids = [tokenizer(text)["input_ids"] for text in ("w1 w2 w3", "w4 " * 400)]
    sources = [
        {"source": "file:a", "rows": [1], "licence": "CC0"},
        {"source": "file:b", "rows": [0], "licence": None},
    ]
    CalibrationSet.of(ids, seqlen=400, sources=sources).save(tmp_path / "s", tokenizer=tokenizer)
    text = (tmp_path / "s" / "preview.txt").read_text()
    assert "[0] file:b, 3 tokens\nw1 w2 w3\n" in text
    assert "[1] file:a, 400 tokens\n" + ("w4 " * 100)[:300] + " ...\n" in text
    card = (tmp_path / "s" / "README.md").read_text()
    assert "- file:a: CC0" in card
    assert "- file:b: not known" in card


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_changed_byte_is_noticed(drawn, tmp_path, name):
    drawn.save(tmp_path / "set", vocab_size=9)
    file = tmp_path / "set" / name
    whole = file.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 60)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CalibError):
            CalibrationSet.load(tmp_path / "set")
    for damaged in (whole + b"\n", whole[:-1], b"", b"[]"):
        file.write_bytes(damaged)
        with pytest.raises(CalibError, match=name) as caught:
            CalibrationSet.load(tmp_path / "set")
        assert "lm-calib calibrate" in str(caught.value)
    file.unlink()
    with pytest.raises(CalibError, match=name):
        CalibrationSet.load(tmp_path / "set")
    file.write_bytes(whole)
    CalibrationSet.load(tmp_path / "set")


def forged(folder, **changes):
    """Change a record and sign it again, as an attacker would."""
    file = folder / "calibration.json"
    content = json.loads(file.read_text()) | changes
    content.pop("digest")
    file.write_text(record_text(content))


def test_a_forged_record_leads_nowhere(drawn, tmp_path):
    drawn.save(tmp_path / "set")
    (tmp_path / "secret").write_text("x")
    content = json.loads((tmp_path / "set" / "calibration.json").read_text())
    whole = snapshot(tmp_path / "set")
    sha256 = hashlib.sha256(b"x").hexdigest()
    for changes in (
        {"files": {**content["files"], "../secret": sha256}},
        {"files": {"../secret": sha256}},
        {"files": "../secret"},
        {"calib_id": "0" * 64},
        {"seqlen": 1},
        {"tokenizer": "other"},
    ):
        forged(tmp_path / "set", **changes)
        with pytest.raises(CalibError, match="damaged"):
            CalibrationSet.load(tmp_path / "set")
        (tmp_path / "set" / "calibration.json").write_bytes(whole["calibration.json"])
    for tensors in (
        {"ids": torch.tensor([1, 2]), "offsets": torch.tensor([0, 5])},
        {"ids": torch.tensor([1, 2]), "offsets": torch.tensor([0, 2, 1, 2])},
        {"ids": torch.tensor([[1, 2]]), "offsets": torch.tensor([0, 1])},
        {"ids": torch.tensor([1, 2])},
    ):
        data = save(tensors)
        (tmp_path / "set" / "tokens.safetensors").write_bytes(data)
        files = {**content["files"], "tokens.safetensors": hashlib.sha256(data).hexdigest()}
        forged(tmp_path / "set", files=files)
        with pytest.raises(CalibError, match=r"tokens\.safetensors: damaged"):
            CalibrationSet.load(tmp_path / "set")


def test_what_is_no_set_says_what_is_needed(drawn, tmp_path):
    with pytest.raises(UserError, match="no folder .* lm-calib calibrate"):
        CalibrationSet.load(tmp_path / "none")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    with pytest.raises(UserError, match=r"there: a\.txt.*file:PATH"):
        CalibrationSet.load(tmp_path / "texts")
    with pytest.raises(UserError, match="is a file"):
        CalibrationSet.load(tmp_path / "texts" / "a.txt")
    drawn.save(tmp_path / "set")
    forged(tmp_path / "set", format_version=99)
    with pytest.raises(UserError, match="format 99; this build reads up to 1; pip install"):
        CalibrationSet.load(tmp_path / "set")
    forged(tmp_path / "set", format="other")
    with pytest.raises(UserError, match="not the record of a calibration set"):
        CalibrationSet.load(tmp_path / "set")


def test_nothing_else_is_overwritten(drawn, tmp_path):
    other = CalibrationSet.of([[1]], seqlen=1)
    drawn.save(tmp_path / "set")
    before = snapshot(tmp_path / "set")
    with pytest.raises(UserError, match="exists; a new folder; .* --overwrite"):
        other.save(tmp_path / "set")
    (tmp_path / "set" / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match=r"not only a calibration set \(there: mine\.txt\)"):
        other.save(tmp_path / "set", overwrite=True)
    (tmp_path / "set" / "mine.txt").unlink()
    assert snapshot(tmp_path / "set") == before
    other.save(tmp_path / "set", overwrite=True)
    assert CalibrationSet.load(tmp_path / "set").calib_id == other.calib_id
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not only a calibration set"):
        other.save(tmp_path / "empty", overwrite=True)


def test_a_failed_write_leaves_nothing(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(set_folder, "record_text", lambda content: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        drawn.save(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_digest_names_what_text_becomes():
    plain = word_tokenizer()
    first = tokenizer_digest(plain)
    assert first == tokenizer_digest(word_tokenizer())
    assert first != tokenizer_digest(word_tokenizer(start_token=True))
    plain(["w1", "w1 w2"], padding=False, truncation=True, max_length=1)
    assert tokenizer_digest(plain) == first
    plain.add_tokens(["w999"])
    assert tokenizer_digest(plain) != first


def test_a_tokenizer_seen_before_is_not_read_again(monkeypatch):
    """Nor are more digests remembered than a program has tokenizers."""
    plain = word_tokenizer()
    content = json.loads(plain.backend_tokenizer.to_str())
    expected = storage.digest(
        {"backend": {k: v for k, v in content.items() if k not in ("padding", "truncation")}}
    )
    read = []
    real = json.loads
    monkeypatch.setattr(tokens.json, "loads", lambda text: read.append(1) or real(text))
    monkeypatch.setattr(tokens, "_KNOWN", {})
    monkeypatch.setattr(tokens, "MOST_KNOWN", 2)
    for _ in range(3):
        assert tokenizer_digest(plain) == tokenizer_digest(word_tokenizer()) == expected
    assert len(read) == 1
    for size in (1, 2, 3):
        plain(["w1 w2 w3 w4"], truncation=True, max_length=size)
        assert tokenizer_digest(plain) == expected
        assert len(tokens._KNOWN) <= 2
