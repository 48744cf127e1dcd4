from __future__ import annotations

import json

import pytest
from conftest import WORDS, context, draw, numbered, write_jsonl

from lm_calib_plugin.calibration import CalibrationSet
from lm_calib_plugin.calibration.sources.files import Files
from lm_calib_plugin.calibration.sources.random_ids import RandomIds
from lm_calib_plugin.calibration.sources.text_files import open_documents
from lm_calib_plugin.errors import UserError


def texts(path, words, options=(), **fields):
    source = Files(str(path), options)
    source.validate()
    return [document.text for document in source.documents(context(words, **fields))]


def test_txt_is_split_at_two_blank_lines(words, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\nstill one\n\n\ntwo\r\n\r\n \t\r\nthree\n\n\n\n")
    assert texts(path, words) == ["one\n\nstill one", "two", "three"]


def test_the_formats_say_the_same(words, tmp_path):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    wanted = ["w1 w2", "w3 \u00e9\u2028w4", "w5"]
    folder = tmp_path / "each"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", wanted)
    (folder / "b.json").write_text(json.dumps([wanted[0], {"text": wanted[1]}, wanted[2]]))
    parquet.write_table(arrow.table({"n": [1, 2, 3], "text": wanted}), folder / "c.parquet")
    (folder / "d.txt").write_text("\ufeff" + "\n\n\n".join(wanted), encoding="utf-8")
    for path in folder.iterdir():
        assert texts(path, words) == wanted, path.name


def test_a_folder_is_read_in_order_and_numbered_through(words, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    write_jsonl(tmp_path / "b.jsonl", ["b0", "b1"])
    write_jsonl(tmp_path / "a.jsonl", ["a0"])
    write_jsonl(tmp_path / "sub" / "c.jsonl", ["c0"])
    write_jsonl(tmp_path / ".hidden" / "d.jsonl", ["d0"])
    (tmp_path / "README.md").write_text("notes")
    source = Files(str(tmp_path))
    found = list(source.documents(context(words)))
    assert found == [(0, "a0"), (1, "b0"), (2, "b1"), (3, "c0")]
    facts = source.provenance()
    assert (facts["files"], facts["documents_held"]) == (3, 4)
    shuffled = list(Files(str(tmp_path)).documents(context(words, order="shuffled", seed=1)))
    assert sorted(shuffled) == found


def test_column_option(words, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["w1", "w2"], column="body")
    assert texts(path, words, [("column", "body")]) == ["w1", "w2"]
    with pytest.raises(UserError, match=r"line 1: no column `text`; columns seen: body"):
        texts(path, words)
    with pytest.raises(UserError, match=r"no column `bdy`.*did you mean `body`"):
        texts(path, words, [("column", "bdy")])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n\n ", "holds no document"),
        ("a.txt", b"ab\x00cd", "a zero byte; this is no text file"),
        ("a.txt", b"ab\xffcd", r"byte 0xff at 2 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": }\n', r"line 3: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', r"line 2: column `text` holds a int"),
        ("a.jsonl", b"[1]\n", "line 1: a list"),
        ("a.jsonl", b'{"text": "a"}\n\xff\n', "line 2: byte 0xff"),
        ("a.json", b'{"text": "a"}', "a JSON list"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}', r"line 2: not JSON.*rename it to .jsonl"),
        ("a.parquet", b"nonsense", "not a readable parquet file"),
        ("a.csv", b"a,b", r"ends in `.csv`; files that are read: .txt, .jsonl"),
    ],
)
def test_unusable_files_are_named_with_the_reason(words, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        texts(path, words)
    assert str(path) in str(error.value)


def test_a_bad_line_is_found_whatever_is_drawn(words, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", numbered(50, 20))
    with path.open("a") as stream:
        stream.write("{broken\n")
    for seed in range(3):
        with pytest.raises(UserError, match="line 51"):
            draw(f"file:{path}", words, pack="longdoc", nsamples=1, calib_seed=seed)


def test_missing_things_are_named_with_what_is_there(words, tmp_path):
    write_jsonl(tmp_path / "mine.jsonl", ["a"])
    with pytest.raises(UserError, match=r"no file or folder .*beside it: mine.jsonl"):
        texts(tmp_path / "mein.jsonl", words)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").write_text("x")
    with pytest.raises(UserError, match=r"holds no readable file \(there: notes.md\)"):
        texts(tmp_path / "empty", words)


def test_null_texts_are_empty_documents(words, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": null}\n{"text": "w1 w2"}\n')
    drawn = draw(f"file:{path}", words, pack="pad", nsamples=1)
    assert drawn.sequences[0].tolist() == [4, 5]


def test_short_corpus_names_numbers_and_a_way_out(words, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", numbered(3, 20))
    with pytest.raises(UserError, match=r"found 3 windows of 8 tokens .* asks 4.*pack=concat"):
        draw(f"file:{path}", words, pack="longdoc")


def test_record_of_a_file(words, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", numbered(9, 20))
    drawn = draw(f"file:{path}", words, pack="longdoc")
    (record,) = drawn.sources
    assert record["source"] == f"file:{path}"
    assert record["pack"] == "longdoc"
    assert record["licence"] is None
    assert len(record["fingerprint"]) == 64
    assert record["documents"] == record["truncated"] == len(record["indices"]) == 4
    assert record["rows"] == [0, 1, 2, 3]
    for ids, (document, start) in zip(drawn.sequences, record["indices"], strict=True):
        assert ids.tolist() == [3 + (document + start + j) % len(WORDS) for j in range(8)]
    drawn.save(tmp_path / "set.json")
    assert CalibrationSet.load(tmp_path / "set.json").calib_id == drawn.calib_id


def test_random_ids_are_text_ids_and_packing_does_not_apply(words):
    drawn = draw("random", words, nsamples=300, seqlen=16, pack="longdoc")
    ids = {i for sequence in drawn.sequences for i in sequence.tolist()}
    assert ids == set(range(3, 63))
    assert all(len(sequence) == 16 for sequence in drawn.sequences)
    assert drawn.sources[0]["pack"] is None
    assert drawn.sources[0]["vocabulary"] == 60
    assert list(RandomIds().documents(context(words))) == []


def test_random_ids_leave_out_rows_without_a_token(words):
    drawn = draw("random", words, nsamples=50, vocab_size=500)
    assert max(int(ids.max()) for ids in drawn.sequences) < 63
    drawn = draw("random", words, nsamples=50, vocab_size=40)
    assert max(int(ids.max()) for ids in drawn.sequences) < 40


def test_a_hub_source_reads_local_folders(words, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    rows = numbered(12, 20)
    made = datasets.Dataset.from_dict({"text": rows, "n": list(range(12))})
    made.info.license = "cc0-1.0"
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(str(tmp_path / "many"))
    (tmp_path / "plain").mkdir()
    write_jsonl(tmp_path / "plain" / "a.jsonl", rows)
    names = set()
    for name in ("one", "many", "plain"):
        drawn = draw(f"hf:{tmp_path / name}", words)
        names.add(drawn.calib_id)
        assert drawn.sources[0]["pack"] == "longdoc"
        assert drawn.sources[0]["fingerprint"]
        assert drawn.sources[0]["documents_held"] == 12
    assert len(names) == 1
    assert draw(f"hf:{tmp_path / 'one'}", words).sources[0]["licence"] == "cc0-1.0"
    with pytest.raises(UserError, match=r"no column `txt`; columns seen: .*text"):
        draw(f"hf:{tmp_path / 'one'}:::txt", words)
    with pytest.raises(UserError, match=r"column `n` holds a int, not text; columns with text: te"):
        draw(f"hf:{tmp_path / 'one'}:::n", words)
    with pytest.raises(UserError, match=r"no split `dev`; splits: train, test"):
        draw(f"hf:{tmp_path / 'many'}::dev", words)
    with pytest.raises(UserError, match=r"Unknown split .*dev"):
        draw(f"hf:{tmp_path / 'plain'}::dev", words)
    with pytest.raises(UserError, match=r"nothing"):
        draw(f"hf:{tmp_path / 'plain'}:nothing", words)
    assert draw(f"hf:{tmp_path / 'many'}::test", words).nsamples == 4


def test_a_relative_folder_and_a_file_given_to_hf(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", ["w1"])
    with pytest.raises(UserError, match=r"is a file.*file:./a.jsonl"):
        draw("hf:./a.jsonl", words)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


TEXT = "one two\nthree\n\nfour five six\n\n\nseven\n"


@pytest.mark.parametrize(
    ("split", "documents"),
    [
        ("blanks", ["one two\nthree\n\nfour five six", "seven"]),
        ("blank", ["one two\nthree", "four five six", "seven"]),
        ("line", ["one two", "three", "four five six", "seven"]),
    ],
)
def test_where_a_document_ends_can_be_said(tmp_path, split, documents):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    assert list(open_documents(path, "text", split)) == documents


def test_stretches_of_text_end_at_white_space_and_lose_nothing(tmp_path):
    words = " ".join(f"word{i}" for i in range(500))
    path = tmp_path / "a.txt"
    path.write_text(words)
    parts = list(open_documents(path, "text", "300"))
    assert "".join(parts) == words
    assert all(300 <= len(part) <= 310 for part in parts[:-1])
    assert all(part.startswith("word") for part in parts)


def test_a_split_that_does_not_exist_or_fit_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n')
    with pytest.raises(UserError, match="split already"):
        list(open_documents(path, "text", "line"))
    for bad in ("lines", "12", "-5"):
        with pytest.raises(UserError, match="allowed: blanks"):
            Files(str(path), [("split", bad)]).validate()
