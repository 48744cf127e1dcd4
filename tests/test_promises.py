"""Every test that docs/promises.md names exists, and every promise has one or says it has not."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS = [
    line
    for line in (ROOT / "docs" / "promises.md").read_text().splitlines()
    if line.startswith("| ") and "---" not in line and "checked by" not in line
]


def test_named_tests_exist():
    named = re.findall(r"`(tests/[\w/.]+)::(\w+)`", "\n".join(ROWS))
    assert len(named) > 15
    gone = [
        f"{file}::{test}"
        for file, test in named
        if not re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.M)
    ]
    assert gone == []


def test_every_promise_is_checked_or_planned():
    assert [r for r in ROWS if "`tests/" not in r and "planned" not in r] == []
