"""A report says the same on a screen, in a page and to programs, whatever stands in it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lm_calib_plugin.diagnostics.document import (
    Document,
    Figure,
    Section,
    Table,
    check_out,
    file_name,
    shown,
)
from lm_calib_plugin.drawing import canvas, rendered
from lm_calib_plugin.drawing.svg import Palette
from lm_calib_plugin.errors import UserError

EVIL = "<script>alert(1)</script> & \x1b[31m\u202ered\nnext"


def painted(colors: Palette) -> Any:
    figure, axis = canvas.new_figure(2.0, "error by layer", "lower is better", colors)
    axis.plot([0, 1, 2], [3.0, 1.0, 2.0], color=colors.series(0))
    return figure


def made(evil: str = EVIL) -> Document:
    table = Table(["layer", "error"], [[f"l{i}{evil}", i / 7] for i in range(30)], evil, shown=5)
    figure = Figure("Error by layer", "Lower is better.", "It falls and rises.", painted)
    section = Section(f"Where{evil}", [f"Here {evil}."], [table], [figure], [("a text", evil)])
    data = {"x": [1.0, float("nan"), float("inf")], 3: (1, None)}
    return Document(f"What{evil}", [f"It is {evil}."], {"model": evil}, [section], data)


def test_nothing_breaks_out_of_screen_or_page() -> None:
    document = made()
    text, html = document.text(), document.html()
    assert "\x1b" not in text
    assert "\u202e" not in text + html
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "script-src 'none'" in html


def test_findings_come_first_and_long_tables_are_cut_aloud() -> None:
    lines = made("").text().splitlines()
    assert lines[:3] == ["What", "", "* It is ."]
    assert "... and 25 more rows in the report" in lines
    assert made("").html().count("<tr>") == 31


def test_columns_of_numbers_stand_right() -> None:
    table = Table(["name", "n"], [["a", 1], ["bcd", 2222]], shown=9)
    text = Document("t", [], {}, [Section("s", (), [table])]).text()
    assert text.splitlines()[-3:] == ["name     n", "a        1", "bcd   2222"]


def test_files(tmp_path: Path) -> None:
    files = made().write(tmp_path, "layers")
    names = {file.name for file in files}
    assert files[0].name == "layers.html"
    assert {"layers.html", "layers.txt", "layers.json"} <= names
    assert {"layers-error-by-layer.png", "layers-error-by-layer.svg"} <= names
    assert json.loads((tmp_path / "layers.json").read_text()) == {
        "x": [1.0, None, None],
        "3": [1, None],
    }
    page = (tmp_path / "layers.html").read_text()
    assert page.count("<svg") == 1
    assert not re.search(r"(src|href)=\"(?!#|data:)", page)  # it asks no network
    before = {file: file.read_bytes() for file in files}
    assert made().write(tmp_path, "layers") == files
    assert {file: file.read_bytes() for file in files} == before


def test_without_matplotlib_all_else_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rendered, "available", lambda: False)
    files = made().write(tmp_path, "layers")
    assert [file.suffix for file in files] == [".html", ".txt", ".json"]
    assert "matplotlib is not installed" in capsys.readouterr().err


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="name a folder"):
        check_out(str(tmp_path / "file" / "below"))
    assert check_out(None) is None
    assert check_out(str(tmp_path / "new")) == tmp_path / "new"


def test_values() -> None:
    assert [shown(v) for v in (None, True, 3, 0.123456, 1e-9)] == [
        "",
        "yes",
        "3",
        "0.1235",
        "1e-09",
    ]
    assert file_name("JS by layer (all/rest)") == "js-by-layer-all-rest"
