"""``file:PATH``: a file of your own text, or a folder of files.

``.txt`` is split into documents at two or more blank lines, or as ``?split=`` says; ``.jsonl``,
``.json`` (a list) and ``.parquet`` hold one document a record, in the column ``text`` or in
``?column=NAME``. A folder gives all such files below it, sorted by path.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_calib_plugin.calibration.options import ARGUMENT, Option
from lm_calib_plugin.calibration.sources.base import Context, Document, Source, visiting_order
from lm_calib_plugin.calibration.sources.text_files import (
    READERS,
    check_split,
    open_documents,
)
from lm_calib_plugin.errors import UserError, listed
from lm_calib_plugin.storage import digest, file_digest

LONGEST_LISTING = 8


class Files(Source):
    """Text of local files. Documents are numbered in file order, then in order of the file."""

    name = "file"
    options = {"column": Option(default="text"), "split": Option()}

    def __init__(self, argument: str = "", options: Any = ()) -> None:
        super().__init__(argument, options)
        self.columns: str | tuple[str, ...] = self.settings["column"]
        self._digests: list[tuple[str, str]] = []
        self._total = 0

    def validate(self) -> None:
        """Check that there is something to read; nothing is opened yet."""
        if self.settings["split"] is not None:
            check_split(self.settings["split"])
        find_files(self.argument)

    def documents(self, context: Context) -> Iterator[Document]:
        """Yield documents of all files; every file is checked before the first is given."""
        paths = find_files(self.argument)
        root = Path(self.argument).expanduser()
        self._digests = [
            (path.relative_to(root).as_posix() if path != root else "", file_digest(path))
            for path in paths
        ]
        parts = [open_documents(path, self.columns, self.settings["split"]) for path in paths]
        ends = list(itertools.accumulate(len(part) for part in parts))
        self._total = ends[-1]
        for index in visiting_order(self._total, context):
            yield Document(index, _pick(parts, ends, index))

    def provenance(self) -> dict[str, Any]:
        """Digest of the file (of names and digests for a folder), and how much it holds."""
        single = len(self._digests) == 1 and not self._digests[0][0]
        return {
            "fingerprint": self._digests[0][1] if single else digest(self._digests),
            "licence": None,
            "files": len(self._digests),
            "documents_held": self._total,
        }


def find_files(argument: str) -> list[Path]:
    """Return the readable files that a path stands for.

    Raises
    ------
    UserError
        When there is none; what is there instead is named.
    """
    path = Path(argument).expanduser()
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise UserError(
                ARGUMENT,
                f"{path} ends in `{path.suffix}`",
                f"files that are read: {listed(READERS)}",
            )
        return [path]
    if not path.exists():
        raise UserError(
            ARGUMENT,
            f"no file or folder {argument!r}" + _beside(path),
            f"file:PATH names a {listed(READERS)} file, or a folder of them",
        )
    found = sorted(
        (
            p
            for p in path.rglob("*")
            if p.is_file()
            and p.suffix.lower() in READERS
            and not any(part.startswith(".") for part in p.relative_to(path).parts)
        ),
        key=lambda p: p.as_posix(),
    )
    if not found:
        there = sorted(p.name for p in path.iterdir())[:LONGEST_LISTING]
        raise UserError(
            ARGUMENT,
            f"folder {argument!r} holds no readable file (there: {listed(there) or 'nothing'})",
            f"files that are read: {listed(READERS)}",
        )
    return found


def _beside(path: Path) -> str:
    """Name readable files that stand where the missing one was looked for."""
    if not path.parent.is_dir():
        return ""
    names = sorted(p.name for p in path.parent.iterdir() if p.suffix.lower() in READERS)
    return f" (beside it: {listed(names[:LONGEST_LISTING])})" if names else ""


def _pick(parts: Sequence[Sequence[str]], ends: Sequence[int], index: int) -> str:
    part = bisect.bisect_right(ends, index)
    first = ends[part - 1] if part else 0
    return parts[part][index - first]
