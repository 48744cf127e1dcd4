"""What leaves this machine says nothing of its folders, and holds nothing that opens a door."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.export.redacted import without_secrets as without_secrets
from lm_calib_plugin.expression import SourceTerm, expression_text, parse_calibration

_PATH_OPTIONS = ("path", "include_path")
_END = r"[^\s'\"`,;()?&+*|<>]+"
# A path that begins like one: /data/x, ~/x, ./x, ../x, C:\x; not https://x, a/b or 1/2.
_PATH = re.compile(rf"(?<![\w/.~\\])(?:~[\w.-]*/|\.{{1,2}}/|/|[A-Za-z]:[\\/])(?![/\\]){_END}")
# A path after a word that says so.
_NAMED = re.compile(rf"\b((?:file|set):|(?:{'|'.join(_PATH_OPTIONS)})=)({_END})")


def publishable(value: Any) -> Any:
    """Return plain values without secrets, and with the last part alone of every local path."""
    return without_folders(without_secrets(value))


def without_folders(value: Any) -> Any:
    """Return plain values in which every local path is cut down to its last part.

    Parameters
    ----------
    value
        Texts, numbers, lists and mappings. A text that is a calibration expression is taken
        apart as one; in others, what looks like a path is.
    """
    if isinstance(value, dict):
        return {without_folders(key): without_folders(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(part) for part in value]
    if isinstance(value, Path):
        return last_part(str(value))
    return _text(value) if isinstance(value, str) else value


def last_part(path: str) -> str:
    """Return the last part of a path of any system, ``here`` when there is none."""
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..", "~")]
    return parts[-1] if parts and not parts[-1].endswith(":") else "here"


def _text(text: str) -> str:
    begins = _PATH.match(text)
    if begins and "\n" not in text and Path(text).expanduser().is_absolute():
        return last_part(text)
    if ":" in text or "path=" in text:
        try:
            terms = parse_calibration(text)
        except UserError:
            terms = ()
        if terms:
            return _expression(text, terms)
    text = _NAMED.sub(lambda found: found[1] + last_part(found[2]), text)
    return _PATH.sub(lambda found: last_part(found[0]), text)


def _expression(text: str, terms: tuple[SourceTerm, ...]) -> str:
    cut = tuple(map(_term, terms))
    return text if cut == terms else expression_text(cut)


def _term(term: SourceTerm) -> SourceTerm:
    argument = term.argument
    if argument and (term.name in ("file", "set") or _local(argument)):
        argument = last_part(argument)
    options = tuple(
        (key, last_part(value) if key in _PATH_OPTIONS or _local(value) else value)
        for key, value in term.options
    )
    return replace(term, argument=argument, options=options, inner=tuple(map(_term, term.inner)))


def _local(text: str) -> bool:
    return _PATH.match(text) is not None
