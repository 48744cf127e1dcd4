"""``lm-calib cache ls | rm | verify``: compressed models that are kept for the next run."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lm_calib_plugin.errors import UserError

if TYPE_CHECKING:
    from lm_calib_plugin.artifacts.shelf import Entry

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SECONDS = {"h": 3600, "d": 86400, "w": 7 * 86400}
SHOWN = 12  # digits of a key
_FOLDER = typer.Option(None, "--cache", help="Folder of the cache. Default: ours.")

_commands = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Compressed models that are kept for the next run (cache=true).",
)


def add_to(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.add_typer(_commands, name="cache")


@_commands.command("ls")
def list_kept(
    cache: str = _FOLDER,
    as_json: bool = typer.Option(False, "--json", help="Everything known, for programs."),
) -> None:
    """List the models that are kept, last used first."""
    from lm_calib_plugin.artifacts.shelf import entries

    folder = _shelf(cache)
    there = entries(folder)
    if as_json:
        typer.echo(json.dumps([_plain(entry) for entry in there], indent=1))
        return
    if not there:
        typer.echo(f"nothing is kept in {folder}")
        return
    rows: list[tuple[str, ...]] = [
        ("key", "what", "model", "calibration", "size", "made", "last used")
    ]
    rows += [_row(entry) for entry in there]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        typer.echo("  ".join(map(str.ljust, row, widths)).rstrip())
    total = _size(sum(entry.bytes for entry in there))
    typer.echo(f"{_counted(len(there))}, {total} in {folder}")


@_commands.command("rm")
def remove(
    keys: list[str] = typer.Argument(None, metavar="[KEY]...", help="Or beginnings of keys."),  # noqa: B008
    everything: bool = typer.Option(False, "--all", help="All of them."),
    older_than: str = typer.Option(None, metavar="AGE", help="Not used for so long: 30d, 12h, 2w."),
    larger_than: str = typer.Option(None, metavar="SIZE", help="That take more: 5GB."),
    keep: str = typer.Option(None, metavar="SIZE", help="Delete, least recently used first: 20GB."),
    cache: str = _FOLDER,
) -> None:
    """Delete kept models. What a process makes or loads just now is left alone."""
    from lm_calib_plugin.artifacts.shelf import chosen, entries, over_budget, removed, sweep

    given = [bool(keys), everything, *(x is not None for x in (older_than, larger_than, keep))]
    if sum(given) != 1:
        raise UserError(
            "cache rm",
            f"got {sum(given)} ways to choose",
            "one of KEY..., --all, --older-than, --larger-than, --keep",
            "for instance lm-calib cache rm --older-than 30d",
        )
    folder = _shelf(cache)
    if keys:
        going = chosen(folder, keys)
    elif older_than is not None:
        limit = time.time() - _age(older_than)
        going = [entry for entry in entries(folder) if entry.used < limit]
    elif larger_than is not None:
        least = _bytes("--larger-than", larger_than)
        going = [entry for entry in entries(folder) if entry.bytes > least]
    elif keep is not None:
        going = over_budget(folder, _bytes("--keep", keep))
    else:
        going = entries(folder)
    freed = count = 0
    for entry in going:
        done = removed(entry)
        freed, count = freed + done * entry.bytes, count + done
        verb = "deleted" if done else "in use, left alone"
        typer.echo(f"{entry.key[:SHOWN]}  {_what(entry)}  {_size(entry.bytes)}  {verb}")
    if everything:
        sweep(folder)
    typer.echo(f"{_counted(count)} deleted, {_size(freed)} freed in {folder}")


@_commands.command("verify")
def verify(
    keys: list[str] = typer.Argument(None, metavar="[KEY]...", help="Default: all."),  # noqa: B008
    cache: str = _FOLDER,
) -> None:
    """Read every byte of kept models again; exit code 1 when one is damaged."""
    from lm_calib_plugin.artifacts.shelf import chosen, entries, verified

    folder = _shelf(cache)
    looked_at = chosen(folder, keys) if keys else entries(folder)
    damaged = 0
    for entry in looked_at:
        problem = verified(entry)
        damaged += bool(problem)
        found = "in use, not looked at" if problem is None else problem or "whole"
        typer.echo(f"{entry.key[:SHOWN]}  {found}")
    typer.echo(f"{_counted(len(looked_at))} in {folder}, {damaged} damaged")
    raise typer.Exit(int(damaged > 0))


def _shelf(cache: str | None) -> Path:
    from lm_calib_plugin.artifacts.shelf import shelf_of

    folder = shelf_of(cache or True)
    assert folder is not None
    folder = folder.expanduser()
    if cache and not folder.is_dir():
        raise UserError("--cache", f"no folder {folder}", "the folder that cache=DIR named")
    return folder


def _plain(entry: Entry) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "key": entry.key,
        "folder": str(entry.folder),
        "bytes": entry.bytes,
        "last_used": entry.used,
        "problem": entry.problem or None,
    }
    if entry.record is not None:
        names = "asked recipe model model_name calibration weights_digest created seconds versions"
        facts |= {name: entry.record[name] for name in names.split()}
        facts["recipe_key"] = entry.record["key"]
    return facts


def _row(entry: Entry) -> tuple[str, ...]:
    record = entry.record
    name, drawn, made = "", "", ""
    if record is not None:
        name = Path(record["model_name"]).name or record["model"][:SHOWN]
        made = _ago(record["created"])
        if record["calibration"]:
            c = record["calibration"]
            sources = "+".join(c["sources"]) or "a given set"
            drawn = f"{sources} ({c['nsamples']} x {c['seqlen']}, {c['calib_id'][:SHOWN]})"
    return (
        entry.key[:SHOWN],
        _what(entry),
        name,
        drawn,
        _size(entry.bytes),
        made,
        _ago(entry.used),
    )


def _what(entry: Entry) -> str:
    """Return method and strength in short, such as ``gptq bits=3``."""
    if entry.record is None:
        return entry.problem
    recipe = entry.record["recipe"]
    words = [str(recipe.get("method"))]
    for name in ("sparsity", "pattern", "blocks", "scheme", "bits", "act_bits", "kv_bits"):
        value = recipe.get(name)
        if value is not None and value != "unstructured":
            words.append(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}")
    return " ".join(words)


def _counted(count: int) -> str:
    return f"{count} model{'s'[: count != 1]}"


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KB", "MB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def _ago(then: float) -> str:
    seconds = max(0.0, time.time() - then)
    for length, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {name}{'s'[: count != 1]} ago"
    return "just now"


def _bytes(option: str, text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    if found is None or found[2].upper() not in _UNITS:
        raise UserError(
            option, f"got {text!r}", "a size with its unit", f"for instance {option} 20GB"
        )
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _age(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([hdw])", text.strip().lower())
    if found is None:
        raise UserError(
            "--older-than", f"got {text!r}", "hours (h), days (d) or weeks (w)", "for instance 30d"
        )
    return float(found[1]) * _SECONDS[found[2]]
