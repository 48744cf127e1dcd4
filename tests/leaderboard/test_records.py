"""Records: whole or not there, and nobody changes one unseen."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.leaderboard.records import Metric, Record, Records, without_times
from tests.leaderboard.fakes import fake_record, light_cells

CELLS = light_cells()


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    records = Records(tmp_path)
    odd = Metric(1e-300, False, "exp", [0.1 + 0.2, -0.0, 1 / 3], [1.0, 2.0, 3.0], 0.5)
    record = fake_record(CELLS[1])
    task = replace(record.tasks["none"], metrics={"acc": odd}, chance=None, n_shot=None)
    record = replace(record, tasks={"none": task}, compression={"a": [1, {"b": None}]})
    path = records.write(record)
    assert records.read(record.key) == record
    assert path.name == f"{record.key[:16]}.json"
    assert path.read_text() == record.to_text()
    assert records.has(record.key)
    assert records.read(CELLS[2].key) is None
    assert list(records.read_all(c.key for c in CELLS)) == [record]


def test_every_changed_byte_is_seen(tmp_path: Path) -> None:
    path = Records(tmp_path).write(fake_record(CELLS[0]))
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        for other in (data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :], data[:place]):
            path.write_bytes(other)
            with pytest.raises(UserError, match=r"cannot be used .*delete it"):
                Record.from_file(path)


def test_another_version_and_another_cell_are_refused(tmp_path: Path) -> None:
    from lm_calib_plugin.storage import record_text

    records = Records(tmp_path)
    path = records.path(CELLS[0].key)
    path.parent.mkdir()
    path.write_text(record_text({"record_version": 2}))
    with pytest.raises(UserError, match="expected version 1, found 2"):
        records.read(CELLS[0].key)
    path.write_text(record_text({"record_version": 1, "key": "x"}))
    with pytest.raises(UserError, match="cannot be used"):
        records.read(CELLS[0].key)
    path.write_text(fake_record(CELLS[1]).to_text())
    with pytest.raises(UserError, match="another cell"):
        records.read(CELLS[0].key)


def test_what_is_no_number_is_not_written(tmp_path: Path) -> None:
    for value in (math.inf, math.nan):
        with pytest.raises(ValueError, match="JSON"):
            Records(tmp_path).write(fake_record(CELLS[0], value))
    assert not list(tmp_path.rglob("*.json*"))


def test_times_are_taken_out_at_any_depth() -> None:
    given = {
        "seconds": 1,
        "a": [{"scoring_seconds": 2, "tokens_per_second": 3, "tokens": 4}],
        "b": 5,
    }
    assert without_times(given) == {"a": [{"tokens": 4}], "b": 5}
