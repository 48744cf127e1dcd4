"""The folder of a report: the same bytes twice, nothing of an earlier one, and without plots."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from lm_calib_plugin.drawing import rendered
from lm_calib_plugin.leaderboard import report
from tests.leaderboard import synthetic


def tiny(**changes):
    """Return a leaderboard that is drawn quickly."""
    return synthetic.small(rankings=(), heats=(), **changes)


def bytes_of(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_same_analysis_gives_the_same_bytes(tmp_path):
    first = report.write_report(tiny(), tmp_path / "a")
    report.write_report(tiny(), tmp_path / "b")
    found = bytes_of(tmp_path / "a")
    assert found == bytes_of(tmp_path / "b")
    assert {str(path.relative_to(tmp_path / "a")) for path in first} == set(found)
    names = {"index.html", "report.md", "leaderboard.csv", "comparisons.csv", "leaderboard.json"}
    assert names <= set(found)
    kinds = {name.split("/")[1].split("-")[0] for name in found if name.startswith("plots/")}
    assert kinds == {"quality", "draws", "shares"}


@pytest.fixture
def no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(rendered, "available", lambda: False)


def test_without_matplotlib_all_else_is_written_and_says_so(tmp_path, no_matplotlib, capsys):
    report.write_report(synthetic.small(), tmp_path)
    install = "pip install 'lm-calib-plugin[plots]'"
    assert install in capsys.readouterr().err
    assert install in (tmp_path / "report.md").read_text()
    assert install.replace("'", "&#x27;") in (tmp_path / "index.html").read_text()
    assert not (tmp_path / "plots").exists()


def test_what_an_earlier_report_left_is_removed_and_other_files_stay(tmp_path, no_matplotlib):
    names = ["quality-old-0123abcd.png", "draws-old-0123abcd.svg", "mine.png", "quality-mine.svg"]
    (tmp_path / "plots").mkdir()
    for name in names:
        (tmp_path / "plots" / name).write_bytes(b"old")
    analysis = synthetic.small()
    report.write_report(analysis, tmp_path)
    assert {path.name for path in (tmp_path / "plots").iterdir()} == set(names[2:])
    before = {path.name for path in (tmp_path / "hub").iterdir()}
    fewer = dataclasses.replace(analysis, entries=analysis.entries[:3], comparisons=(), rankings=())
    report.write_report(fewer, tmp_path)
    after = {path.name for path in (tmp_path / "hub").iterdir()}
    assert (len(before), len(after)) == (len(analysis.entries), 3)
    assert after < before


def test_an_analysis_of_next_to_nothing_is_written(tmp_path, no_matplotlib):
    whole = synthetic.small()
    dense = dataclasses.replace(
        whole, entries=whole.entries[:1], comparisons=(), rankings=(), shares=(), heats=(),
        controls=(), conditions={}, notes=(), failures=(), missing=(),
    )  # fmt: skip
    report.write_report(dense, tmp_path / "dense")
    report.write_report(dataclasses.replace(dense, entries=(), columns=()), tmp_path / "nothing")
    assert "54.50" in (tmp_path / "dense" / "report.md").read_text()
