from __future__ import annotations

import json

import pytest
import torch
from conftest import word_tokenizer

from lm_calib_plugin.calibration import CalibrationSet, tokenizer_digest
from lm_calib_plugin.errors import CalibError


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


def test_save_and_load(drawn, tmp_path):
    drawn.save(tmp_path / "sub" / "set.json")
    again = CalibrationSet.load(tmp_path / "sub" / "set.json")
    assert again.calib_id == drawn.calib_id
    assert again.summary() == drawn.summary()
    assert (again.seed, again.seqlen, again.sources) == (9, 3, drawn.sources)
    assert all(torch.equal(a, b) for a, b in zip(again.sequences, drawn.sequences, strict=True))
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["set.json"]


@pytest.mark.parametrize(
    ("old", "new"), [("[3, 4, 5]", "[3, 4, 6]"), ('"seed": 9', '"seed": 8'), ('"x"', '"y"')]
)
def test_every_change_of_the_file_is_noticed(drawn, tmp_path, old, new):
    path = tmp_path / "set.json"
    drawn.save(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(CalibError, match=r"damaged: expected digest [0-9a-f]{64}, found [0-9a-f]"):
        CalibrationSet.load(path)


def test_other_damage(drawn, tmp_path):
    path = tmp_path / "set.json"
    drawn.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CalibError, match="damaged: expected one JSON object, found none"):
        CalibrationSet.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibError, match="damaged"):
        CalibrationSet.load(path)
    path.write_text("[]")
    with pytest.raises(CalibError, match="damaged"):
        CalibrationSet.load(path)
    path.write_text("{}")
    with pytest.raises(CalibError, match="not a calibration set"):
        CalibrationSet.load(path)
    with pytest.raises(CalibError, match="cannot be read"):
        CalibrationSet.load(tmp_path / "none.json")
    content = json.loads(whole)
    path.write_text(json.dumps(content | {"format_version": 99}))
    with pytest.raises(CalibError, match="upgrade lm-calib-plugin"):
        CalibrationSet.load(path)


def test_tokenizer_digest_names_what_text_becomes():
    plain = word_tokenizer()
    first = tokenizer_digest(plain)
    assert first == tokenizer_digest(word_tokenizer())
    assert first != tokenizer_digest(word_tokenizer(start_token=True))
    plain(["w1", "w1 w2"], padding=False, truncation=True, max_length=1)
    assert tokenizer_digest(plain) == first
    plain.add_tokens(["w999"])
    assert tokenizer_digest(plain) != first
