"""Named corpora: pinned, with a license note, and usable from a copy of one's own."""

from __future__ import annotations

import json
import re

import pytest
from conftest import draw, numbered, write_jsonl

from lm_calib_plugin.calibration import make_source, validate_calibration
from lm_calib_plugin.calibration.sources import hub_access
from lm_calib_plugin.corpora import CORPORA
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.expression import parse_calibration
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.storage import file_digest

TYPED = [f"{name}:{row.language[1]}" if row.language else name for name, row in CORPORA.items()]


def source_of(text):
    (term,) = parse_calibration(text)
    return make_source(term)


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers with the commit asked for, and rows held in memory."""
    import datasets

    asked = []

    def load(*args, **given):
        asked.append((args, given))
        rows = numbered(60, 20)
        columns = ["text", "question", "answer", "content"]
        made = {name: rows for name in columns}
        made["license"] = ["mit" if n % 2 else "gpl-3.0" for n in range(60)]
        return datasets.Dataset.from_dict(made).to_iterable_dataset()

    answer = lambda path, revision: hub_access.HubAnswer(revision or "b" * 40, "other")  # noqa: E731
    monkeypatch.setattr(hub_access, "ask_hub", answer)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_rows_are_well_formed():
    for name, row in CORPORA.items():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", row.dataset), name
        assert row.revision is None or re.fullmatch("[0-9a-f]{40}", row.revision), name
        assert row.licence, name
        assert row.summary, name
        if row.language:
            assert re.fullmatch(*row.language), name
    wanted = "c4 wikitext2 wikipedia slimpajama redpajama fineweb dclm pile gsm8k code flores lang"
    assert set(CORPORA) == set(wanted.split())


@pytest.mark.parametrize("text", TYPED)
def test_every_corpus_is_drawn_at_its_revision_with_its_license(words, hub, text):
    name = text.partition(":")[0]
    row = CORPORA[name]
    (record,) = draw(text, words, pack="concat").sources
    assert record["fingerprint"] == row.revision or (row.revision is None and "b" * 40)
    assert record["licence"] == row.licence
    assert record["corpus"] == name
    assert record["source"] == text
    ((_, given),) = hub
    if row.files:
        assert given["data_files"] == f"hf://datasets/{row.dataset}@{'b' * 40}/{row.files}"
    else:
        assert given["revision"] == row.revision


def test_a_revision_that_is_typed_wins(words, hub):
    (record,) = draw("c4?revision=abc", words, pack="concat").sources
    assert record["fingerprint"] == "abc"
    assert hub[0][1]["revision"] == "abc"


def test_language_picks_the_config(words, hub):
    draw("lang:fr*0.5+lang:zh-min-nan*0.5", words, pack="concat")
    assert [args for args, _ in hub] == [
        ("wikimedia/wikipedia", "20231101.fr"),
        ("wikimedia/wikipedia", "20231101.zh-min-nan"),
    ]
    assert source_of("flores:fra_Latn").config == "fra_Latn"
    assert source_of("flores:fra_Latn").split == "dev"


def test_only_files_under_the_kept_licenses_are_drawn(words, hub):
    (record,) = draw("code", words, pack="pad", nsamples=30).sources
    assert record["documents"] == 30
    with pytest.raises(UserError):
        draw("code", words, pack="pad", nsamples=31)


def test_several_columns_are_joined_by_a_blank_line(tmp_path, words):
    copy = tmp_path / "problems.jsonl"
    rows = [{"question": f"w{n}", "answer": "w9 w8"} for n in range(4)]
    copy.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = draw(f"gsm8k?path={copy}", words, pack="pad", nsamples=4)
    texts = {words.decode(sequence) for sequence in drawn.sequences}
    assert texts == {f"w{n} w9 w8" for n in range(4)}
    from lm_calib_plugin.calibration.sources.text_files import text_of

    assert text_of(rows[0], ("question", "answer"), "here") == "w0\n\nw9 w8"
    assert text_of({"question": None, "answer": "x"}, ("question", "answer"), "here") == "x"


def test_parquet_copies_hold_several_columns_too(tmp_path):
    import pyarrow
    import pyarrow.parquet

    from lm_calib_plugin.calibration.sources.text_files import open_documents

    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": ["1", "2"], "b": ["3", None]}), file)
    assert list(open_documents(file, ("a", "b"))) == ["1\n\n3", "2"]
    assert list(open_documents(file, "b")) == ["3", ""]
    with pytest.raises(UserError, match="no column `c`"):
        open_documents(file, ("a", "c"))


def test_a_copy_of_ones_own_needs_no_network(words, tmp_path, monkeypatch):
    def never(path, revision):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub_access, "ask_hub", never)
    copy = write_jsonl(tmp_path / "mine.jsonl", numbered(30, 20))
    named, plain = draw(f"c4?path={copy}", words), draw(f"file:{copy}", words, pack="longdoc")
    assert named.calib_id == plain.calib_id
    (record,) = named.sources
    assert record["fingerprint"] == file_digest(copy)
    assert (record["corpus"], record["licence"]) == ("c4", CORPORA["c4"].licence)
    assert record["local_copy"] is True
    other = write_jsonl(tmp_path / "body.jsonl", numbered(30, 20), "body")
    assert draw(f"c4?path={other}&column=body", words).calib_id == plain.calib_id


def test_a_folder_by_language_gives_that_language(words, tmp_path):
    (tmp_path / "fr.txt").write_text("w1 " * 200)
    write_jsonl(tmp_path / "de.jsonl", ["w2 " * 200])
    drawn = draw(f"lang:fr?path={tmp_path}*0.5+lang:de?path={tmp_path}*0.5", words)
    for record, token in zip(drawn.sources, (4, 5), strict=True):
        assert record["nsequences"] == 2
        assert {i for row in record["rows"] for i in drawn.sequences[row].tolist()} == {token}
    with pytest.raises(UserError, match=r"nothing of that language .*there: de, fr.*es\.txt"):
        draw(f"lang:es?path={tmp_path}", words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lang", "`lang` needs a language; its code looks like `fr`; for instance lang:fr"),
        ("lang:French", "got `French`"),
        ("lang:", "`lang` needs a language"),
        ("flores:fr", "got `fr`; its code looks like `fra_Latn`"),
        ("c4:de", "`c4` takes no argument, got `de`; write `c4`, or hf:allenai/c4:en:train:text"),
        ("c4?path=/no/such/file", "no file or folder"),
        ("c4?column=body", "belongs to a local copy"),
        ("c4?bufer=3", "`c4` has no option `bufer`; did you mean `buffer`"),
    ],
)
def test_what_cannot_be_a_corpus_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        validate_calibration(Recipe(method="wanda", sparsity=0.5, calibration=text))


def test_offline_says_what_can_be_used_now(words, monkeypatch):
    def away(path, revision):
        raise ConnectionError("no route")

    held = {CORPORA[name].dataset for name in ("wikitext2", "pile")}
    monkeypatch.setattr(hub_access, "ask_hub", away)
    monkeypatch.setattr(hub_access, "in_local_cache", lambda path: path in held)
    with pytest.raises(UserError) as caught:
        draw("c4", words)
    text = str(caught.value)
    assert "c4: hf:allenai/c4 cannot be reached" in text
    assert "calibration=self, null:KIND, random, file:PATH" in text
    assert "from earlier downloads wikitext2, pile;" in text
    assert "c4?path=FILE" in text


def test_offline_with_an_earlier_download_of_a_pinned_corpus(words, monkeypatch):
    import datasets

    def away(path, revision):
        raise ConnectionError("no route")

    made = datasets.Dataset.from_dict({"text": numbered(60, 20)})
    monkeypatch.setattr(hub_access, "ask_hub", away)
    monkeypatch.setattr(hub_access, "in_local_cache", lambda path: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **given: made)
    (record,) = draw("wikitext2", words).sources
    assert record["cached"] is True
    assert record["fingerprint"] == made._fingerprint
    assert record["licence"] == CORPORA["wikitext2"].licence
    with pytest.raises(UserError, match="cannot be reached"):
        draw("wikitext2?revision=abc", words)


def test_earlier_downloads_are_found_under_the_name_that_the_library_gives(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert not hub_access.in_local_cache("DKYoon/SlimPajama-6B")
    (tmp_path / "DKYoon___slim_pajama-6_b" / "default").mkdir(parents=True)
    assert hub_access.in_local_cache("DKYoon/SlimPajama-6B")
