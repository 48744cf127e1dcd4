"""The place of an exported folder: may it be written, what is there, what killed exports left."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from lm_calib_plugin import storage
from lm_calib_plugin.errors import CalibError, UserError
from lm_calib_plugin.export import options as names
from lm_calib_plugin.export.published import publishable
from lm_calib_plugin.export.records import read_files_record, verify_folder
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.report import Report


def check_out(
    out: Path,
    recipe: Recipe,
    overwrite: bool = False,
    name: str = "out",
    asked: dict[str, Any] | None = None,
) -> None:
    """Refuse a folder that can not be written, before anything is loaded.

    What was exported by the same recipe, of the same base model and in the same way may stay: it
    is not written again if it turns out to be the same model.

    Parameters
    ----------
    name
        The argument, for messages.
    asked
        Facts that an exported folder has to share to stay: ``base_model``, ``asked``.

    Raises
    ------
    UserError
        When something else is there already (with ``overwrite``: something other than an exported
        folder), when a part of the path is a file, or when writing is not allowed.
    CalibError
        When what may stay is damaged.
    """
    storage.restore(out)
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise exists(name, out)
    if out.exists() and overwrite and not _only_an_export(out):
        raise UserError(
            name,
            f"{out} is not a folder that was exported here, or holds other files, too",
            "--overwrite replaces nothing else",
            "name another folder",
        )
    if out.exists() and not overwrite:
        if not _same_recipe(out, recipe):
            raise exists(name, out)
        facts = verify_folder(out).facts
        given = publishable(asked or {})
        if any(facts.get(key) != value for key, value in given.items()):
            raise exists(name, out)
    parent = next(p for p in out.absolute().parents if p.exists())
    if not parent.is_dir():
        raise UserError(name, f"{parent} is a file", "name a folder")
    try:
        Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=parent)).rmdir()
    except OSError as error:
        raise UserError(
            name,
            f"{parent} can not be written ({error.strerror})",
            "a folder that you may write to",
            "name another one",
        ) from None


def is_there(out: Path, report: Report) -> dict[str, Any]:
    """Return the facts of a folder that :func:`check_out` found whole, if it is this very model."""
    facts = read_files_record(out).facts
    if any(facts.get(name) != getattr(report, name) for name in ("key", "weights_digest")):
        raise exists("out", out)
    return facts


def exists(name: str, out: Path) -> UserError:
    """Return the error for a place that is taken."""
    fix = "name another one" + ("" if name == "export_dir" else ", or give --overwrite")
    return UserError(name, f"{out} exists", "a new folder", fix)


def recipe_text(recipe: Recipe) -> str:
    """Return a recipe as YAML, to be read again."""
    return yaml.safe_dump(recipe.to_metadata(), sort_keys=False, allow_unicode=True)


def size_of(folder: Path) -> int:
    """Return the bytes of all files of a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


@contextlib.contextmanager
def told(out: Path) -> Iterator[None]:
    """Say in a sentence what keeps a folder from being written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = _errno(error)
        if code in (errno.ENOSPC, errno.EDQUOT):
            what = "the disk is full; nothing was kept. Free some space"
        elif code in (errno.ENOTEMPTY, errno.EEXIST):
            what = "something else was put there meanwhile; nothing was kept"
        elif code in (errno.EROFS, errno.EACCES, errno.EPERM):
            what = f"can not be written ({os.strerror(code)})"
        else:
            raise
        raise CalibError(f"{out}: {what}.") from None


def sweep(out: Path, own: Path) -> None:
    """Delete what killed exports to the same folder left long ago."""
    for path in out.parent.glob(".*.tmp"):
        match = storage.TEMPORARY.match(path.name)
        if match is None or match["target"] != out.name or path == own or not path.is_dir():
            continue
        newest = max((p.lstat().st_mtime for p in (path, *path.rglob("*"))), default=0)
        if time.time() - newest > storage.ABANDONED:
            shutil.rmtree(path, ignore_errors=True)


def _errno(error: Exception) -> int | None:
    """Return the number of an error of the system; safetensors has it in its message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def _only_an_export(out: Path) -> bool:
    """Tell whether a folder holds an exported model, be it damaged, and nothing else."""
    try:
        known = {names.FILES, *read_files_record(out).files}
    except CalibError:
        return False
    found = {p.relative_to(out).as_posix() for p in out.rglob("*") if not p.is_dir()}
    return found <= known


def _same_recipe(out: Path, recipe: Recipe) -> bool:
    file = out / names.RECIPE
    there = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
    return there == recipe_text(recipe)
