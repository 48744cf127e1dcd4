"""Texts of strangers on one line, without what steers a screen."""

from __future__ import annotations

import re
from typing import Any

NO_PLOTS = "Plots are left out, as matplotlib is not installed."
INSTALL_PLOTS = "pip install 'lm-calib-plugin[plots]'"
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]+")


def one_line(value: Any) -> str:
    """Return a text without line ends and other characters that steer a screen."""
    return " ".join(CONTROL.sub(" ", writable(str(value))).split())


def writable(text: str) -> str:
    """Replace halves of characters, which no file can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")
