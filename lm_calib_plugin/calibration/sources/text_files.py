"""Reading documents out of one file: .txt, .jsonl, .json and .parquet.

Every file is checked whole when it is opened, so that a bad line is found whatever is drawn.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_calib_plugin.calibration.chat import Exchange, are_messages
from lm_calib_plugin.calibration.options import ARGUMENT
from lm_calib_plugin.errors import UserError, listed, nearest

Columns = str | tuple[str, ...]
# A document of a .txt ends at two or more blank lines, if not told otherwise. One blank line parts
# the paragraphs of a document; splitting there would leave none long enough for `longdoc`.
DEFAULT_SPLIT = "blanks"
_BETWEEN = {
    "blanks": re.compile(r"(?:[^\S\n]*\n){3,}"),
    "blank": re.compile(r"(?:[^\S\n]*\n){2,}"),
    "line": re.compile(r"\n"),
}
SHORTEST_STRETCH = 100


def open_documents(path: Path, column: Columns, split: str | None = None) -> Sequence[str]:
    """Return the documents of a file as a sequence of texts, read when asked for.

    Parameters
    ----------
    path
        An existing file with one of the endings of :data:`READERS`.
    column
        Field of the text in .jsonl, .json and .parquet; the texts of several are joined.
    split
        Where a document of a .txt ends; see :func:`check_split`. None: at two or more blank lines.

    Raises
    ------
    UserError
        When the file is empty, binary, broken or has no such column, or when ``split`` is given
        for a file of records.
    """
    if split is not None and path.suffix.lower() != ".txt":
        raise UserError(
            ARGUMENT, f"split={split} with {path}", "a file of records is split already", "drop it"
        )
    if path.stat().st_size == 0:
        raise UserError(ARGUMENT, f"{path} is empty", "text is needed")
    if split is not None:
        documents: Sequence[str] = _split_text(path, split)
    else:
        documents = READERS[path.suffix.lower()](path, column)
    if not len(documents):
        raise UserError(ARGUMENT, f"{path} holds no document", "text is needed")
    return documents


def _decoded(path: Path, raw: bytes, line: int | None = None) -> str:
    """Return UTF-8 text, or say where it stops being text."""
    place = f"{path}, line {line}" if line else str(path)
    if b"\0" in raw:
        raise UserError(ARGUMENT, f"{place}: a zero byte; this is no text file", _KINDS)
    try:
        return raw.decode("utf-8-sig" if line in (None, 1) else "utf-8")
    except UnicodeDecodeError as error:
        what = f"byte 0x{raw[error.start]:02x} at {error.start} is not UTF-8"
        raise UserError(ARGUMENT, f"{place}: {what}", "UTF-8 text is needed") from None


def _read_txt(path: Path, column: Columns) -> list[str]:
    return _split_text(path, DEFAULT_SPLIT)


def check_split(split: str) -> None:
    """Raise when ``split`` is no way to end a document.

    ``blanks``: two or more blank lines; ``blank``: one or more; ``line``: every line is a document;
    a number N: stretches of N characters or a little more, ended at white space, for text whose
    documents are not marked.
    """
    if split in _BETWEEN or (split.isdecimal() and int(split) >= SHORTEST_STRETCH):
        return
    raise UserError(
        ARGUMENT,
        f"split={split}",
        f"allowed: {listed(_BETWEEN)}, or {SHORTEST_STRETCH} or more characters",
        "for instance file:my.txt?split=4000",
    )


def _split_text(path: Path, split: str) -> list[str]:
    check_split(split)
    text = _decoded(path, path.read_bytes()).replace("\r\n", "\n")
    between = _BETWEEN.get(split)
    parts = between.split(text) if between else _stretches(text, int(split))
    stripped = (part.strip("\n") for part in parts)
    return [part for part in stripped if part.strip()]


def _stretches(text: str, length: int) -> list[str]:
    """Cut a text at the first white space after every ``length`` characters."""
    space = re.compile(r"\s")
    parts, start = [], 0
    while start < len(text):
        found = space.search(text, start + length)
        end = found.end() if found else len(text)
        parts.append(text[start:end])
        start = end
    return parts


def text_of(record: Any, column: Columns, place: str) -> str:
    """Return the text of a record: a bare text, or the column of a mapping; null is ``""``.

    Several columns are joined by a blank line. A list of messages becomes their contents joined by
    blank lines, and stays known as messages.
    """
    if isinstance(record, str):
        return record
    if not isinstance(column, str):
        return "\n\n".join(filter(None, (text_of(record, name, place) for name in column)))
    if not isinstance(record, dict):
        raise UserError(
            ARGUMENT, f"{place}: a {type(record).__name__}", "an object with a text is needed"
        )
    if column not in record:
        raise missing_column(column, list(record), place)
    value = record[column]
    if are_messages(value):
        return Exchange.of(value)
    if value is not None and not isinstance(value, str):
        texts = [name for name, other in record.items() if isinstance(other, str)]
        raise UserError(
            ARGUMENT,
            f"{place}: column `{column}` holds a {type(value).__name__}, not text",
            f"columns with text: {listed(texts) or 'none'}",
        )
    return value or ""


def missing_column(column: str, columns: Sequence[str], place: str) -> UserError:
    """Return the error for a column that is not there."""
    return UserError(
        ARGUMENT,
        f"{place}: no column `{column}`",
        f"columns seen: {listed(columns) or 'none'}",
        nearest(column, columns)
        or "name the one with the text, for instance file:my.jsonl?column="
        + (columns[0] if columns else "text"),
    )


class JsonLines(Sequence[str]):
    """Documents of a .jsonl file; only the places of the lines are kept in memory."""

    def __init__(self, path: Path, column: Columns) -> None:
        self.path, self.column = path, column
        self._starts = array("q")
        self._lines = array("q")
        start = 0
        with path.open("rb") as stream:
            for number, raw in enumerate(stream, 1):
                if raw.strip():
                    self._parse(raw, number)
                    self._starts.append(start)
                    self._lines.append(number)
                start += len(raw)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        with self.path.open("rb") as stream:
            stream.seek(self._starts[index])
            return self._parse(stream.readline(), self._lines[index])

    def _parse(self, raw: bytes, number: int) -> str:
        text = _decoded(self.path, raw, number)
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(
                ARGUMENT,
                f"{self.path}, line {number}: not JSON ({error.msg}, column {error.colno})",
                "one JSON object a line is needed",
            ) from None
        return text_of(record, self.column, f"{self.path}, line {number}")


def _read_json(path: Path, column: Columns) -> list[str]:
    text = _decoded(path, path.read_bytes())
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "rename it to .jsonl if it holds one object a line" if error.lineno > 1 else ""
        raise UserError(
            ARGUMENT, f"{path}, line {error.lineno}: not JSON ({error.msg})", "a JSON list", hint
        ) from None
    if not isinstance(content, list):
        raise UserError(
            ARGUMENT,
            f"{path} holds a {type(content).__name__}",
            "a JSON list of texts or of objects is needed",
        )
    return [text_of(item, column, f"{path}, item {n}") for n, item in enumerate(content, 1)]


def _read_parquet(path: Path, column: Columns) -> list[str]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        names = parquet.read_schema(path).names
        wanted = [column] if isinstance(column, str) else list(column)
        for name in wanted:
            if name not in names:
                raise missing_column(name, names, str(path))
        values = parquet.read_table(path, columns=wanted).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(ARGUMENT, f"{path}: not a readable parquet file ({first})") from None
    return [text_of(row, column, f"{path}, row {n}") for n, row in enumerate(values, 1)]


READERS: dict[str, Callable[[Path, Columns], Sequence[str]]] = {
    ".txt": _read_txt,
    ".jsonl": JsonLines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
_KINDS = f"files that are read: {listed(READERS)}"
