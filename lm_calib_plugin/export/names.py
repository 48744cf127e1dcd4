"""Names of files that were read from a file: judged before they become a path."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

# What Windows opens as a device, whatever ending and folder it is given.
_DEVICES = {"con", "prn", "aux", "nul", "clock$", "conin$", "conout$"} | {
    f"{port}{number}" for port in ("com", "lpt") for number in "0123456789¹²³"
}
# Control characters, and what a file name can not hold on every system.
_REFUSED = re.compile(r'[\x00-\x1f\x7f-\x9f<>:"|?*\\]')
LONGEST = 255  # bytes of one part of a name, as file systems have it
# Formats that run code when they are read.
CODE = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


def fault(name: object) -> str | None:
    """Return why a relative posix path must not be used, None if it may.

    It is judged for every system at once: what would leave the folder, or mean another file, on
    any of them is refused on all.
    """
    if not isinstance(name, str) or not name:
        return "no name"
    try:
        encoded = name.encode("utf-8")
    except UnicodeEncodeError:
        return "is not text"
    if name.startswith(("/", "~")) or re.match(r"[A-Za-z]:", name):
        return "is not inside the folder"
    if _REFUSED.search(name):
        return "has characters that no file name should have"
    parts = name.split("/")
    if ".." in parts:
        return "leads out of the folder"
    if any(part in ("", ".") for part in parts):
        return "is not written in its shortest form"
    if len(encoded) > 16 * LONGEST or any(len(part.encode()) > LONGEST for part in parts):
        return "is too long"
    for part in parts:
        if part.endswith((" ", ".")):
            return "ends in a space or a dot"
        if part.split(".")[0].strip().lower() in _DEVICES:
            return "is the name of a device"
    return None


def runs_code(name: str) -> bool:
    """Tell whether a file is of a format that may run code when it is read."""
    return PurePosixPath(name).suffix.lower() in CODE


def twice(names: Iterable[str]) -> str | None:
    """Return the first name that stands twice, letter case aside; None if each stands once."""
    seen: set[str] = set()
    for name in names:
        if name.casefold() in seen:
            return name
        seen.add(name.casefold())
    return None
