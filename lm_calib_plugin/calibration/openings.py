"""Opening texts whose first tokens a model is asked to continue."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from lm_calib_plugin.calibration.sources.text_files import open_documents
from lm_calib_plugin.errors import UserError

BUILT_IN = "openings.txt"


def read_openings(file: str | None) -> list[str]:
    """Return opening texts: of a file, or those that come with the package.

    A ``.txt`` holds one opening a line; other files are read as the source ``file`` reads them
    (column ``text``).

    Raises
    ------
    UserError
        When the file is missing, of an unknown kind, or holds no text.
    """
    if file is None:
        text = resources.files(__package__).joinpath(BUILT_IN).read_text(encoding="utf-8")
        return [line for line in text.splitlines() if line]
    path = openings_file(file)
    if path.suffix.lower() != ".txt":
        texts = open_documents(path, "text")
        return [text for text in texts if text.strip()]
    lines = "\n".join(open_documents(path, "text")).splitlines()
    return [line.strip() for line in lines if line.strip()]


def openings_file(file: str) -> Path:
    """Return the path of a file of openings, or say that it is missing."""
    path = Path(file).expanduser()
    if not path.is_file() or path.suffix.lower() not in (".txt", ".jsonl", ".json", ".parquet"):
        raise UserError(
            "calibration",
            f"prefixes={file}: no such file" if not path.is_file() else f"prefixes={file}",
            "a .txt with one opening a line, or a .jsonl, .json or .parquet with a column `text`",
        )
    return path
