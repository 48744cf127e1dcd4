"""CSV, JSON and hub files: everything is in them, and no cell is a formula."""

from __future__ import annotations

import csv
import dataclasses
import io
import json

import pytest

from lm_calib_plugin.leaderboard.report import flat
from lm_calib_plugin.leaderboard.tables import AVERAGE
from tests.leaderboard import synthetic


def read(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_every_entry_is_a_line_with_numbers_in_full():
    analysis = synthetic.analysis()
    lines = {line["id"]: line for line in read(flat.leaderboard_csv(analysis))}
    assert len(lines) == len(analysis.entries)
    for entry in analysis.entries:
        line, score = lines[entry.id], entry.scores["arc_easy"]
        assert float(line["arc_easy acc_norm [points]"]) == score.mean
        assert line["arc_easy acc_norm sd"] == ("" if score.sd is None else repr(score.sd))
        assert int(line["arc_easy acc_norm draws"]) == len(score.draws)
        assert float(line["arc_easy acc_norm min"]) == min(score.draws)
        assert float(line["arc_easy acc_norm max"]) == max(score.draws)
        assert float(line["worst_retention"]) == entry.kept.worst
        assert line["commands"].split("\n") == list(entry.commands)


def test_no_text_is_a_formula_and_negative_numbers_stay_numbers():
    analysis = synthetic.analysis()
    for text in (flat.leaderboard_csv(analysis), flat.comparisons_csv(analysis)):
        for line in csv.reader(io.StringIO(text)):
            for cell in line:
                if cell[:1] in ("=", "+", "-", "@"):
                    float(cell)
    (line,) = [x for x in read(flat.leaderboard_csv(analysis)) if "HYPERLINK" in x["id"]]
    assert line["calibration"] == "'=HYPERLINK(1)"
    assert any(float(x["delta"]) < 0 for x in read(flat.comparisons_csv(analysis)))


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n"])
def test_beginnings_that_spreadsheets_take_for_formulas_are_guarded(start):
    assert flat.text(start + "1") == "'" + start + "1"
    assert flat.text("1" + start) == "1" + start


def test_json_is_the_whole_analysis():
    analysis = synthetic.analysis()
    found = json.loads(flat.leaderboard_json(analysis))
    ranks = [entry.pop("ranks") for entry in found["entries"]]
    assert found.pop("format") == flat.FORMAT
    for entry in found["entries"]:
        for score in entry["scores"].values():
            order = sorted(score["draws"])
            assert (score.pop("min"), score.pop("max")) == (order[0], order[-1])
    assert found == json.loads(json.dumps(dataclasses.asdict(analysis)))
    assert ranks[0] is None
    assert all(1 <= low <= high for low, high in filter(None, ranks))


def test_numbers_that_are_none_are_texts():
    analysis = synthetic.small()
    entry = analysis.entries[1]
    broken = dataclasses.replace(entry.scores["wikitext"], mean=float("inf"), high=float("nan"))
    entry = dataclasses.replace(entry, scores={**entry.scores, "wikitext": broken})
    found = json.loads(
        flat.leaderboard_json(dataclasses.replace(analysis, entries=(entry,), comparisons=())),
        parse_constant=lambda name: pytest.fail(f"{name} is no JSON"),
    )
    score = found["entries"][0]["scores"]["wikitext"]
    assert (score["mean"], score["high"]) == ("inf", "nan")


def test_hub_files_are_those_of_leaderboard_back_ends():
    analysis = synthetic.analysis()
    found = flat.hub_json(analysis)
    assert len(found) == len(analysis.entries)
    contents = [json.loads(text) for text in found.values()]
    for entry, content in zip(analysis.entries, contents, strict=True):
        assert set(content) == {"config", "results"}
        assert set(content["config"]) == {"model_dtype", "model_name", "model_sha"}
        assert content["config"]["model_sha"] == entry.revision
        assert set(content["results"]) == {"arc_easy", "hellaswag", "wikitext"}
        accuracy = content["results"]["arc_easy"]["acc_norm"]
        assert accuracy == pytest.approx(entry.scores["arc_easy"].mean / 100)
        perplexity = content["results"]["wikitext"]["word_perplexity"]
        assert perplexity == entry.scores["wikitext"].mean
        assert AVERAGE not in content["results"]


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "a b", "", ".", "x" * 500, "ü\n"])
def test_names_of_files_are_plain_and_tell_names_apart(name):
    found = flat.file_name(name)
    assert found == flat.file_name(name) != flat.file_name(name + "!")
    assert len(found) < 80
    assert found.isascii()
    assert not found.startswith(".")
    assert not set(found) & set("/\\ \n")
