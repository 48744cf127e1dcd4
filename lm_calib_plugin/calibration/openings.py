"""What a model is asked to go on from: openings of texts, and instructions for a chat."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from lm_calib_plugin.calibration.sources.text_files import open_documents
from lm_calib_plugin.errors import UserError

OPENINGS = "openings.txt"
INSTRUCTIONS = "instructions.txt"


def read_openings(
    file: str | None, built_in: str = OPENINGS, option: str = "prefixes"
) -> list[str]:
    """Return opening texts: of a file, or those that come with the package.

    A ``.txt`` holds one opening a line; other files are read as the source ``file`` reads them
    (column ``text``).

    Parameters
    ----------
    file
        What the user named; None stands for ``built_in``.
    option
        The option that names the file, for messages.

    Raises
    ------
    UserError
        When the file is missing, of an unknown kind, or holds no text.
    """
    if file is None:
        text = resources.files(__package__).joinpath(built_in).read_text(encoding="utf-8")
        return [line for line in text.splitlines() if line]
    path = openings_file(file, option)
    if path.suffix.lower() != ".txt":
        texts = open_documents(path, "text")
        return [text for text in texts if text.strip()]
    lines = "\n".join(open_documents(path, "text")).splitlines()
    return [line.strip() for line in lines if line.strip()]


def openings_file(file: str, option: str = "prefixes") -> Path:
    """Return the path of a file of openings, or say that it is missing."""
    path = Path(file).expanduser()
    if not path.is_file() or path.suffix.lower() not in (".txt", ".jsonl", ".json", ".parquet"):
        raise UserError(
            "calibration",
            f"{option}={file}: no such file" if not path.is_file() else f"{option}={file}",
            "a .txt with one text a line, or a .jsonl, .json or .parquet with a column `text`",
        )
    return path
